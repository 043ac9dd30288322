"""Files that a restored guest depends on, as they were: its state, and its disks.

Out of scope: RAM (stamp.py).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpr.errors import CprError
from cpr.linux.appendfile import sync_directory

if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK = 1 << 20


class FileError(CprError):
    """A state file or an image cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFile:
    """What QEMU saved of a guest: the state of its devices, and its RAM where that does not stay in place."""

    path: str
    size: int
    sha256: str
    sparse: bool = False
    """Its SHA-256 is that of the chunks that are not all zeroes: a file with holes is not read whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk image or a block device, as far as it stays the same over a reboot while nobody writes."""

    path: str
    inode: int
    """0 for a block device."""
    size: int
    mtime_ns: int
    """0 for a block device: that of its node says nothing."""
    block: bool = False


def seal(path: str, *, sparse: bool = False, attend: Callable[[], None] = lambda: None) -> StateFile:
    """A state file that is complete: on disk with its name when this returns. `attend` is called now and then.

    Raises:
        FileError: it cannot be read, is empty (QEMU leaves an empty one when a save fails), or cannot be synced.
    """
    fd = _open(path)
    try:
        os.fsync(fd)
        attend()
        found = _sparse_sum(path, fd, attend) if sparse else _sum(path, fd)
        sync_directory(path)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from None
    finally:
        os.close(fd)
    if not found.size:
        raise FileError(f"{path} is empty: nothing was saved")
    return found


def state_differences(state: StateFile, attend: Callable[[], None] = lambda: None) -> tuple[str, ...]:
    """In what a state file is not the one that was sealed, in words; `attend` is called now and then.

    Raises:
        FileError: it cannot be read.
    """
    fd = _open(state.path)
    try:
        now = _sparse_sum(state.path, fd, attend) if state.sparse else _sum(state.path, fd)
    except OSError as error:
        raise FileError(f"{state.path}: {error.strerror}") from None
    finally:
        os.close(fd)
    if now.size != state.size:
        return (f"{state.path} had {state.size} bytes when it was saved, and has {now.size} now",)
    if now.sha256 != state.sha256:
        return (f"{state.path} was changed since it was saved (its SHA-256 differs)",)
    return ()


def _open(path: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileError(f"{path} is no regular file")
    return fd


def _sum(path: str, fd: int) -> StateFile:
    with open(fd, "rb", closefd=False) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return StateFile(path=path, size=file.tell(), sha256=digest)


def _sparse_sum(path: str, fd: int, attend: Callable[[], None]) -> StateFile:
    """Each chunk that is not all zeroes, behind its place: the same, whether zeroes are holes or written."""
    digest, zeroes = hashlib.sha256(), bytes(CHUNK)
    size, at = os.fstat(fd).st_size, 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA) // CHUNK * CHUNK
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing but a hole comes
                raise
            break
        chunk = os.pread(fd, CHUNK, at)
        if chunk != zeroes[: len(chunk)]:
            digest.update(at.to_bytes(8, "big"))
            digest.update(chunk)
        at += CHUNK
        attend()
    return StateFile(path=path, size=size, sha256=digest.hexdigest(), sparse=True)


def disk(path: str) -> Disk:
    """What `path` (links are followed) is now.

    To be taken when QEMU writes no more: once a migration completed, block devices are inactive (bdrv_inactivate_all).

    Raises:
        FileError: it is not there, or neither a file nor a block device.
    """
    try:
        status = os.stat(path)
        if stat.S_ISBLK(status.st_mode):
            return Disk(path=path, inode=0, size=_block_size(path), mtime_ns=0, block=True)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{path} is neither a file nor a block device")
    return Disk(path=path, inode=status.st_ino, size=status.st_size, mtime_ns=status.st_mtime_ns)


def _block_size(path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def disk_differences(then: Disk) -> tuple[str, ...]:
    """In what a disk is not the one that the guest was stopped with, in words: the guest's caches would not fit it."""
    try:
        now = disk(then.path)
    except FileError as error:
        return (error.message,)
    if now.block != then.block:
        return (f"{then.path} was {_kind(then)} when the guest was saved, and is {_kind(now)} now",)
    if now.inode != then.inode:
        return (f"{then.path} is another file than the guest was saved with",)
    if now.size != then.size:
        return (f"{then.path} had {then.size} bytes when the guest was saved, and has {now.size} now",)
    if now.mtime_ns != then.mtime_ns:
        return (f"{then.path} was written since the guest was saved",)
    return ()


def _kind(one: Disk) -> str:
    return "a block device" if one.block else "a file"
