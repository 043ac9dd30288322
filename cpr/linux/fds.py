"""Owned file descriptors, descriptors of other processes, and the table of what a process has open.

Out of scope: what a descriptor means to its program.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from typing import Self

from cpr.linux import procfile
from cpr.linux.syscalls import pidfd_getfd


class Fd:
    """Owns one descriptor: closed by `close`, at the end of a `with`, or with the object; `steal` hands it on."""

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        self._number = number

    @property
    def number(self) -> int:
        """The number. Raises ValueError once closed or handed on."""
        if self._number < 0:
            raise ValueError("the descriptor is closed or was handed on")
        return self._number

    @property
    def closed(self) -> bool:
        return self._number < 0

    def fileno(self) -> int:
        return self.number

    def steal(self) -> int:
        """The number; from now on the caller owns it."""
        number = self.number
        self._number = -1
        return number

    def dup(self) -> Fd:
        """A second descriptor (close-on-exec) of the same open file description."""
        return Fd(fcntl.fcntl(self.number, fcntl.F_DUPFD_CLOEXEC, 0))

    def close(self) -> None:
        """Close it, once; afterwards a no-op."""
        number, self._number = self._number, -1
        if number >= 0:
            os.close(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_number", -1) >= 0:
            try:
                self.close()
            except OSError:
                pass

    def __repr__(self) -> str:
        return f"Fd({self._number})"


class FdSet:
    """Owns several descriptors by name; all are closed at the end of a `with`."""

    def __init__(self) -> None:
        self._fds: dict[str, Fd] = {}

    def add(self, name: str, fd: Fd) -> Fd:
        """Take it over. Raises KeyError (and closes it) where the name is taken."""
        if name in self._fds:
            fd.close()
            raise KeyError(name)
        self._fds[name] = fd
        return fd

    def __getitem__(self, name: str) -> Fd:
        return self._fds[name]

    def __contains__(self, name: object) -> bool:
        return name in self._fds

    def __len__(self) -> int:
        return len(self._fds)

    def names(self) -> tuple[str, ...]:
        return tuple(self._fds)

    def steal(self, name: str) -> Fd:
        """Hand one out; the set does not own it any more."""
        return self._fds.pop(name)

    def close(self) -> None:
        while self._fds:
            self._fds.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenDescriptor:
    """One row of a process's descriptor table."""

    number: int
    target: str
    """What /proc/PID/fd/N leads to: '/path', 'socket:[123]', 'anon_inode:[eventfd]', '/memfd:x (deleted)'."""
    device: int
    """st_dev."""
    inode: int
    mode: int
    """st_mode."""
    position: int
    flags: int
    """Open flags (O_RDWR, O_APPEND, ...), O_CLOEXEC included."""
    mount_id: int
    extra: tuple[tuple[str, str], ...] = ()
    """The other lines of fdinfo, e.g. ("eventfd-count", "0"), ("iff", "tap0"), ("tfd", ...); names may repeat."""

    @property
    def close_on_exec(self) -> bool:
        return bool(self.flags & os.O_CLOEXEC)


@dataclass(frozen=True, slots=True, kw_only=True)
class FdInfo:
    """/proc/PID/fdinfo/N: offset in bytes, open flags, mount id, and what the kind of file adds."""

    position: int
    flags: int
    mount_id: int
    extra: tuple[tuple[str, str], ...]


def parse_fdinfo(text: str) -> FdInfo:
    """Parse /proc/PID/fdinfo/N. Raises ValueError where `flags` is missing or no number."""
    values: dict[str, str] = {}
    extra: list[tuple[str, str]] = []
    for line in text.splitlines():
        key, _, value = line.partition(":")
        key, value = key.strip(), value.strip()
        if key in ("pos", "flags", "mnt_id") and key not in values:
            values[key] = value
        elif key and key != "ino":
            extra.append((key, value))
    if "flags" not in values:
        raise ValueError(f"no flags in fdinfo: {text[:80]!r}")
    return FdInfo(
        position=int(values.get("pos", "0")),
        flags=int(values["flags"], 8),
        mount_id=int(values.get("mnt_id", "0")),
        extra=tuple(extra),
    )


def take_fd(process: Fd | int, number: int) -> Fd:
    """Descriptor `number` of another process, duplicated into ours: same open file description (pidfd_getfd, 5.6).

    `process` is a pidfd as `Fd`, or a pid as int. The duplicate is close-on-exec.

    Raises:
        ProcessLookupError: it is gone. PermissionError: no PTRACE_MODE_ATTACH. OSError(EBADF): no such descriptor.
    """
    if isinstance(process, Fd):
        return Fd(pidfd_getfd(process.number, number))
    with open_pidfd(process) as pidfd:
        return Fd(pidfd_getfd(pidfd.number, number))


def open_pidfd(pid: int) -> Fd:
    """A pidfd. Raises ProcessLookupError."""
    return Fd(os.pidfd_open(pid))


def memory_file(name: str, size: int, *, page: int = 0) -> Fd:
    """A memory file (memfd_create(2)) of `size` bytes, close-on-exec.

    `page`: 0 for ordinary pages, the size of huge ones in bytes, -1 for the default huge ones. OSError.
    """
    flags = os.MFD_CLOEXEC
    if page:
        flags |= os.MFD_HUGETLB
        flags |= (page.bit_length() - 1) << os.MFD_HUGE_SHIFT if page > 0 else 0
    made = Fd(os.memfd_create(name, flags))
    try:
        os.ftruncate(made.number, size)
    except OSError:
        made.close()
        raise
    return made


def closes_on_exec(pid: int, number: int) -> bool:
    """FD_CLOEXEC of a descriptor of another process. Raises FileNotFoundError, ProcessLookupError, PermissionError."""
    return bool(parse_fdinfo(procfile.read_text(pid, f"fdinfo/{number}")).flags & os.O_CLOEXEC)


def descriptor_table(pid: int) -> tuple[OpenDescriptor, ...]:
    """All descriptors of a process, by number; those closed while we read are left out.

    Raises:
        ProcessLookupError, PermissionError.
    """
    with procfile.vanishing(pid):
        numbers = sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
    rows = []
    for number in numbers:
        try:
            target = procfile.read_link(pid, f"fd/{number}")
            status = procfile.stat(pid, f"fd/{number}")
            info = parse_fdinfo(procfile.read_text(pid, f"fdinfo/{number}"))
        except FileNotFoundError:
            continue
        rows.append(
            OpenDescriptor(
                number=number,
                target=target,
                device=status.st_dev,
                inode=status.st_ino,
                mode=status.st_mode,
                position=info.position,
                flags=info.flags,
                mount_id=info.mount_id,
                extra=info.extra,
            )
        )
    return tuple(rows)
