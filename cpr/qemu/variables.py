"""Variables of a QEMU's environment that some QEMU, or an update, would act on: their names. Pure.

Anybody who starts a QEMU can plant them, and /proc/PID/environ never changes: what an update left is still there when
it means nothing any more. So none is acted on because it is there, and none is passed on.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

DROPPED = re.compile(
    r"^(CPR_FD_.*|CPR_RUN|CPR_RUN_PENDING|CPR_PIDFILE|CPR_QEMU_OPTIONS|CPR_NETDEVS|CPR_CONNECTIONS"
    r"|QEMU_FD_.*|QEMU_BOOL_.*|QEMU_CPR_.*|QEMU_ADDR_.*|QEMU_LEN_.*|QEMU_START_FREEZE)$",
    re.DOTALL,
)
"""Planted or left over: never acted on, never passed on."""

OURS = ("CPR_RUN", "CPR_PIDFILE", "CPR_QEMU_OPTIONS", "CPR_NETDEVS", "CPR_CONNECTIONS")
"""What an update leaves for the next one to read; only what was not put there by one is worth a note."""


_MARK = re.compile(r"\d{8}T\d{6}-[0-9a-f]{4}/\d+")
"""What an update leaves as CPR_RUN: its run and the pid that was updated."""


def foreign(environ: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Names of variables that are not passed on, and that were not left there by an update, once each, sorted."""
    found = {name: value for name, value in environ if DROPPED.match(name)}
    names = set(found)
    by_an_update = _MARK.fullmatch(found.get("CPR_RUN", ""))
    map_of_ours = {name for name in names if name.startswith("CPR_FD_")} if by_an_update else set()
    return tuple(sorted(names - set(OURS) - map_of_ours))
