"""What a guest's process has besides after an exec: descriptors that it needed once, helpers of the old program."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cpr.engines import fdmap
from cpr.errors import CprError
from cpr.linux import proc
from cpr.linux.process import open_process
from cpr.linux.tracee import Call
from cpr.linux.tracer import Attach, Batch, Detach, Tracer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cpr.linux.process import Process


WNOHANG_ALL = os.WNOHANG | 0x40000000
"""__WALL as well: helpers of async teardown end without a signal (system/async-teardown.c)."""


def end_helpers(helpers: Iterable[int], parent: int) -> tuple[Call, ...]:
    """End helper processes of the old program, which hold its memory; calls by which `parent` reaps them."""
    return tuple(Call("wait4", (pid, 0, WNOHANG_ALL, 0)) for pid in helpers if _end_helper(pid, parent))


def _end_helper(pid: int, parent: int) -> bool:
    """Whether it was one, and is to be reaped."""
    try:
        if proc.parent_of(pid) != parent:
            return False
        with open_process(pid) as helper:
            helper.kill()
            return helper.wait_dead(1.0)
    except OSError:
        return False


def close_left(process: Process, known: Sequence[Sequence[int]], helpers: Iterable[int] = ()) -> list[str]:
    """Close in the process what it needed once, (number, inode) of each, and end helpers of the old program. What could
    not be done, in words.
    """
    entries = {str(number): fdmap.Entry(int(number), int(inode)) for number, inode in known}
    try:
        numbers = set(fdmap.verify(process.pid, fdmap.FdMap(entries=entries)).good.values())
    except OSError:  # it has ended
        return []
    calls = (*(Call("close", (number,)) for number in numbers), *end_helpers(helpers, process.pid))
    if not calls:
        return []
    try:
        with Tracer.start(process) as tracer:
            tracer.run(Attach(), Batch(calls), Detach())
    except (CprError, OSError) as error:
        stays = f"descriptors {', '.join(map(str, sorted(numbers)))} stay open" if numbers else "ended helpers stay"
        return [f"{stays}: {error}"]
    return []
