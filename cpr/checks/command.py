"""The guest's command line as the checks see it: parsed once, with every -readconfig file written out.

Files are not read here: their text is a fact of the guest (`Guest.config_files`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cpr.qemu.cmdline import CommandLine, CommandLineError
from cpr.qemu.readconfig import inline_readconfig

if TYPE_CHECKING:
    from cpr.model import Guest


def command_of(guest: Guest) -> CommandLine | None:
    """The parsed command line; None where it cannot be read (then `command-line` speaks)."""
    try:
        return parse(guest)
    except CommandLineError:
        return None


def parse(guest: Guest) -> CommandLine:
    """Raises `CommandLineError`: an option that no QEMU has, or a configuration file that is gone."""
    command = CommandLine.parse(guest.argv)
    if not command.has("readconfig"):
        return command
    texts = dict(guest.config_files)

    def read(path: str) -> str:
        if path not in texts:
            raise CommandLineError(f"-readconfig {path}: the file cannot be read any more")
        return texts[path]

    return inline_readconfig(command, read)


def absolute(path: str, cwd: str) -> str:
    """`path` as the guest's process resolves it; the file itself is not looked at."""
    return os.path.normpath(os.path.join(cwd, path))
