"""Ptys of a guest's chardevs: which descriptor of the process is the master of which.

QEMU names a pty by the number that it got when it made it (`pty:/dev/pts/3`), and goes on doing so when another master
was put in the place of that one, as an update in place does. So where a name leads nowhere, what is left over on either
side must be one and one.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

from cpr.errors import StepFailed
from cpr.linux import fds
from cpr.linux.syscalls import pty_number
from cpr.linux.tracee import Call
from cpr.linux.tracer import Attach, Batch, Detach, Tracer
from cpr.qemu.chardevs import pty_numbers
from cpr.qemu.clients import descriptor_targets

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from cpr.linux.process import Process
    from cpr.model import Chardev
    from cpr.qemu.qmp import Monitor


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


def places(process: Process, monitor: Monitor, kept: Mapping[str, int]) -> dict[str, int]:
    """{chardev: descriptor of the master that QEMU has made}, where `kept` are those to have their places.

    Raises:
        StepFailed: one has made none, or they cannot be told apart. OSError.
    """
    called = ((e["label"], re.match(r"pty:/dev/pts/(\d+)$", e["filename"])) for e in monitor.execute("query-chardev"))
    names = {label: int(match[1]) if match else -1 for label, match in called if label in kept}
    made = of_chardevs(names, masters(process, besides=kept.values()))
    if lacking := kept.keys() - made.keys():
        raise StepFailed("find the ptys", f"{', '.join(sorted(lacking))}: the new QEMU has made no pty")
    return made


def give_back(process: Process, monitor: Monitor, kept: Mapping[str, int]) -> None:
    """Put masters that a process has besides in the places of those that its QEMU has made. Raises as `places`, and
    what a tracer raises.
    """
    made = places(process, monitor, kept)
    calls = [call for label, number in kept.items() for call in put(number, made[label])]
    if calls:
        with Tracer.start(process) as tracer:
            tracer.run(Attach(), Batch(tuple(calls)), Detach())


def put(number: int, place: int) -> tuple[Call, Call]:
    """A kept descriptor gets the place of another one."""
    return Call("dup3", (number, place, os.O_CLOEXEC)), Call("close", (number,))
