"""A file for records that is allocated in advance: a full disk is met when it is made, not when it matters.

A record is a line. Behind the last one the allocated rest is zeroes, and after a crash the last line may be cut:
readers stop there.

Out of scope: what the records say.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Self

MAX_BYTES = 16 << 20
"""Of a file that is read: ours are a thousand times smaller."""


class AppendFile:
    """Created 0600, O_EXCL, with `size` bytes allocated (zeroes); records are written one after the other.

    `sync`: every record is on disk before `append` returns, and the file's name when it has been made.

    Raises:
        FileExistsError; OSError(ENOSPC): no room, nothing is left behind.
    """

    def __init__(self, path: str, size: int, *, sync: bool = False) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self.path = path
        self._fd = os.open(path, flags, 0o600)
        self._size = size
        self._end = 0
        self._allocated = 0
        self._sync = sync
        try:
            self._allocate(size)
            if sync:
                self.sync()
        except BaseException:
            self.close()
            os.unlink(path)
            raise

    @classmethod
    def resume(cls, path: str, *, size: int = 4096, sync: bool = False) -> Self:
        """Go on behind the last whole record of an existing file; a cut one is overwritten. OSError."""
        self = cls.__new__(cls)
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            data = _read_all(self._fd)
            self._end = _whole(data)
            self._allocated = len(data)
            self._size = size
            self._sync = sync
            if data[self._end :].strip(b"\0"):
                os.ftruncate(self._fd, self._end)
                self._allocated = self._end
        except BaseException:
            os.close(self._fd)
            raise
        return self

    def append(self, data: bytes) -> None:
        """Write a record, its newline included, at the end. OSError: what was there before is still whole."""
        if self._end + len(data) > self._allocated:
            self._allocate(max(self._size, len(data)))
        written = 0
        while written < len(data):
            written += os.pwrite(self._fd, data[written:], self._end + written)
        if self._sync:
            os.fdatasync(self._fd)
        self._end += len(data)

    def sync(self) -> None:
        """The data and the file's name are on disk when this returns."""
        os.fsync(self._fd)
        sync_directory(self.path)

    def trim(self) -> None:
        """Give back what was allocated and not written: nothing more is going to be. OSError."""
        os.ftruncate(self._fd, self._end)
        self._allocated = self._end

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _allocate(self, more: int) -> None:
        if more > 0:
            os.posix_fallocate(self._fd, self._end, more)
            self._allocated = max(self._allocated, self._end + more)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_all(fd: int) -> bytes:
    with open(fd, "rb", closefd=False) as file:
        return file.read()


def _whole(data: bytes) -> int:
    """Length of the whole lines at the beginning."""
    zero = data.find(b"\0")
    return data.rfind(b"\n", 0, zero if zero >= 0 else len(data)) + 1


def read_records(path: str) -> list[bytes]:
    """The whole lines, without their newlines: neither the unused zeroes behind them nor a line cut by a crash.

    Raises:
        OSError: also where it is no regular file, or too large to be one of ours.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
    return data[: _whole(data)].split(b"\n")[:-1]


def sync_directory(path: str) -> None:
    """fsync the directory that `path` stands in: a new name, or a renamed file, is on disk then."""
    fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
