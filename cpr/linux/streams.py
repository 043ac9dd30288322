"""Stream sockets whose bytes are looked at before they are taken, with the descriptors that travel among them.

The kernel hands the descriptors over with the first byte of the write that they were sent with (net/unix/af_unix.c,
unix_stream_read_generic), but does not say which byte of what was read that is. Looking does not tell it either: with
MSG_PEEK it goes on to the next write when there is no room left. So it is found by reading byte by byte.

All sockets here may be shared with another process: their flags are left alone, no call waits.

Out of scope: what the bytes mean.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import struct
from collections import deque
from dataclasses import dataclass

SIOCINQ = 0x541B
SIOCOUTQ = 0x5411
SCM_MAX_FD = 253
LIMIT = 65536

_ROOM = socket.CMSG_SPACE(SCM_MAX_FD * array.array("i").itemsize)
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
_TAKE = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC


@dataclass(frozen=True, slots=True)
class Unread:
    """What waits in a socket, up to the end of the first write that carries descriptors."""

    data: bytes = b""
    carries: bool = False
    """There are descriptors among it."""


def look(sock: socket.socket, limit: int = LIMIT) -> Unread:
    """What waits to be read; nothing is taken.

    Raises:
        EOFError: nothing does, and the other side is gone. OSError.
    """
    try:
        data, carries = _peek(sock, limit)
    except BlockingIOError:
        return Unread()
    except ConnectionResetError:
        raise EOFError from None
    if not data:
        raise EOFError
    return Unread(data, carries)


def _peek(sock: socket.socket, limit: int) -> tuple[bytes, bool]:
    data, ancillary, _, _ = sock.recvmsg(limit, _ROOM, _PEEK)
    numbers = _numbers(ancillary)
    for number in numbers:
        os.close(number)
    return data, bool(numbers)


def _numbers(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) // found.itemsize * found.itemsize])
    return list(found)


def take(sock: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """Take that many bytes, fewer where a write with descriptors ends before, and its descriptors, which are the
    caller's. Raises OSError; EOFError: the other side is gone."""
    data, ancillary, _, _ = sock.recvmsg(size, _ROOM, _TAKE)
    if not data and size:
        raise EOFError
    return data, _numbers(ancillary)


def take_marked(sock: socket.socket, size: int) -> tuple[int, list[int]]:
    """Take bytes that were looked at, and say which of them brought descriptors. Raises as `take`."""
    for at in range(size):
        _, descriptors = take(sock, 1)
        if descriptors:
            take_all(sock, size - at - 1)
            return at, descriptors
    return size, []


def take_all(sock: socket.socket, size: int) -> list[int]:
    """Take bytes that were looked at; the descriptors that came with them. Raises as `take`."""
    found: list[int] = []
    while size:
        data, descriptors = take(sock, size)
        size -= len(data)
        found += descriptors
    return found


def unread(sock: socket.socket) -> int:
    """Bytes that wait in it."""
    return int(struct.unpack("=i", fcntl.ioctl(sock.fileno(), SIOCINQ, bytes(4)))[0])


def unsent(sock: socket.socket) -> int:
    """0 where the other side of a UNIX socket has read everything; else what that takes of the kernel's memory."""
    return int(struct.unpack("=i", fcntl.ioctl(sock.fileno(), SIOCOUTQ, bytes(4)))[0])


class Outgoing:
    """What is to be written to a socket, in order, as fast as the other side reads it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._waiting: deque[tuple[memoryview, list[int]]] = deque()
        self.size = 0
        """Bytes that wait here."""
        self.broken = False
        """The other side is gone; what is written goes nowhere."""

    def put(self, data: bytes, descriptors: list[int] | None = None) -> None:
        """Have it written; descriptors go with its first byte, and are closed here."""
        self._waiting.append((memoryview(data), descriptors or []))
        self.size += len(data)

    def flush(self) -> bool:
        """Write what can be written now. Whether anything was."""
        before = self.size
        while self._waiting:
            data, descriptors = self._waiting[0]
            try:
                done = self._send(data, descriptors)
            except BlockingIOError:
                break
            except OSError:
                self.broken = True
                self.close()
                break
            self._waiting.popleft()
            _close(descriptors)
            if done < len(data):
                self._waiting.appendleft((data[done:], []))
            self.size -= done
        return self.size != before

    def _send(self, data: memoryview, descriptors: list[int]) -> int:
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        if not descriptors:
            return self._sock.send(data, flags)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        return self._sock.sendmsg([data], [rights], flags)

    def close(self) -> None:
        """Drop what waits. The socket is not touched."""
        while self._waiting:
            _close(self._waiting.popleft()[1])
        self.size = 0


def _close(descriptors: list[int]) -> None:
    for number in descriptors:
        with contextlib.suppress(OSError):
            os.close(number)
