"""Other ends for the connections of a process that goes on running: one of ours in, the client's own back.

    swap_in     a client's accepted connection is kept under a high number, a socket of ours takes its place
    put_back    the kept one takes the place of an accepted one, the old or another

Both happen while all threads stand, and only if what the caller looks at then is as it should be; else the threads run
again and the next look comes a moment later. A thread that waits in ppoll is sent into it again by the kernel, and so
waits for the new socket; QEMU polls its chardevs in no other way.

Out of scope: what the connections speak (relay.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpr.errors import StepFailed
from cpr.linux import fds, sockdiag
from cpr.linux.tracee import Call
from cpr.linux.tracer import Attach, Batch, Detach, Tracer
from cpr.qemu.clients import aside, descriptor_targets, socket_numbers, socket_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cpr.linux.process import Process

PAUSE = 0.002
"""Seconds that the process runs between two tries."""


@dataclass(slots=True, kw_only=True)
class Stopped:
    """For how many seconds all threads stood, once for each try; the last one did it."""

    times: list[float]

    @property
    def retries(self) -> int:
        return len(self.times) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A client's connection that waits in its process, under a number where nobody reads it."""

    number: int
    inode: int

    def holds(self, pid: int) -> bool:
        """Whether it is (still) there: a number alone may be anything by now. Raises OSError."""
        return socket_inode(pid, self.number) == self.inode


@dataclass(slots=True, kw_only=True)
class Swapped:
    """`ours` talks to the process now, `client` to the client."""

    ours: socket.socket
    client: socket.socket
    kept: Kept
    stopped: Stopped


def socket_inode(pid: int, number: int) -> int:
    """Of the socket that a descriptor of a process is; 0 where it is none. Raises OSError."""
    try:
        target = os.readlink(f"/proc/{pid}/fd/{number}")
    except FileNotFoundError:
        return 0
    return int(target[8:-1]) if target.startswith("socket:[") else 0


def find_kept(pid: int, number: int, inode: int) -> Kept | None:
    """Where a process keeps a client's connection that was its accepted descriptor `number`; None where it still is
    that, or is not kept. For whoever knows only what was to be borrowed. Raises OSError."""
    numbers = [n for n, target in descriptor_targets(pid).items() if target == f"socket:[{inode}]"]
    return Kept(number=max(numbers), inode=inode) if numbers and number not in numbers else None


def accepted_of(process: Process, sock: socket.socket, before: frozenset[int] = frozenset()) -> int | None:
    """The descriptor of the process that is the other end of our connection; None while there is none.

    `before`: inodes of its sockets before we connected, for kernels that do not tell a UNIX socket's peer.

    Raises:
        OSError: the process is gone, or may not be looked into.
    """
    numbers = socket_numbers(process.pid)
    if sock.family == socket.AF_UNIX:
        with contextlib.suppress(OSError):
            peer = sockdiag.unix_socket(os.fstat(sock.fileno()).st_ino).peer
            return numbers.get(peer)
    for inode in numbers.keys() - before:
        with contextlib.suppress(OSError):
            with fds.take_fd(process.pidfd, numbers[inode]) as taken, socket_of(taken) as theirs:
                other = theirs.getpeername()
                if sock.family == socket.AF_UNIX:
                    if theirs.getsockname() == sock.getpeername():
                        return numbers[inode]
                elif (other, theirs.getsockname()) == (sock.getsockname(), sock.getpeername()):
                    return numbers[inode]
    return None


def _when(
    tracer: Tracer, ready: Callable[[], bool], do: Callable[[], None], until: float, what: str, times: list[float]
) -> None:
    """Stop all threads; if it is `ready`, `do` it, else try again.

    Raises:
        TimeoutError: it was not by `until` (time.monotonic). What `ready`, `do` and the tracer raise; the threads run.
    """
    while True:
        began = time.monotonic()
        tracer.run(Attach())
        try:
            done = ready()
            if done:
                do()
        finally:
            with contextlib.suppress(ConnectionError):  # where an operation failed it is detached, and the tracer gone
                tracer.run(Detach())
            times.append(time.monotonic() - began)
        if done:
            return
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not in {len(times)} tries")
        time.sleep(PAUSE)


def swap_in(
    process: Process,
    tracer: Tracer,
    number: int,
    ready: Callable[[socket.socket], bool],
    until: float,
    then: Callable[[Swapped], None] = lambda _: None,
) -> Swapped:
    """Have one end of a socket pair of ours stand in for the accepted connection `number`, when it is `ready`, which is
    asked once before as well, while the process runs; `then` comes before it goes on.

    Should the tracer die in the middle, the swap has been made, and this returns, or it has not, and this raises. At
    worst two sockets that nobody uses stay open in the process.

    Raises:
        TimeoutError: never ready by `until`. ConnectionError: the tracer died, nothing was swapped. StepFailed: the
        connection is gone. OSError.
    """
    client = _duplicate(process, number)
    inode = os.fstat(client.fileno()).st_ino
    times: list[float] = []
    made: list[Swapped] = []

    def as_it_was() -> bool:
        if socket_inode(process.pid, number) != inode:
            raise StepFailed("borrow a monitor", f"the client of descriptor {number} hung up")
        return ready(client)

    def swap() -> None:
        made.append(_swap(process, tracer, number, client, inode, times))
        then(made[0])

    try:
        ready(client)
        _when(tracer, as_it_was, swap, until, f"descriptor {number} is never between two commands", times)
    except BaseException:
        for one in made:
            with contextlib.suppress(Exception):
                surely_put_back(process, tracer, one.kept, number, lambda: True, time.monotonic())
            one.ours.close()
        client.close()
        raise
    return made[0]


def _closing(targets: Mapping[int, str], inode: int, *, but: int) -> list[Call]:
    """Calls that close what else there is of a client's connection: one of us who died half way left it."""
    return [Call("close", (n,)) for n, target in targets.items() if target == f"socket:[{inode}]" and n != but]


def _duplicate(process: Process, number: int) -> socket.socket:
    with fds.take_fd(process.pidfd, number) as fd:
        return socket.socket(fileno=fd.steal())


def _swap(
    process: Process, tracer: Tracer, number: int, client: socket.socket, inode: int, times: list[float]
) -> Swapped:
    """All threads stand. The pair is made there, as a process without privileges may not take descriptors of ours."""
    before = descriptor_targets(process.pid)
    tracer.run(
        Batch((Call("socketpair", (socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, 0, bytes(8))),))
    )
    theirs, other = sorted(descriptor_targets(process.pid).keys() - before.keys())
    ours = _duplicate(process, other)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
    with fds.take_fd(process.pidfd, theirs) as fd:
        standing_in = os.fstat(fd.number).st_ino
    high = aside(process.pid)
    flags = fcntl.fcntl(client.fileno(), fcntl.F_GETFL)
    try:
        results = tracer.run(
            Batch(
                (
                    Call("fcntl", (number, fcntl.F_DUPFD_CLOEXEC, high)),
                    Call("fcntl", (theirs, fcntl.F_SETFL, flags)),
                    Call("close", (other,)),  # first: a pair that is whole there would never hang up, should we die
                    Call("dup3", (theirs, number, os.O_CLOEXEC)),
                    Call("close", (theirs,)),
                    *_closing(before, inode, but=number),
                )
            )
        )
        kept = results[0][0]
    except BaseException:
        if socket_inode(process.pid, number) != standing_in:
            ours.close()
            raise
        targets = descriptor_targets(process.pid)
        kept = max(n for n, target in targets.items() if target == f"socket:[{inode}]")
    return Swapped(
        ours=ours, client=client, kept=Kept(number=kept, inode=inode), stopped=Stopped(times=times)
    )


LET_GO_SECONDS = 2.0
SMALL = 16384
"""Bytes that may wait between us and QEMU: few commands, so that all are soon answered when no more are to follow."""


def put_back(
    process: Process, tracer: Tracer, kept: Kept, number: int, ready: Callable[[], bool], until: float
) -> Stopped:
    """Have the kept connection take the place of `number`, when it is `ready`; it is kept no longer.

    Should the tracer die in the middle, it may have taken its place already: a second time does no harm.

    Raises:
        TimeoutError: never ready by `until`. ConnectionError: the tracer died. StepFailed: it is not kept there, or
        `number` is no socket. OSError.
    """
    times: list[float] = []

    def as_it_was() -> bool:
        there = socket_inode(process.pid, number)
        if there != kept.inode and not kept.holds(process.pid):
            raise StepFailed("give a monitor back", f"the client's connection is not kept as descriptor {kept.number}")
        if not there:
            raise StepFailed("give a monitor back", f"descriptor {number} is no connection any more")
        return ready()

    def put() -> None:
        targets = descriptor_targets(process.pid)
        calls = _closing(targets, kept.inode, but=number)
        if socket_inode(process.pid, number) != kept.inode:
            calls.insert(0, Call("dup3", (kept.number, number, os.O_CLOEXEC)))
        tracer.run(Batch(tuple(calls)))

    _when(tracer, as_it_was, put, until, f"descriptor {number} never comes to rest", times)
    return Stopped(times=times)


def surely_put_back(
    process: Process, tracer: Tracer, kept: Kept, number: int, ready: Callable[[], bool], until: float
) -> Stopped:
    """As `put_back`, by another tracer where this one is dead: one ends with the first operation that fails.

    That one may find the threads still traced: the kernel lets them go when all of the dead one is gone.
    """
    try:
        return put_back(process, tracer, kept, number, ready, until)
    except ConnectionError:
        patience = max(until, time.monotonic() + LET_GO_SECONDS)
    while True:
        try:
            with Tracer.start(process) as another:
                return put_back(process, another, kept, number, ready, until)
        except (ConnectionError, PermissionError):
            if time.monotonic() > patience:
                raise
            time.sleep(PAUSE)
