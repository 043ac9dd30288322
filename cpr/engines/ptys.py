"""Ptys of a guest's chardevs: which descriptor of the process is the master of which.

QEMU names a pty by the number that it got when it made it (`pty:/dev/pts/3`), and goes on doing so when another master
was put in the place of that one, as an update in place does. So where a name leads nowhere, what is left over on either
side must be one and one.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from cpr.errors import StepFailed
from cpr.linux import fds
from cpr.linux.syscalls import pty_number
from cpr.qemu.chardevs import pty_numbers
from cpr.qemu.clients import descriptor_targets

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from cpr.linux.process import Process
    from cpr.model import Chardev


def named(chardevs: Iterable[Chardev]) -> dict[str, int]:
    """{chardev: N as QEMU names its pty}, of those that its command line gives."""
    there = {c.label for c in chardevs if c.in_argv and c.backend == "pty"}
    return {label: number for number, label in pty_numbers(chardevs).items() if label in there}


def masters(process: Process, *, besides: Collection[int] = ()) -> dict[int, int]:
    """{N of /dev/pts/N: descriptor of its master in the process}, but for the descriptors `besides`. Raises OSError."""
    found = {}
    for number, target in descriptor_targets(process.pid).items():
        if target.endswith("/ptmx") and number not in besides:
            with contextlib.suppress(OSError), fds.take_fd(process.pidfd, number) as master:
                found[pty_number(master.number)] = number
    return found


def of_chardevs(names: Mapping[str, int], there: Mapping[int, int]) -> dict[str, int]:
    """{chardev: descriptor}, from {chardev: N as QEMU names it} and `masters`.

    Raises:
        StepFailed: they cannot be told apart.
    """
    found = {label: there[number] for label, number in names.items() if number in there}
    nameless = [label for label in names if label not in found]
    left = [descriptor for number, descriptor in there.items() if number not in names.values()]
    if not nameless:
        return found
    if len(nameless) != 1 or len(left) != 1:
        raise StepFailed(
            "find the ptys", f"which of {len(left)} ptys are those of {', '.join(nameless)} cannot be told"
        )
    return {**found, nameless[0]: left[0]}
