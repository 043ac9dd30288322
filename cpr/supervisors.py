"""Who knows a guest by its pid: a service manager, libvirt, a container, a parent that waits.

A handover changes the pid; whoever holds it would take the end of the old process for the end of the guest. The facts
are gathered by `gather`, judged by `supervisors`.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpr.linux import proc
from cpr.linux.process import RunFailed, run
from cpr.model import Supervisor

if TYPE_CHECKING:
    from collections.abc import Sequence

LIBVIRT_SCOPE = re.compile(r"/machine-qemu[^/]*\.scope|/[^/]+\.libvirt-qemu(/|$)")
LIBVIRT_WORDS = re.compile(r"/libvirt/qemu/(domain-|channel/|lib/domain-|\d)")
"""Paths that libvirt puts on a QEMU's command line (src/qemu/qemu_domain.c)."""
REAPERS = frozenset({"systemd", "init", "tini", "dumb-init", "catatonit", "s6-svscan", "runit"})
"""Adopt orphans without caring who they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What is judged."""

    pid: int
    argv: Sequence[str]
    cgroups: Sequence[str]
    """Paths."""
    ns_pids: Sequence[int]
    parent: int
    parent_comm: str
    parent_ns_pids: Sequence[int]
    unit: str = ""
    """The service whose cgroup the process is in, where systemd runs this host."""
    main_pid: int | None = None
    """MainPID of that unit; None where systemd could not be asked."""


def gather(pid: int, argv: Sequence[str]) -> Surroundings:
    """Read it.

    Raises:
        ProcessLookupError: the process is gone.
    """
    status = proc.read_status(pid)
    paths = [entry.path for entry in proc.cgroups(pid)]
    comm, ns_pids = "", tuple[int, ...]()
    if status.ppid:
        with contextlib.suppress(ProcessLookupError):
            parent = proc.read_status(status.ppid)
            comm, ns_pids = parent.name, tuple(parent.ns_pids)
    unit, main_pid = "", None
    if _systemd_runs():
        unit = proc.unit_of(pid) or ""
        unit = "" if not unit.endswith(".service") or unit.startswith("user@") else unit
        main_pid = _main_pid(unit) if unit else None
    return Surroundings(
        pid=pid,
        argv=tuple(argv),
        cgroups=tuple(paths),
        ns_pids=tuple(status.ns_pids),
        parent=status.ppid,
        parent_comm=comm,
        parent_ns_pids=ns_pids,
        unit=unit,
        main_pid=main_pid,
    )


def supervisors(facts: Surroundings) -> tuple[Supervisor, ...]:
    """Everybody who holds the pid, most telling first."""
    found = []
    if any(LIBVIRT_SCOPE.search(path) for path in facts.cgroups) or any(LIBVIRT_WORDS.search(w) for w in facts.argv):
        found.append(Supervisor(kind="libvirt", who="libvirt"))
    if facts.unit and facts.main_pid in (facts.pid, None):
        found.append(Supervisor(kind="systemd", who=facts.unit))
    if len(facts.ns_pids) > 1 and facts.ns_pids[-1] == 1:
        found.append(Supervisor(kind="container", who="the container whose first process it is"))
    if facts.parent > 1 and facts.parent_comm not in REAPERS and not _first_of_namespace(facts.parent_ns_pids):
        found.append(Supervisor(kind="parent", who=f"{facts.parent_comm} (pid {facts.parent})"))
    return tuple(found)


def _first_of_namespace(ns_pids: Sequence[int]) -> bool:
    return bool(ns_pids) and ns_pids[-1] == 1


def _systemd_runs() -> bool:
    try:
        return proc.read_status(1).name == "systemd"
    except ProcessLookupError:
        return False


def _main_pid(unit: str) -> int | None:
    """0 where the unit has no main process (any more); None where nobody answers."""
    for scope in ((), ("--user",)):
        try:
            shown = run(["systemctl", *scope, "show", "-p", "MainPID", "-p", "LoadState", unit], timeout=3.0)
        except (RunFailed, OSError):
            continue
        values = dict(line.partition("=")[::2] for line in shown.stdout.decode().splitlines())
        if values.get("LoadState") == "loaded" and values.get("MainPID", "").isdigit():
            return int(values["MainPID"])
    return None
