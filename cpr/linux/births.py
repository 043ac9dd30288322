"""Which ids the threads of a new program get, as far as that can be had: whoever remembers threads by id finds them.

The kernel gives the first free id after the one that it gave last in a pid namespace, and `ns_last_pid` sets that one
(kernel/pid_namespace.c; CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN). It must be set while the thread that is born before
the wanted one is just there: who is born next is told by an order that was seen before, who is there by its name.

    born: call_rcu   IO io0          IO mon_iothread   CPU 0/KVM   CPU 1/KVM
               set io0's id                  set CPU 0's    set CPU 1's

Between that and the birth anybody on the host may be given the id, so nothing is promised: look afterwards. The program
runs on whatever fails here, our own end included (ptrace.py), and is late by a fraction of a millisecond a thread.

Out of scope: threads whose program does not name them, other pid namespaces than ours, what an id means to whom.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from cpr.linux import procfile, ptrace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from cpr.linux.proc import Thread

FIRST = ""
"""Stands for the name of the first thread: QEMU makes it before it knows whether threads are to be named."""
STOP_SECONDS = 1.0
NAME_SECONDS = 0.005
"""How long a new thread may take to name itself; the program waits for it."""
_NAP = 0.00005
_LAST = "/proc/sys/kernel/ns_last_pid"
_KERNELS_OWN = "vhost-"
"""Threads that the kernel makes in a process (kernel/vhost_task.c): no clone of the program's."""


@dataclass(frozen=True, slots=True)
class Birth:
    """A thread that is to be: the id that it should get, and its name."""

    tid: int
    name: str


def predecessors(pid: int, there: Iterable[Thread], wanted: Mapping[int, int]) -> dict[str, Birth]:
    """{name of a thread, or FIRST: the one that was made right after it}; `there` are all threads of `pid`.

    `wanted` are those that matter, {its id there: the id that it should get}. Left out is one whose predecessor has no
    name of its own, or one that several have.
    """
    named = {thread.tid: thread.comm for thread in there if not thread.comm.startswith(_KERNELS_OWN)}
    often = Counter(named.values())
    born = sorted(named.keys() - {pid}, key=lambda tid: (tid < pid, tid))  # ids begin anew at pid_max
    found = {}
    for number, (before, now) in enumerate(itertools.pairwise(born)):
        name = named[before] if number else FIRST
        if now in wanted and often[name] <= 1:
            found[name] = Birth(wanted[now], named[now])
    return found


class _LastId:
    """The id that the kernel gave last, in our pid namespace. Raises OSError where it is not to be had."""

    def __init__(self) -> None:
        self._file = os.open(_LAST, os.O_RDWR | os.O_CLOEXEC)
        self._own: int | None = None

    def next_is(self, tid: int | None) -> None:
        """Have `tid` given next; None: what would have been. Raises OSError (EPERM, EINVAL)."""
        if tid is not None:
            if self._own is None:
                self._own = int(os.pread(self._file, 32, 0))
            os.pwrite(self._file, b"%d" % (tid - 1), 0)
        elif self._own is not None:
            os.pwrite(self._file, b"%d" % self._own, 0)
            self._own = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.next_is(None)
        os.close(self._file)


def follow(pid: int, after: Mapping[str, Birth], until: Callable[[], bool]) -> None:
    """Let a process that stands before its first instruction go on, and set the id of the next thread whenever one is
    born that `after` names, as `predecessors` has it. It stands again when all are there, or `until`.

    Raises:
        ProcessLookupError: it has ended. TimeoutError: a thread does not stop; it goes on when the tracer ends.
    """
    try:
        last = _LastId()
    except OSError:
        return
    with last, contextlib.ExitStack() as newborn:
        _follow(pid, dict(after), until, last, newborn)


def _follow(
    pid: int, after: dict[str, Birth], until: Callable[[], bool], last: _LastId, newborn: contextlib.ExitStack
) -> None:
    ptrace.set_options(pid, ptrace.PTRACE_O_TRACECLONE)
    born, number, asked = 0, 0, False
    expected: Birth | None = None
    while after or expected is not None:
        ptrace.resume(pid, number)
        newborn.close()  # the new thread begins while its maker goes on
        stop, asked = _next_stop(pid, until, asked)
        number = 0
        if stop.event == ptrace.PTRACE_EVENT_CLONE:
            tid = ptrace.event_message(pid)
            newborn.callback(_let_go, tid)
            if os.path.exists(f"/proc/{pid}/task/{tid}"):  # else a process: helpers of async teardown
                born += 1
                name = FIRST
                if expected is not None and expected.tid == tid:
                    name = expected.name
                elif born > 1 and after:
                    newborn.close()
                    name = _name(pid, tid)
                expected = after.pop(name, None)
                try:
                    last.next_is(expected.tid if expected is not None else None)
                except OSError:
                    return
        elif stop.event == ptrace.PTRACE_EVENT_STOP:
            if asked or stop.signal != signal.SIGTRAP:  # SIGSTOP and the like: they take hold when it is let go
                return
        elif not stop.event:
            number = stop.signal
        if asked:
            ptrace.interrupt(pid)  # the other stop has taken it back


def _next_stop(pid: int, until: Callable[[], bool], asked: bool) -> tuple[ptrace.Stop, bool]:
    """Where it stands, and whether it was asked to stop."""
    end = time.monotonic() + STOP_SECONDS if asked else 0.0
    try:
        while (stop := ptrace.poll(pid)) is None:
            if not end and until():
                ptrace.interrupt(pid)
                end = time.monotonic() + STOP_SECONDS
            ptrace.pause(end or time.monotonic() + STOP_SECONDS)
    except ChildProcessError:
        raise procfile.gone(pid) from None
    return stop, bool(end)


def _let_go(tid: int) -> None:
    """A new thread stands before it begins, as what traces its maker traces it too."""
    with contextlib.suppress(ProcessLookupError):
        ptrace.wait(tid, time.monotonic() + STOP_SECONDS)
        ptrace.detach(tid)


def _name(pid: int, tid: int) -> str:
    """Its name, when it has one of its own."""
    end = time.monotonic() + NAME_SECONDS
    inherited = procfile.read_text(pid, "comm")
    while True:
        try:
            name = procfile.read_text(pid, f"task/{tid}/comm")
        except (ProcessLookupError, FileNotFoundError):
            return FIRST
        if name != inherited or time.monotonic() > end:
            return name.removesuffix("\n")
        time.sleep(_NAP)
