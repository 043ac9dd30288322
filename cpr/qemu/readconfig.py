"""-readconfig FILE written out as ordinary options."""

from __future__ import annotations

from collections.abc import Callable

from cpr.qemu.cmdline.argv import CommandLine


def inline_readconfig(cmdline: CommandLine, read: Callable[[str], str]) -> CommandLine:
    """`read(path)` gives the text of a configuration file."""
    raise NotImplementedError
