"""Compare a guest before and after: what must be the same and is not, in words.

`compare` is pure; `after_update` surveys the guest in its new QEMU first.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from cpr.checks.migration import IGNORE_SHARED
from cpr.errors import CprError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.model import Guest
    from cpr.qemu.qmp import Monitor

RAISED = frozenset({"RLIMIT_NOFILE"})
"""Soft limits that a QEMU raises to the hard limit when it starts (os_setup_limits in os-posix.c, since 9.0)."""

SAME: dict[str, Callable[[Guest], object]] = {
    "name": lambda g: g.name,
    "uuid": lambda g: g.uuid,
    "machine type": lambda g: g.machine,
    "accelerator": lambda g: g.accelerator,
    "RAM": lambda g: sorted((b.id, b.size, b.shared, b.inode) for b in g.ram),
    "devices": lambda g: sorted((d.id, d.type) for d in g.devices if not d.anonymous),
    "number of devices without an id": lambda g: sorted(d.type for d in g.devices if d.anonymous),
    "disks": lambda g: sorted((c.drive or c.device, c.files, c.read_only) for c in g.chains),
    "throttling": lambda g: sorted((c.drive or c.device, c.throttle) for c in g.chains),
    "chardevs": lambda g: sorted(c.label for c in g.chardevs if c.label != "cpr-control"),
    "network backends": lambda g: sorted((n.id, n.type, n.ifname, len(n.fds)) for n in g.netdevs),
    "SPICE": lambda g: g.spice,
    "VNC": lambda g: sorted((v.id, [(*w[:3], w.websocket) for w in v.listeners]) for v in g.vnc),
    "generation id": lambda g: g.generation_id,
    "vCPUs": lambda g: sorted(v.index for v in g.vcpus),
    "user": lambda g: g.uid,
    "namespaces": lambda g: sorted(g.namespaces),
    "cgroups": lambda g: sorted(g.cgroups),
    "limits": lambda g: sorted((name, limit[1:] if name in RAISED else limit) for name, limit in g.limits.items()),
    "working directory": lambda g: g.cwd,
    # x-ignore-shared is always off after an update: somebody's later save would leave the RAM out
    "migration capabilities": lambda g: sorted(name for name, on in g.capabilities if on and name != IGNORE_SHARED),
    "pid file": lambda g: g.pidfile,
}


def compare(before: Guest, after: Guest) -> list[str]:
    """What differs, one line each; empty if nothing does."""
    lines = []
    for what, facts in SAME.items():
        was, is_now = facts(before), facts(after)
        if was != is_now:
            lines.append(f"{what}: was {was}, is {is_now}")
    if before.running and after.runstate != before.runstate:
        lines.append(f"runstate: was {before.runstate}, is {after.runstate}")
    return lines


def after_update(before: Guest, pid: int, monitor: Monitor) -> list[str]:
    """Survey the guest in its new QEMU and compare. A survey that fails is itself a difference."""
    from cpr import discover, survey  # here, as survey reads what this module compares

    with contextlib.suppress(StopIteration):
        candidate = next(c for c in discover.candidates() if c.process.pid == pid)
        try:
            return compare(before, survey.survey(candidate, monitor))
        except CprError as error:
            return [f"could not be surveyed: {error.message}"]
    return [f"pid {pid} is not found among the guests"]
