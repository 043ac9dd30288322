"""Nothing that clients say is read while the state is saved, or after that: it would be lost with the old program.

QEMU reads its chardevs also when the guest stands still, and what it reads goes into a device whose state may be in the
stream already. So when the guest stands and before the state is saved, the connection of each client is kept under
another number, and a socket on which nothing ever comes takes its place. QEMU has nothing to write any more then, and
what the client says waits in the kernel: for the new program, or for this one where the update is undone.

Out of scope: monitors, whose sessions are borrowed (borrow.py); ptys.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from typing import TYPE_CHECKING

from cpr.engines import graft
from cpr.linux.tracee import Call
from cpr.linux.tracer import Attach, Batch, Detach, Tracer
from cpr.qemu.clients import aside, descriptor_targets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from cpr.linux.process import Process


def give_silence(give: Callable[[int], None]) -> None:
    """Have QEMU (`give`) take a socket on which nothing ever comes: beforehand, as calls in its process take time.

    It is not connected: nothing is to be read from it, nobody hangs up. And it says EAGAIN to whoever reads all the
    same, as one does who has seen that there is something to read just before the client was hushed; QEMU makes
    blocking whatever it is given (chardev/char-socket.c), and would hang in that read.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as silent:
        give(silent.fileno())
        silent.setblocking(False)


def hush(process: Process, tracer: Tracer, numbers: Iterable[int], silent: int) -> None:
    """Have accepted connections of the process, which is the tracer's, say nothing: it has a silent socket as `silent`.
    Safe to repeat on others, not on these.

    Should the tracer die in the middle, `listen_again` undoes what was done.

    Raises:
        ConnectionError: the tracer died. OSError: all is as before, but for those before the one that failed.
    """
    calls: list[Call] = []
    high = aside(process.pid)
    for number in numbers:
        calls += [
            Call("fcntl", (number, fcntl.F_DUPFD_CLOEXEC, high)),
            Call("dup3", (silent, number, os.O_CLOEXEC)),
        ]
    if calls:
        tracer.run(Attach(), Batch(tuple(calls)), Detach())


def listen_again(process: Process, hushed: Sequence[Sequence[int]]) -> None:
    """Give QEMU its clients back: (number, inode of its socket) of each. Safe to repeat.

    Raises:
        TimeoutError, PermissionError: a tracer that was killed does not let go. CprError, OSError.
    """
    until = time.monotonic() + graft.LET_GO_SECONDS
    while calls := tuple(_back(process, hushed)):
        try:
            with Tracer.start(process) as tracer:
                tracer.run(Attach(), Batch(calls), Detach())
        except (ConnectionError, PermissionError):
            if time.monotonic() > until:
                raise
            time.sleep(graft.PAUSE)


def _back(process: Process, hushed: Sequence[Sequence[int]]) -> Iterator[Call]:
    for number, inode in hushed:
        kept = [n for n, target in descriptor_targets(process.pid).items() if target == f"socket:[{inode}]"]
        if kept and number not in kept:
            yield Call("dup3", (kept[0], number, os.O_CLOEXEC))
        for other in kept:
            if other != number:
                yield Call("close", (other,))
