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
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from cpr.linux import procfile, ptrace

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

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

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.next_is(None)
        os.close(self._file)


class Births:
    """What is still to be born in a traced program: `at_clone` at each stop of its first thread that tells of one."""

    def __init__(self, pid: int, after: Mapping[str, Birth]) -> None:
        self._pid = pid
        self._after = dict(after)
        self._expected: Birth | None = None
        self._born = 0
        self._newborn = contextlib.ExitStack()
        self._last: _LastId | None = None

    def __enter__(self) -> Self:
        if self._after:
            with contextlib.suppress(OSError):
                self._last = _LastId()
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()
        if self._last is not None:
            self._last.close()

    @property
    def left(self) -> bool:
        """Whether somebody is waited for whose id can be set."""
        return self._last is not None and (bool(self._after) or self._expected is not None)

    def let_go(self) -> None:
        """Have the thread begin that was born last."""
        self._newborn.close()

    def at_clone(self, tid: int) -> None:
        """`tid` is born, and stands. Raises OSError (ESRCH) where the program has ended."""
        self._newborn.callback(_let_go, tid)
        if not self.left or not os.path.exists(f"/proc/{self._pid}/task/{tid}"):
            return  # a process: helpers of async teardown
        assert self._last is not None
        self._born += 1
        name = FIRST
        if self._expected is not None and self._expected.tid == tid:
            name = self._expected.name
        elif self._born > 1 and self._after:
            self.let_go()
            name = _name(self._pid, tid)
        self._expected = self._after.pop(name, None)
        try:
            self._last.next_is(self._expected.tid if self._expected is not None else None)
        except OSError:
            self._after, self._expected = {}, None


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
