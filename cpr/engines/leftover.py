"""Closing in a guest's process what it needed once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpr.engines import fdmap
from cpr.errors import CprError
from cpr.linux.tracee import Call
from cpr.linux.tracer import Attach, Batch, Detach, Tracer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cpr.linux.process import Process


def close_left(process: Process, known: Sequence[Sequence[int]]) -> list[str]:
    """Close in the process what it needed once: (number, inode) of each. What could not be done, in words."""
    entries = {str(number): fdmap.Entry(int(number), int(inode)) for number, inode in known}
    try:
        numbers = set(fdmap.verify(process.pid, fdmap.FdMap(entries=entries)).good.values())
    except OSError:  # it has ended
        return []
    if not numbers:
        return []
    try:
        with Tracer.start(process) as tracer:
            tracer.run(Attach(), Batch(tuple(Call("close", (number,)) for number in numbers)), Detach())
    except (CprError, OSError) as error:
        return [f"descriptors {', '.join(map(str, numbers))} stay open: {error}"]
    return []
