"""Legacy chardev options rewritten so that every chardev of the guest has its QMP label in argv."""

from __future__ import annotations

from cpr.qemu.cmdline.argv import CommandLine


def normalise_chardevs(cmdline: CommandLine) -> CommandLine:
    """-serial, -parallel, -debugcon, -monitor, -qmp given as -chardev with exactly the labels QEMU gives them.

    Idempotent; order and numbering of devices stay. Defaults that QEMU adds by itself stay implicit.
    """
    raise NotImplementedError


def implicit_chardevs(cmdline: CommandLine) -> tuple[str, ...]:
    """Labels QEMU will make up by itself (`serial0`, `parallel0`, `compat_monitor0`), where the machine has the port."""
    raise NotImplementedError
