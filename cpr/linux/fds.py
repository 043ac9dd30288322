"""Descriptors that somebody owns: `Fd`, taking one out of another process, and what a process has open.

Bare numbers live here and nowhere else. What a descriptor is *for* is not known here.
"""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

SYS_PIDFD_GETFD = 438
_libc = ctypes.CDLL(None, use_errno=True)


class Fd:
    """Owns one descriptor; closes it when left, unless it was handed on with `steal`."""

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        self._number = number

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Fd({self._number})"

    @property
    def number(self) -> int:
        if self._number < 0:
            raise ValueError("the descriptor is closed")
        return self._number

    @property
    def closed(self) -> bool:
        return self._number < 0

    def fileno(self) -> int:
        return self.number

    def steal(self) -> int:
        """Give the number away; the caller owns it now."""
        number, self._number = self.number, -1
        return number

    def dup(self) -> Fd:
        """Another descriptor of the same open file, close-on-exec."""
        return Fd(os.dup(self.number))

    def close(self) -> None:
        """Safe to repeat."""
        if self._number >= 0:
            number, self._number = self._number, -1
            os.close(number)


def pidfd_getfd(pidfd: int, number: int) -> int:
    """pidfd_getfd(2), Linux 5.6: a duplicate of another process's descriptor, close-on-exec.

    Raises:
        OSError: EBADF no such descriptor, ESRCH the process is gone, EPERM no ptrace access.
    """
    result = _libc.syscall(SYS_PIDFD_GETFD, pidfd, number, 0)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return int(result)


def take_fd(pidfd: Fd | int, number: int) -> Fd:
    """A duplicate of descriptor `number` of the process behind a pidfd: the same open file description."""
    return Fd(pidfd_getfd(pidfd if isinstance(pidfd, int) else pidfd.number, number))


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenDescriptor:
    """One entry of /proc/PID/fd. `target` is the link's text: a path, socket:[INODE], anon_inode:[eventfd], ..."""

    number: int
    target: str
    device: int = 0
    inode: int = 0
    mode: int = 0
    """st_mode of what it leads to; 0 where it could not be asked."""
    rdev: int = 0
    flags: int = 0
    """open(2) flags, O_CLOEXEC included."""
    info: str = ""
    """The text of fdinfo."""

    @property
    def close_on_exec(self) -> bool:
        return bool(self.flags & os.O_CLOEXEC)

    @property
    def socket_inode(self) -> int:
        match = re.fullmatch(r"socket:\[(\d+)\]", self.target)
        return int(match[1]) if match else 0


def parse_fdinfo_flags(text: str) -> int:
    """The octal `flags:` line of an fdinfo file; 0 if there is none."""
    match = re.search(r"^flags:\s*([0-7]+)", text, re.MULTILINE)
    return int(match[1], 8) if match else 0


def descriptor_table(pid: int) -> tuple[OpenDescriptor, ...]:
    """Every descriptor of a process, by number. One that is closed meanwhile is left out.

    Raises:
        ProcessLookupError: the process is gone.
        PermissionError: it may not be looked into.
    """
    return tuple(sorted(_descriptors(pid), key=lambda d: d.number))


def _descriptors(pid: int) -> Iterator[OpenDescriptor]:
    base = f"/proc/{pid}/fd"
    try:
        names = os.listdir(base)
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None
    for name in names:
        try:
            target = os.readlink(f"{base}/{name}")
        except FileNotFoundError:
            continue
        try:
            status = os.stat(f"{base}/{name}")
            with open(f"/proc/{pid}/fdinfo/{name}") as file:
                info = file.read()
        except OSError:
            yield OpenDescriptor(number=int(name), target=target)
            continue
        yield OpenDescriptor(
            number=int(name),
            target=target,
            device=status.st_dev,
            inode=status.st_ino,
            mode=status.st_mode,
            rdev=status.st_rdev,
            flags=parse_fdinfo_flags(info),
            info=info,
        )
