"""Migration capabilities and parameters of one QEMU: switched for a handover, and put back. What is sent where is not
decided here.

Left on, `x-ignore-shared` would make somebody's later save succeed without the guest's RAM; so it is put back to what
it was on whichever QEMU lives on.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from cpr.errors import CommandFailed, CprError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from cpr.qemu.qmp import Event, Monitor

SWITCHED_ON = ("x-ignore-shared", "events", "return-path")
"""x-ignore-shared: QEMU 4.0. return-path: the source learns of a load that fails, and goes on by itself."""

STREAM: Mapping[str, int] = {"max-bandwidth": 10**12, "downtime-limit": 2000}
"""Bytes per second and milliseconds: the stream is small, and is to end in its first pass."""


ENDED = ("completed", "failed", "cancelled")
"""Of query-migrate and MIGRATION: nothing more will come of it."""

ONE_WAY = ("x-ignore-shared", "events")
"""For a state that is kept, and loaded from there: nobody answers its source."""


def prepare(monitor: Monitor, names: Collection[str] = SWITCHED_ON) -> None:
    """Switch on what is needed (`names`) and everything else off (multifd, xbzrle, ... of an earlier migration)."""
    known = {c["capability"]: c["state"] for c in monitor.execute("query-migrate-capabilities")}
    wanted = {name: name in names for name, state in known.items() if state or name in names}
    _set(monitor, {n: s for n, s in wanted.items() if known[n] != s})
    monitor.execute_arguments("migrate-set-parameters", dict(STREAM))


def restore(monitor: Monitor, before: Mapping[str, bool], parameters: Mapping[str, Any]) -> None:
    """Put back what the guest had before: capabilities, and the parameters of `STREAM`; x-ignore-shared is off.

    Raises:
        CommandFailed, MonitorError: x-ignore-shared is still on, and must not stay so.
    """
    known = {c["capability"]: c["state"] for c in monitor.execute("query-migrate-capabilities")}
    wanted = {n: before.get(n, False) for n in known if n in SWITCHED_ON or before.get(n, False)}
    _set(monitor, {**wanted, "x-ignore-shared": False})
    for name in STREAM:
        if name in parameters:
            with contextlib.suppress(CommandFailed):
                monitor.execute_arguments("migrate-set-parameters", {name: parameters[name]})


def _set(monitor: Monitor, states: Mapping[str, bool]) -> None:
    """Off before on: some exclude each other."""
    for wanted in (False, True):
        chosen = [{"capability": n, "state": s} for n, s in sorted(states.items()) if s is wanted]
        if chosen:
            monitor.execute("migrate-set-capabilities", capabilities=chosen)


def ended(event: Event) -> bool:
    """A MIGRATION event after which no other comes."""
    return event.data.get("status") in ENDED


def has_failed(events: Iterable[Event]) -> bool:
    """One of them says so."""
    return any(e.name == "MIGRATION" and e.data.get("status") == "failed" for e in events)


def failure(monitor: Monitor) -> str:
    """QEMU's own words about a migration that failed, or ""."""
    with contextlib.suppress(CprError):
        reply: Any = monitor.execute("query-migrate", timeout=2.0)
        return str(reply.get("error-desc", ""))
    return ""
