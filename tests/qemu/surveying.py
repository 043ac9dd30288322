"""QEMUs with nothing to run in them, for tests of what is found about a process."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from cpr import discover, survey
from tests.lab.start import said

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cpr.model import Candidate, Guest
    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab, Orphan

KEYS = ("7.2", "10.0", "11.1.a")
MEMORY = "64M"


def bare(build: QemuBuild) -> list[str]:
    """The words every one begins with."""
    return [*build.command, "-nodefaults", "-display", "none", "-accel", "tcg", "-m", MEMORY]


def start(
    lab: Lab,
    build: QemuBuild,
    *words: str,
    name: str = "guest",
    machine: str = "q35",
    monitor: bool = True,
    pass_fds: Sequence[int] = (),
) -> Orphan:
    """Start one and return when its monitor listens (without a monitor: when its vCPU runs)."""
    path = lab.directory / f"{name}.qmp"
    qmp = ["-qmp", f"unix:{path},server=on,wait=off"] if monitor else []
    command = [*bare(build), "-name", name, "-machine", machine, *qmp, *words]
    orphan = lab.start(command, name=name, pass_fds=pass_fds)
    await_listening(lab, orphan, name, monitor=monitor)
    return orphan


def await_listening(lab: Lab, orphan: Orphan, name: str = "guest", *, monitor: bool = True) -> None:
    """Wait until a QEMU is found, with a monitor that listens."""

    def found() -> bool:
        assert orphan.alive, said(lab.directory / f"{name}.log")
        return any(c.process.pid == orphan.pid and (c.monitors or not monitor) for c in discover.candidates())

    until(found)


def until(ready: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for something to come true."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)


def candidate(orphan: Orphan) -> Candidate:
    (found,) = [c for c in discover.candidates() if c.process.pid == orphan.pid]
    return found


def surveyed(orphan: Orphan) -> Guest:
    return survey.survey(candidate(orphan))
