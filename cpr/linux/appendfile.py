"""A file that is only appended to, its space allocated in advance: a full disk is met at the start, not in the middle.

What the records mean is not known here; they are lines.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class AppendFile:
    """Created anew, mode 0600. Raises OSError (EEXIST, ENOSPC, EROFS, ...)."""

    def __init__(self, path: str, size: int, *, sync: bool = False) -> None:
        self.path = path
        self._sync = sync
        self._step = size
        self._end = 0
        self._allocated = 0
        self._number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            self._grow(size)
            if sync:
                os.fsync(self._number)
                sync_directory(os.path.dirname(path))
        except BaseException:
            os.close(self._number)
            os.unlink(path)
            raise

    def _grow(self, size: int) -> None:
        os.posix_fallocate(self._number, 0, size)
        self._allocated = size

    def append(self, data: bytes) -> None:
        """Write at the end; allocated space is used first."""
        if self._end + len(data) > self._allocated:
            self._grow(self._end + len(data) + self._step)
        position = self._end
        while position < self._end + len(data):
            written = os.pwrite(self._number, data[position - self._end :], position)
            if written <= 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            position += written
        self._end = position
        if self._sync:
            os.fdatasync(self._number)

    def close(self) -> None:
        """Give back what was not used. Safe to repeat."""
        if self._number >= 0:
            number, self._number = self._number, -1
            try:
                os.ftruncate(number, self._end)
            finally:
                os.close(number)


def sync_directory(path: str) -> None:
    """fsync a directory, so that a file's name in it survives a crash."""
    number = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def read_records(path: str) -> Iterator[bytes]:
    """Its lines, without the allocated rest and without a last line that was cut."""
    with open(path, "rb") as file:
        text = file.read().split(b"\0", 1)[0]
    *lines, _cut = text.split(b"\n")
    yield from lines
