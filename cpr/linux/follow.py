"""A new program's first moments under our eyes: from before its first instruction until what was to be done is done.

    birth of a thread       the next one gets the id that it should have      births.py
    a socket is bound       it becomes a listener that was there before       rebind.py

The program runs on whatever fails here, our own end included. A thread that is born is let go at once: calls are looked
at in the first thread only, and only while there is something to be bound, as each of them costs two stops.

Out of scope: starting the program (tracee.py).
"""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from cpr.linux import procfile, ptrace
from cpr.linux.births import STOP_SECONDS, Births
from cpr.linux.rebind import Rebinding

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cpr.linux.births import Birth
    from cpr.linux.rebind import Doors

BIND_SECONDS = 10.0
"""How long one who is alone waits for what is to be bound: nobody is there to say that the program has begun."""


def follow(
    pid: int, after: Mapping[str, Birth], doors: Doors | None, until: Callable[[], bool], alone: Callable[[], bool]
) -> None:
    """Let a process that stands before its first instruction go on. It stands again when there is nothing more to be
    done, or `until`; where we are `alone` not before all is bound.

    after: as `births.predecessors` has it.  doors: listeners that take the place of what it binds to their addresses.

    Raises:
        ProcessLookupError: it has ended. TimeoutError: a thread does not stop; it goes on when the tracer ends.
    """
    with Births(pid, after) as births:
        binding, patience = Rebinding(pid, doors), time.monotonic() + BIND_SECONDS
        _follow(
            pid, births, binding, lambda: until() or (alone() and not (binding.left and time.monotonic() < patience))
        )


def _follow(pid: int, births: Births, binding: Rebinding, enough: Callable[[], bool]) -> None:
    ptrace.set_options(pid, ptrace.PTRACE_O_TRACECLONE | ptrace.PTRACE_O_TRACESYSGOOD)
    number, asked = 0, False
    while births.left or binding.left:
        if binding.left:
            ptrace.resume_to_syscall(pid, number)
        else:
            ptrace.resume(pid, number)
        births.let_go()  # the new thread begins while its maker goes on
        stop, asked = _next_stop(pid, enough, asked)
        number = 0
        if stop.at_syscall:
            binding.at_syscall()
        elif stop.event == ptrace.PTRACE_EVENT_CLONE:
            births.at_clone(ptrace.event_message(pid))
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
