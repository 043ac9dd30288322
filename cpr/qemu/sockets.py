"""The sockets of one process: its descriptors joined with /proc/PID/net.

An accepted UNIX connection carries its listener's path (state 03), the listener the same path (state 01). A connection
that still waits in the listener's backlog is nobody's descriptor yet.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cpr.linux import proc, sockdiag

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from cpr.linux.proc import TcpSocket, UnixSocket
    from cpr.model import MonitorAddress

WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 (compared with, not bound to)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A socket descriptor. `family` is AF_UNIX, AF_INET, AF_INET6, or 0 for one that /proc/net does not list."""

    number: int
    inode: int
    family: int = 0
    path: str = ""
    """Of UNIX sockets, as bound: may be relative, begins with '@' where abstract, empty where unnamed."""
    local: tuple[str, int] = ("", 0)
    remote: tuple[str, int] = ("", 0)
    listening: bool = False
    connected: bool = False
    backlog: int = 0
    """Clients that wait, of a TCP listener. Of a UNIX one ask `waiting`."""


def endpoints(pid: int, sockets: Iterable[tuple[int, int]]) -> tuple[Endpoint, ...]:
    """The sockets of a process; `sockets` are (descriptor number, inode).

    One that came from another network namespace is looked up in ours.

    Raises:
        ProcessLookupError: the process is gone.
    """
    wanted = sorted(sockets)
    if not wanted:
        return ()
    inodes = {inode for _, inode in wanted}
    known: dict[int, Endpoint] = {}
    for place in (pid, os.getpid()):
        if not inodes <= known.keys():
            known = {e.inode: e for e in _listed(proc.read_net_unix(place), ())} | known
        if not inodes <= known.keys():  # asked last, as the kernel takes milliseconds to list TCP sockets
            known = {e.inode: e for e in _listed((), proc.read_net_tcp(place))} | known
    return join(wanted, known.values())


def _listed(unix: Iterable[UnixSocket], tcp: Iterable[TcpSocket]) -> list[Endpoint]:
    found = [
        Endpoint(
            number=-1,
            inode=s.inode,
            family=socket.AF_UNIX,
            path=s.path,
            listening=s.listening,
            connected=s.connected,
        )
        for s in unix
    ]
    found += [
        Endpoint(
            number=-1,
            inode=s.inode,
            family=s.family,
            local=s.local,
            remote=s.remote,
            listening=s.state == "LISTEN",
            connected=s.state == "ESTABLISHED",
            backlog=s.backlog,
        )
        for s in tcp
    ]
    return found


def join(sockets: Sequence[tuple[int, int]], listed: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """Descriptors with what is known of their inodes."""
    known = {e.inode: e for e in listed if e.inode}
    return tuple(replace(known.get(inode, Endpoint(number=-1, inode=inode)), number=n) for n, inode in sockets)


def waiting(listener: Endpoint, pid: int) -> int:
    """Clients in a listener's backlog; 0 where the kernel does not say. Those that left a UNIX one do not count."""
    if listener.family != socket.AF_UNIX:
        return listener.backlog
    try:
        told = sockdiag.unix_socket(listener.inode, pid)
    except OSError:
        return 0
    return sum(1 for inode in told.waiting if inode) if told.waiting else told.queue


def peer_path(endpoint: Endpoint, pid: int) -> str:
    """The path at the other end of a connected UNIX socket; empty where it has none or nobody tells."""
    try:
        peer = sockdiag.unix_socket(endpoint.inode, pid).peer
        return next((s.path for s in proc.read_net_unix(pid) if peer and s.inode == peer), "")
    except (OSError, ValueError):
        return ""


def unix_listener(table: Iterable[Endpoint], path: str) -> Endpoint | None:
    """The listener bound to `path` ('@name' where abstract)."""
    bound = path.rstrip("@") if path.startswith("@") else path  # tight=off pads the name with NULs, shown as '@'
    for endpoint in table:
        there = endpoint.path.rstrip("@") if endpoint.path.startswith("@") else endpoint.path
        if endpoint.family == socket.AF_UNIX and endpoint.listening and bound and there == bound:
            return endpoint
    return None


def tcp_listener(table: Iterable[Endpoint], host: str, port: int) -> Endpoint | None:
    """The listener on a port: the one of that very address first, then one of all addresses, then any."""
    found = [e for e in table if e.listening and e.family in (socket.AF_INET, socket.AF_INET6) and e.local[1] == port]
    by_fit = [e for e in found if e.local[0] == host] or [e for e in found if e.local[0] in WILDCARDS] or found
    return by_fit[0] if by_fit else None


def listener_at(table: Collection[Endpoint], address: MonitorAddress) -> Endpoint | None:
    """The one that listens at a monitor's address."""
    if address.path:
        return unix_listener(table, address.path)
    return tcp_listener(table, address.host, address.port)


def clients_of(table: Iterable[Endpoint], listener: Endpoint) -> tuple[Endpoint, ...]:
    """The accepted connections of a listener that are still open."""
    if listener.family == socket.AF_UNIX:
        connected = [e for e in table if e.family == socket.AF_UNIX and e.connected and not e.listening]
        return tuple(e for e in connected if listener.path and e.path == listener.path)
    return tuple(
        e
        for e in table
        if e.family in (socket.AF_INET, socket.AF_INET6)
        and e.connected
        and e.local[1] == listener.local[1]
        and (listener.local[0] in WILDCARDS or plain_host(e.local[0]) == plain_host(listener.local[0]))
    )


def plain_host(host: str) -> str:
    """Without the mapping of IPv4 into IPv6."""
    return host.removeprefix("::ffff:")
