"""What only NETLINK_SOCK_DIAG tells of UNIX sockets: clients in a listener's queue, and a socket's peer.

A netlink socket sees the network namespace that it was made in; for another one a thread of ours goes there for a
moment, makes the socket and ends (needs CAP_SYS_ADMIN). Needs CONFIG_UNIX_DIAG (a module on most distributions).

Out of scope: TCP, whose queue is in /proc/net/tcp (net.py).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from dataclasses import dataclass

from cpr.linux import procfile
from cpr.linux.syscalls import CLONE_NEWNET, setns

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLMSG_ERROR = 2
NLM_F_REQUEST = 1
UDIAG_SHOW_NAME = 0x01
UDIAG_SHOW_PEER = 0x04
UDIAG_SHOW_ICONS = 0x08
UDIAG_SHOW_RQLEN = 0x10
UNIX_DIAG_NAME = 0
UNIX_DIAG_PEER = 2
UNIX_DIAG_ICONS = 3
UNIX_DIAG_RQLEN = 4

_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBHIIIII")
_MESSAGE = struct.Struct("=BBBBIII")
_ATTRIBUTE = struct.Struct("=HH")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixDiag:
    """What the kernel says of one UNIX socket."""

    inode: int
    state: int
    """TCP_LISTEN (10), TCP_ESTABLISHED (1), ..."""
    name: str
    """Bound path; '@...' where abstract, '' where unbound."""
    peer: int
    """Inode of the connected peer, 0 for none."""
    queue: int
    """Of a listener: clients that wait to be accepted. Else: bytes to be read."""
    queue_limit: int
    """Of a listener: how many may wait."""
    waiting: tuple[int, ...] = ()
    """Of a listener: inodes of the sockets that wait, in the order in which they will be accepted."""


def parse_unix_diag(message: bytes) -> UnixDiag:
    """Parse the body of an answer (struct unix_diag_msg and attributes). Raises ValueError where it is cut short."""
    try:
        _, _, state, _, inode, _, _ = _MESSAGE.unpack_from(message)
        attributes: dict[int, bytes] = {}
        offset = _MESSAGE.size
        while offset + _ATTRIBUTE.size <= len(message):
            length, kind = _ATTRIBUTE.unpack_from(message, offset)
            if length < _ATTRIBUTE.size or offset + length > len(message):
                raise ValueError("an attribute is cut short")
            attributes[kind] = message[offset + _ATTRIBUTE.size : offset + length]
            offset += (length + 3) & ~3
        queue, limit = struct.unpack("=II", attributes.get(UNIX_DIAG_RQLEN, bytes(8)))
        (peer,) = struct.unpack("=I", attributes.get(UNIX_DIAG_PEER, bytes(4)))
    except struct.error as error:
        raise ValueError(f"not an answer of unix_diag: {error}") from None
    icons = attributes.get(UNIX_DIAG_ICONS, b"")
    waiting = tuple(number for (number,) in struct.iter_unpack("=I", icons[: len(icons) // 4 * 4]))
    raw = attributes.get(UNIX_DIAG_NAME, b"")
    name = "@" + os.fsdecode(raw[1:]) if raw.startswith(b"\0") else os.fsdecode(raw.rstrip(b"\0"))
    return UnixDiag(
        inode=inode, state=state, name=name, peer=peer, queue=queue, queue_limit=limit, waiting=waiting
    )


def _diag_socket() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG)


def socket_in_namespace_of(pid: int) -> socket.socket:
    """A NETLINK_SOCK_DIAG socket of a process's network namespace. Raises ProcessLookupError, PermissionError."""
    theirs = procfile.stat(pid, "ns/net")
    ours = os.stat("/proc/self/ns/net")
    if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino):
        return _diag_socket()
    with procfile.vanishing(pid):
        namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    made: list[socket.socket] = []
    failed: list[OSError] = []

    def there() -> None:
        try:
            setns(namespace, CLONE_NEWNET)
            made.append(_diag_socket())
        except OSError as error:
            failed.append(error)

    try:
        thread = threading.Thread(target=there, name="setns")
        thread.start()
        thread.join()
    finally:
        os.close(namespace)
    if failed:
        raise failed[0]
    return made[0]


def unix_socket(inode: int, pid: int | None = None) -> UnixDiag:
    """Ask for one socket by its inode, in our network namespace or in that of a process.

    Raises:
        FileNotFoundError: no such socket there, or the kernel has no unix_diag. ProcessLookupError, PermissionError.
    """
    body = _REQUEST.pack(
        socket.AF_UNIX, 0, 0, 0xFFFFFFFF, inode,
        UDIAG_SHOW_NAME | UDIAG_SHOW_PEER | UDIAG_SHOW_ICONS | UDIAG_SHOW_RQLEN,
        0xFFFFFFFF, 0xFFFFFFFF,
    )  # fmt: skip
    header = _HEADER.pack(_HEADER.size + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 1, 0)
    with _diag_socket() if pid is None else socket_in_namespace_of(pid) as sock:
        sock.sendto(header + body, (0, 0))
        answer = sock.recv(65536)
    length, kind, _, _, _ = _HEADER.unpack_from(answer)
    if kind == NLMSG_ERROR:
        number = -struct.unpack_from("=i", answer, _HEADER.size)[0]
        raise OSError(number or errno.EPROTO, f"{os.strerror(number)} (unix_diag, socket {inode})")
    return parse_unix_diag(answer[_HEADER.size : length])


def unix_backlog(inode: int, pid: int | None = None) -> int:
    """Clients that wait in the queue of a listening UNIX socket (of the network namespace of `pid`).

    Raises:
        FileNotFoundError: no such socket there, or no unix_diag. ProcessLookupError, PermissionError.
    """
    return unix_socket(inode, pid).queue
