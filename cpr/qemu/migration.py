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

WITH_RAM = ("events",)
"""As `ONE_WAY`, with all of the RAM in the state, shared or not."""

MAPPED = ("mapped-ram", "multifd")
"""RAM at places of its own in a file, where several threads write and read it (QEMU 9.0)."""

CHANNELS = "multifd-channels"
PARAMETERS = (*STREAM, CHANNELS)
"""All that is set here."""

FILE = "cpr-state"
"""By this word a file of ours is known among the descriptors that a QEMU was given."""


def prepare(monitor: Monitor, names: Collection[str] = SWITCHED_ON, *, channels: int = 0) -> None:
    """Switch on what is needed (`names`) and everything else off (multifd, xbzrle, ... of an earlier migration).

    `channels`: threads of multifd; 0: as it is.
    """
    known = {c["capability"]: c["state"] for c in monitor.execute("query-migrate-capabilities")}
    wanted = {name: name in names for name, state in known.items() if state or name in names}
    _set(monitor, {n: s for n, s in wanted.items() if known[n] != s})
    monitor.execute_arguments("migrate-set-parameters", {**STREAM, **({CHANNELS: channels} if channels else {})})


def lacking(monitor: Monitor, names: Collection[str]) -> tuple[str, ...]:
    """Those of the capabilities that this QEMU does not have."""
    known = {c["capability"] for c in monitor.execute("query-migrate-capabilities")}
    return tuple(name for name in names if name not in known)


def restore(monitor: Monitor, before: Mapping[str, bool], parameters: Mapping[str, Any]) -> None:
    """Put back what the guest had before: capabilities, and the parameters that are set here; x-ignore-shared is off.

    Raises:
        CommandFailed, MonitorError: x-ignore-shared is still on, and must not stay so.
    """
    known = {c["capability"]: c["state"] for c in monitor.execute("query-migrate-capabilities")}
    ours = {*SWITCHED_ON, *(name for name in MAPPED if known.get(name))}
    wanted = {n: before.get(n, False) for n in known if n in ours or before.get(n, False)}
    _set(monitor, {**wanted, "x-ignore-shared": False})
    for name in PARAMETERS:
        if name in parameters and (name != CHANNELS or ours & set(MAPPED)):
            with contextlib.suppress(CommandFailed):
                monitor.execute_arguments("migrate-set-parameters", {name: parameters[name]})


def _set(monitor: Monitor, states: Mapping[str, bool]) -> None:
    """Off before on: some exclude each other."""
    for wanted in (False, True):
        chosen = [{"capability": n, "state": s} for n, s in sorted(states.items()) if s is wanted]
        if chosen:
            monitor.execute("migrate-set-capabilities", capabilities=chosen)


def file_uri(monitor: Monitor, number: int) -> str:
    """Hand the descriptor of a file to a QEMU: the URI by which its state goes there, or comes from there (8.2).

    As a set of descriptors, for every thread opens it anew, and QEMU may not be allowed to by its path.
    """
    return f"file:/dev/fdset/{monitor.add_fd(FILE, number)}"


def close_file(monitor: Monitor) -> None:
    """Have a QEMU close what `file_uri` has given it, if there is anything; up to 9.0 it does when the guest runs."""
    for entry in monitor.execute("query-fdsets"):
        if any(member.get("opaque") == FILE for member in entry["fds"]):
            with contextlib.suppress(CommandFailed):
                monitor.execute("remove-fd", fdset_id=entry["fdset-id"])


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
