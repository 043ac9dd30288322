"""Edits: CommandLine -> CommandLine, each doing one thing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from cpr.qemu.cmdline.argv import CommandLine
from cpr.qemu.cmdline.facts import Hostfwd, Vnc


def with_program(cmdline: CommandLine, path: str) -> CommandLine:
    raise NotImplementedError


def with_machine_type(cmdline: CommandLine, machine_type: str) -> CommandLine:
    raise NotImplementedError


def without(cmdline: CommandLine, names: Iterable[str]) -> CommandLine:
    raise NotImplementedError


def for_incoming(cmdline: CommandLine) -> CommandLine:
    raise NotImplementedError


def append_options(cmdline: CommandLine, extra: Sequence[str]) -> CommandLine:
    raise NotImplementedError


def remove_appended(cmdline: CommandLine, extra: Sequence[str]) -> CommandLine:
    raise NotImplementedError


def with_memory_backend_fd(cmdline: CommandLine, backend_id: str, fd: int) -> CommandLine:
    raise NotImplementedError


def with_chardev_fd(
    cmdline: CommandLine, label: str, fd: int, *, server: bool, wait: bool = False
) -> CommandLine:
    raise NotImplementedError


def with_chardev_null(cmdline: CommandLine, label: str) -> CommandLine:
    raise NotImplementedError


def with_log_append(cmdline: CommandLine) -> CommandLine:
    raise NotImplementedError


def with_netdev_fds(
    cmdline: CommandLine, which: str | int, fds: Sequence[int], vhostfds: Sequence[int] = ()
) -> CommandLine:
    """`which`: the netdev's id, or the index of its option."""
    raise NotImplementedError


def without_hostfwd(cmdline: CommandLine) -> tuple[CommandLine, tuple[Hostfwd, ...]]:
    raise NotImplementedError


def with_netdev_null(cmdline: CommandLine, which: str | int) -> CommandLine:
    raise NotImplementedError


def with_vnc_detached(cmdline: CommandLine) -> tuple[CommandLine, tuple[Vnc, ...]]:
    raise NotImplementedError


def without_gdb(cmdline: CommandLine) -> tuple[CommandLine, str | None]:
    raise NotImplementedError


def with_fd_number(cmdline: CommandLine, old: int, new: int) -> CommandLine:
    raise NotImplementedError


def for_rehearsal(cmdline: CommandLine, *, monitor_fd: int, disk_sizes: Mapping[str, int]) -> CommandLine:
    """`disk_sizes`: true sizes in bytes by drive id or node name."""
    raise NotImplementedError
