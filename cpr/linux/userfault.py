"""ioctl_userfaultfd(2): hearing of pages of memory that are touched and not there, and providing them.

Out of scope: whose memory it is; the descriptor is that process's own (syscalls.userfaultfd).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct

_API = 0xAA
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_WAKE = 0x8010AA02
_UFFDIO_COPY = 0xC028AA03
_MODE_MISSING = 1
_EVENT_PAGEFAULT = 0x12
_MESSAGE_BYTES = 32
_ADDRESS = struct.Struct("=16xQ8x")
PAGE = mmap.PAGESIZE


def enable(fd: int) -> None:
    """Once, before all else. OSError."""
    fcntl.ioctl(fd, _UFFDIO_API, struct.pack("=QQQ", _API, 0, 0))


def watch(fd: int, start: int, size: int) -> None:
    """Hear of what is touched in these addresses and is not there. OSError."""
    fcntl.ioctl(fd, _UFFDIO_REGISTER, struct.pack("=QQQQ", start, size, _MODE_MISSING, 0))


def faults(fd: int) -> list[int]:
    """Addresses of the pages that somebody waits for; of a descriptor that does not block. OSError."""
    with contextlib.suppress(BlockingIOError):
        data = os.read(fd, 64 * _MESSAGE_BYTES)
        messages = (data[at : at + _MESSAGE_BYTES] for at in range(0, len(data), _MESSAGE_BYTES))
        return [_ADDRESS.unpack(m)[0] & -PAGE for m in messages if m[0] == _EVENT_PAGEFAULT]
    return []


def provide(fd: int, address: int, page: ctypes.Array[ctypes.c_char]) -> None:
    """Have a page be there, and wake who waits for it. One that is there already stays as it is.

    Raises:
        ProcessLookupError: the process has ended. OSError.
    """
    request = struct.pack("=QQQQq", address, ctypes.addressof(page), PAGE, 0, 0)
    while True:
        try:
            fcntl.ioctl(fd, _UFFDIO_COPY, request)
        except OSError as error:
            if error.errno == errno.EAGAIN:  # its mappings are just changing
                continue
            if error.errno != errno.EEXIST:
                raise
            fcntl.ioctl(fd, _UFFDIO_WAKE, struct.pack("=QQ", address, PAGE))
        return
