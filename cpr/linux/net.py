"""Sockets of a network namespace as /proc/PID/net has them, each with the inode that a descriptor shows.

Out of scope: netlink (sockdiag.py), other protocols, and who owns a socket.
"""

from __future__ import annotations

import socket
import struct
import sys
from dataclasses import dataclass

from cpr.linux import procfile

SO_ACCEPTCON = 0x10000
"""Flag of a listening socket in /proc/net/unix (include/linux/net.h)."""

_TYPES = {1: "stream", 2: "dgram", 5: "seqpacket"}

_TCP_STATES = (
    "", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE", "CLOSE_WAIT",
    "LAST_ACK", "LISTEN", "CLOSING", "NEW_SYN_RECV",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixSocket:
    """A line of /proc/net/unix. `path` begins with '@' where abstract; accepted ones carry their listener's path.

    The kernel writes the path as it is: whoever binds a socket to a name with a newline can forge lines. Believe a
    path only for an inode that occurs once, and an inode only from a descriptor.
    """

    inode: int
    path: str
    type: str
    """stream, dgram, seqpacket"""
    listening: bool
    connected: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpSocket:
    """A line of /proc/net/tcp or tcp6; addresses as text."""

    inode: int
    family: int
    """socket.AF_INET or AF_INET6."""
    local: tuple[str, int]
    remote: tuple[str, int]
    state: str
    """LISTEN, ESTABLISHED, ..."""
    backlog: int
    """Clients that wait to be accepted, where LISTEN; else 0."""
    uid: int


def parse_net_unix(text: str) -> list[UnixSocket]:
    """Parse /proc/net/unix. Lines that are none (the rest of a name with a newline) are passed over."""
    sockets = []
    for line in text.split("\n"):
        fields = line.split(None, 6)
        if len(fields) < 7 or not fields[0].endswith(":"):
            continue
        inode, _, path = fields[6].partition(" ")
        try:
            flags, kind, state = (int(word, 16) for word in fields[3:6])
            sockets.append(
                UnixSocket(
                    inode=int(inode),
                    path=path,
                    type=_TYPES.get(kind, str(kind)),
                    listening=bool(flags & SO_ACCEPTCON),
                    connected=state == 3,
                )
            )
        except ValueError:
            continue
    return sockets


def read_net_unix(pid: int) -> list[UnixSocket]:
    """The UNIX sockets of a process's network namespace. Raises ProcessLookupError, PermissionError."""
    return parse_net_unix(procfile.read_text(pid, "net/unix"))


def _address(text: str, family: int) -> tuple[str, int]:
    """The kernel prints an address as words of 32 bits, each in the host's byte order."""
    address, _, port = text.partition(":")
    words = [int(address[i : i + 8], 16) for i in range(0, len(address), 8)]
    if len(address) != (8 if family == socket.AF_INET else 32):
        raise ValueError(f"not an address: {text!r}")
    packed = struct.pack(("<" if sys.byteorder == "little" else ">") + f"{len(words)}I", *words)
    return socket.inet_ntop(family, packed), int(port, 16)


def parse_net_tcp(text: str, family: int) -> list[TcpSocket]:
    """Parse /proc/net/tcp (AF_INET) or tcp6 (AF_INET6). Lines that are none are passed over."""
    sockets = []
    for line in text.split("\n"):
        fields = line.split()
        if len(fields) < 10 or not fields[0].endswith(":"):
            continue
        try:
            number = int(fields[3], 16)
            state = _TCP_STATES[number] if 0 < number < len(_TCP_STATES) else str(number)
            queued = int(fields[4].partition(":")[2], 16)
            sockets.append(
                TcpSocket(
                    inode=int(fields[9]),
                    family=family,
                    local=_address(fields[1], family),
                    remote=_address(fields[2], family),
                    state=state,
                    backlog=queued if state == "LISTEN" else 0,
                    uid=int(fields[7]),
                )
            )
        except ValueError:
            continue
    return sockets


def read_net_tcp(pid: int) -> list[TcpSocket]:
    """The TCP sockets, IPv4 and IPv6, of a process's network namespace. Raises ProcessLookupError, PermissionError."""
    sockets = parse_net_tcp(procfile.read_text(pid, "net/tcp"), socket.AF_INET)
    try:
        sockets += parse_net_tcp(procfile.read_text(pid, "net/tcp6"), socket.AF_INET6)
    except FileNotFoundError:  # ipv6.disable=1
        pass
    return sockets
