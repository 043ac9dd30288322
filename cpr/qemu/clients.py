"""Who is connected to a chardev right now: quick enough to be asked in a blackout.

The survey reads the same facts once, with everything else; here only the accepted sockets are looked up again, because
clients come and go between the check and the switch.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from cpr.errors import MonitorError
from cpr.linux import fds, proc, sockdiag
from cpr.model import Chardev, MonitorAddress
from cpr.qemu import qmp, sockets

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from cpr.linux.fds import Fd

ATTEMPTS = 50
"""How often two places in a queue are tried for. Between the two there are some ten microseconds."""

ASIDE = 200
"""From which number on a connection is put aside in QEMU while it is borrowed: out of the way of what QEMU opens."""

WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what a listener says, not where we listen


def given(pid: int, before: Mapping[int, str], number: int) -> list[int]:
    """Under which numbers a process has our descriptor `number` that it had not `before` (`descriptor_targets`): where
    it has closed one meanwhile, that may be its number. Raises OSError: it is gone."""
    wanted = os.fstat(number)
    found = []
    for there, _ in descriptor_targets(pid).items() - before.items():
        with contextlib.suppress(OSError):
            status = os.stat(f"/proc/{pid}/fd/{there}")
            if (status.st_dev, status.st_ino, status.st_rdev) == (wanted.st_dev, wanted.st_ino, wanted.st_rdev):
                found.append(there)
    return found


def socket_of(fd: Fd) -> socket.socket:
    """A duplicate to ask and set things on; closing it does not close `fd`."""
    return socket.socket(fileno=os.dup(fd.number))


def listen_address(listener: Fd, label: str) -> MonitorAddress:
    """Where a listening socket can be connected to, by its own name. Raises OSError, ValueError."""
    with socket_of(listener) as sock:
        name = sock.getsockname()
        if sock.family == socket.AF_UNIX:
            path = os.fsdecode(name)
            return MonitorAddress(label=label, path="@" + path[1:] if path.startswith("\0") else path)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            return MonitorAddress(label=label, host=WILDCARDS.get(name[0], name[0]), port=name[1])
    raise ValueError(f"{label} listens on a socket of family {sock.family}")


def descriptor_targets(pid: int) -> dict[int, str]:
    """{descriptor: what its link in /proc says} of a process."""
    found = {}
    base = f"/proc/{pid}/fd"
    for name in os.listdir(base):
        with contextlib.suppress(FileNotFoundError):
            found[int(name)] = os.readlink(f"{base}/{name}")
    return found


def socket_numbers(pid: int, *, besides: int | None = None) -> dict[int, int]:
    """{inode: descriptor} of the sockets of a process, but for one of its numbers."""
    return sockets_among({n: target for n, target in descriptor_targets(pid).items() if n != besides})


def sockets_among(targets: Mapping[int, str]) -> dict[int, int]:
    """{inode: descriptor} of the sockets."""
    return {int(target[8:-1]): number for number, target in targets.items() if target.startswith("socket:[")}


def files_among(targets: Mapping[int, str]) -> set[str]:
    """Paths of the files and devices."""
    return {target for target in targets.values() if target.startswith("/")}


def connected_now(
    pid: int, chardevs: tuple[Chardev, ...], listeners: Mapping[str, Fd], *, besides: Collection[int] = ()
) -> tuple[Chardev, ...]:
    """The given chardevs with `client` as it is now; `listeners` are duplicates by label.

    Every socket of the process is looked at by a duplicate of it, but for the numbers `besides`.

    Raises:
        OSError: the process is gone or may not be looked into.
    """
    found = {label: numbers[-1] for label, numbers in accepted(pid, listeners, besides=besides).items() if numbers}
    return tuple(
        replace(c, client=found.get(c.label), connected=c.label in found) for c in chardevs if c.label in listeners
    )


def accepted(
    pid: int, listeners: Mapping[str, Fd], *, besides: Collection[int] = (), alive: bool = False
) -> dict[str, list[int]]:
    """{label: descriptors of the process that were accepted from the listener of that label}, as they are now.

    `alive`: only those whose other end has not hung up.

    Raises:
        OSError: the process is gone or may not be looked into.
    """
    names: dict[object, str] = {}
    for label, listener in listeners.items():
        with socket_of(listener) as sock:
            names[_local(sock)] = label
    found: dict[str, list[int]] = {label: [] for label in listeners}
    with fds.Fd(os.pidfd_open(pid)) as pidfd:
        for number in socket_numbers(pid).values():
            if number in besides:
                continue
            with contextlib.suppress(OSError):  # closed meanwhile, or not connected
                with fds.take_fd(pidfd, number) as taken, socket_of(taken) as sock:
                    label = names.get(_local(sock), "")
                    if label:
                        sock.getpeername()
                        if not (alive and _hung_up(sock)):
                            found[label].append(number)
    return found


def aside(pid: int) -> int:
    """The first number for what is put aside in this process, which may not have many."""
    with contextlib.suppress(OSError):
        soft, _ = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        return ASIDE if soft == resource.RLIM_INFINITY else min(ASIDE, soft // 2)
    return ASIDE


def holders(pid: int, address: MonitorAddress) -> list[int]:
    """Descriptors of the process that are living connections to its listener at `address`.

    QEMU serves one of them. Another one was borrowed and not given back.

    Raises:
        OSError: the process is gone or may not be looked into.
    """
    numbers = socket_numbers(pid)
    own = sockets.listener_at(sockets.endpoints(pid, [(number, inode) for inode, number in numbers.items()]), address)
    if own is None:
        return []
    with fds.Fd(os.pidfd_open(pid)) as pidfd, fds.take_fd(pidfd, own.number) as listener:
        return sorted(accepted(pid, {address.label: listener}, alive=True)[address.label])


def _hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def _local(sock: socket.socket) -> object:
    """What an accepted connection has in common with its listener, whatever network namespace its client came from.

    The kernel makes the accepted end of a UNIX connection in the client's namespace (net/unix/af_unix.c,
    unix_stream_connect), so that /proc/PID/net/unix of the server need not list it.
    """
    name = sock.getsockname()
    return name if sock.family == socket.AF_UNIX else name[1]


def two_places(address: MonitorAddress, pid: int, listener: Fd) -> tuple[socket.socket, socket.socket]:
    """Two connections to a listener of the process `pid`, one behind the other in its queue, nobody between them.

    Raises:
        MonitorError: others came between every time. OSError: nobody listens there.
    """
    lengthen_queue(listener)
    for _ in range(ATTEMPTS):
        first = qmp.open_socket(address, pid)
        try:
            second = qmp.open_socket(address, pid)
        except BaseException:
            first.close()
            raise
        neighbours = are_neighbours(first, second, listener, pid)
        if neighbours:
            return first, second
        if neighbours is None:
            return first, _turning_away(first, second, address, pid, listener)
        first.close()
        second.close()
        time.sleep(0.005)
    raise MonitorError(str(address), "other clients keep coming in between", hint="try again")


QUEUE = 1024
"""Clients that may wait while nobody is served; net.core.somaxconn is the limit."""
USUAL_QUEUE = 1
"""What QEMU's listeners have (qio_net_listener_open_sync of every chardev and VNC server): two clients may wait."""


def lengthen_queue(listener: Fd) -> None:
    """Have clients wait: with a full queue those of UNIX sockets that do not block are refused (EAGAIN).

    A QEMU that is given the listener shortens it again.
    """
    with socket_of(listener) as sock:
        sock.listen(QUEUE)


def shorten_queue(listener: Fd) -> None:
    """As QEMU has it; who waits already stays."""
    with contextlib.suppress(OSError), socket_of(listener) as sock:
        sock.listen(USUAL_QUEUE)


def are_neighbours(first: socket.socket, second: socket.socket, listener: Fd, pid: int) -> bool | None:
    """Whether nobody was or will be served after `first` and before `second`; None where the kernel does not tell.

    Of TCP the order is not known: nobody else may wait at all.
    """
    if second.family == socket.AF_UNIX:
        try:
            waiting = sockdiag.unix_socket(os.fstat(listener.number).st_ino, pid).waiting
        except OSError:  # no unix_diag
            return None
        ours = [os.fstat(sock.fileno()).st_ino for sock in (first, second)]
        if ours[1] not in waiting:
            return None
        place = waiting.index(ours[1])
        return place == 0 or waiting[place - 1] == ours[0]
    port = second.getpeername()[1]
    mine = {first.getsockname()[1], second.getsockname()[1]}
    at_port = [tcp for tcp in proc.read_net_tcp(pid) if tcp.local[1] == port and tcp.inode == 0]  # not accepted yet
    return not any(tcp.state in ("ESTABLISHED", "CLOSE_WAIT") and tcp.remote[1] not in mine for tcp in at_port)


def others_ahead(place: socket.socket, listener: Fd, pid: int) -> bool:
    """Whether somebody who has not left waits before ours, in the queue of a UNIX listener that nobody is served from;
    no, where the kernel does not tell."""
    try:
        waiting = sockdiag.unix_socket(os.fstat(listener.number).st_ino, pid).waiting
    except OSError:
        return False
    ours = os.fstat(place.fileno()).st_ino
    return ours in waiting and any(waiting[: waiting.index(ours)])


def withdraw(listener: Fd, pid: int, ours: socket.socket | None = None) -> bool:
    """Take a connection of ours out of a listener's queue; whether it was there. `ours` None: one that has hung up.

    It would wait for as long as another client is served, and be taken for somebody who waits. Only where it is next is
    it taken, so that nobody else loses his place; of TCP the order is not known: nobody else may wait at all.

    Raises:
        OSError: the process is gone or may not be looked into.
    """
    with socket_of(listener) as sock:
        if not _is_next(listener, sock, pid, ours):
            return False
        blocks = os.get_blocking(sock.fileno())
        os.set_blocking(sock.fileno(), False)  # QEMU may be quicker
        try:
            sock.accept()[0].close()
        except BlockingIOError:
            return False
        finally:
            os.set_blocking(sock.fileno(), blocks)
    return True


def _is_next(listener: Fd, sock: socket.socket, pid: int, ours: socket.socket | None) -> bool:
    if sock.family == socket.AF_UNIX:
        wanted = os.fstat(ours.fileno()).st_ino if ours is not None else 0  # a socket that was closed has no inode
        return sockdiag.unix_socket(os.fstat(listener.number).st_ino, pid).waiting[:1] == (wanted,)
    there = [tcp for tcp in proc.read_net_tcp(pid) if tcp.local[1] == sock.getsockname()[1] and tcp.inode == 0]
    waiting = [tcp for tcp in there if tcp.state in ("ESTABLISHED", "CLOSE_WAIT")]
    if len(waiting) != 1:
        return False
    return waiting[0].state == "CLOSE_WAIT" if ours is None else waiting[0].remote[1] == ours.getsockname()[1]


def _turning_away(
    first: socket.socket, second: socket.socket, address: MonitorAddress, pid: int, listener: Fd
) -> socket.socket:
    """A new second place, with whoever waits turned away: only where the kernel does not tell who that is."""
    second.close()
    select.select([first], [], [], 5.0)  # it is greeted, and so not among those that wait
    with socket_of(listener) as sock:
        while select.select([sock], [], [], 0)[0]:
            sock.accept()[0].close()
    return qmp.open_socket(address, pid)


ROOM = 8 << 20
"""Bytes a client's socket may hold for the time of a switch (a byte written alone is charged some 750)."""
MORE_ROOM = 5 * ROOM
"""Where that is full: a socket can be written to when three quarters are free (net/unix/af_unix.c, unix_writable)."""
USUAL = 212992
"""net.core.wmem_default of every kernel so far."""
SO_SNDBUFFORCE = 32


def widen(sock: socket.socket, *, patience: float = 0.5, room: int = ROOM) -> bool:
    """Make room in a client's socket until it can be written to; a full one needs CAP_NET_ADMIN. Whether it can."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, room)
    return bool(select.select([], [sock], [], patience)[1])


def narrow(sock: socket.socket) -> None:
    """Take the room back; what is in it stays."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, USUAL // 2)
