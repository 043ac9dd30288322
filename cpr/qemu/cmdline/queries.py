"""Questions to a command line that need no subject of their own."""

from __future__ import annotations

from cpr.qemu.cmdline.argv import CommandLine
from cpr.qemu.cmdline.facts import (
    AddFd,
    Chardev,
    Device,
    Display,
    Drive,
    FdNumber,
    GdbStub,
    GuestMemory,
    Machine,
    MemoryBackend,
    Monitor,
    Netdev,
    QomObject,
    Settings,
)


def settings(cmdline: CommandLine) -> Settings:
    raise NotImplementedError


def machine(cmdline: CommandLine) -> Machine:
    raise NotImplementedError


def devices(cmdline: CommandLine) -> tuple[Device, ...]:
    raise NotImplementedError


def objects(cmdline: CommandLine) -> tuple[QomObject, ...]:
    raise NotImplementedError


def gdbstub(cmdline: CommandLine) -> GdbStub | None:
    raise NotImplementedError


def add_fds(cmdline: CommandLine) -> tuple[AddFd, ...]:
    raise NotImplementedError


def chardevs(cmdline: CommandLine) -> tuple[Chardev, ...]:
    raise NotImplementedError


def monitors(cmdline: CommandLine) -> tuple[Monitor, ...]:
    raise NotImplementedError


def memory_backends(cmdline: CommandLine) -> tuple[MemoryBackend, ...]:
    raise NotImplementedError


def guest_memory(cmdline: CommandLine) -> GuestMemory:
    raise NotImplementedError


def netdevs(cmdline: CommandLine) -> tuple[Netdev, ...]:
    raise NotImplementedError


def displays(cmdline: CommandLine) -> tuple[Display, ...]:
    raise NotImplementedError


def drives(cmdline: CommandLine) -> tuple[Drive, ...]:
    raise NotImplementedError


def fd_numbers(cmdline: CommandLine) -> tuple[FdNumber, ...]:
    raise NotImplementedError
