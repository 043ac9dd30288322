"""Rehearsals of the state by themselves, the guests they are made with, and what is well afterwards.

The plan is a monitor, the rehearsal, and an end before anything else is done.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from cpr import discover, journal, survey
from cpr.engines.dress import PAUSE, SENT, RehearseState
from cpr.engines.prepare import OpenMonitor
from cpr.errors import StepFailed
from cpr.model import Backing, Plan, Step
from cpr.qemu import features
from cpr.run import Bounds, Run
from tests.qemu.conftest import build, qemus_of
from tests.qemu.faults.subject import Victim
from tests.qemu.moving import Subject, backend, monitor, walk
from tests.qemu.test_rehearsal import rehearsing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cpr.model import Guest as Facts
    from cpr.model import MonitorAddress, Outcome, Target
    from tests.lab.counting import CountingLog
    from tests.lab.start import Guest, Lab

VIRTIO = [
    *("-device", "virtio-balloon-pci", "-device", "virtio-rng-pci", "-vga", "std"),
    *("-device", "virtio-serial-pci", "-chardev", "null,id=vc", "-device", "virtconsole,chardev=vc"),
    *("-netdev", "user,id=u0", "-device", "virtio-net-pci,netdev=u0,romfile="),
]
DISK = ["-drive", "file={disk},format=raw,if=none,id=d0"]
SETS = {
    "plain": [],
    "virtio": [*VIRTIO, *DISK, "-device", "virtio-blk-pci,drive=d0"],
    "scsi": [*DISK, "-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=d0"],
    "usb": ["-device", "qemu-xhci", "-device", "usb-tablet", "-device", "e1000,netdev=u0", "-netdev", "user,id=u0"],
}
ENOUGH = "so far so good"


@dataclass(frozen=True, slots=True, kw_only=True)
class Enough(Step):
    """Fails, so that all before it is undone."""

    def describe(self) -> str:
        return "the end"

    def do(self, run: Any) -> None:
        raise StepFailed(self.describe(), ENOUGH)


def plan_of(facts: Facts, target: Target) -> Plan:
    steps = (OpenMonitor(guest=facts), RehearseState(guest=facts, target=target), Enough())
    return Plan(guest=facts, target=target, engine="test", reason="test", steps=steps, findings=())


@dataclass
class Rehearsed:
    """What came of it. pause: seconds."""

    outcome: Outcome
    pause: float | None
    settled: bool
    new: bool
    """`Run.new` was somebody."""

    @property
    def accepted(self) -> bool:
        return self.outcome.error == f"the end: {ENOUGH}"


def rehearse(
    pid: int,
    target: Target,
    directory: Path,
    *,
    bounds: Bounds | None = None,
    watch: Callable[[Run], object] = lambda _: None,
    address: MonitorAddress | None = None,
    as_dax: bool = False,
) -> Rehearsed:
    """Rehearse in this process. `watch` gets the run before it begins; `address` is the monitor to use; `as_dax`: as
    if the RAM were a character device of DAX, which this machine has not.
    """
    facts = survey.survey(discover.find(str(pid)))
    if as_dax:
        facts = replace(facts, ram=tuple(replace(block, backing=Backing.DEVDAX) for block in facts.ram))
    plan = plan_of(replace(facts, monitor=address) if address is not None else facts, target)
    it = journal.Journal(plan, journal.new_run_id(), directory=str(directory / "run"))
    run = Run(plan=plan, journal=it, report=lambda _: None, bounds=bounds or Bounds())
    watch(run)
    outcome = run.execute()
    return Rehearsed(outcome, run.extra.get(PAUSE), SENT not in run.extra, run.new is not None)


class Rehearsing(Victim):
    """A counting guest whose state is rehearsed by keepers."""

    def plan(self, run_id: str) -> Plan:
        return plan_of(self.facts(), self.target)


def full(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.full)


def born(lab: Lab, key: str, devices: str = "plain", **how: Any) -> Subject:
    """A counting guest with a set of devices."""
    it = build(key)
    disk = lab.directory / "scratch.disk"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    words = [word.format(disk=disk) for word in SETS[devices]]
    guest = lab.counting(it, *words, backend=backend(it, lab), **how)
    return Subject(lab, guest, it, images=(lab.directory / "guest.disk", disk))


def ask(key: str) -> Target:
    return features.ask(str(build(key).binary))


@contextlib.contextmanager
def unharmed(lab: Lab, guest: Guest[CountingLog]) -> Iterator[None]:
    """Assert that what happens inside leaves the guest as it was, counting, and nothing behind."""
    before = settings(guest)
    yield
    assert rehearsing(lab) == []
    assert qemus_of(lab) == [guest.pid]
    assert settings(guest) == before
    if before["status"] == "running":
        guest.log.wait_ticks(5)
        walk(guest)


def settings(guest: Guest[Any]) -> dict[str, Any]:
    with monitor(guest) as session:
        parameters = session.execute("query-migrate-parameters")
        return {
            "status": session.execute("query-status")["status"],
            "capabilities": session.execute("query-migrate-capabilities"),
            "parameters": {n: parameters[n] for n in ("max-bandwidth", "downtime-limit")},
            "fdsets": session.execute("query-fdsets"),
        }
