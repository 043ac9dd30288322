"""A rehearsal of the state by itself: a plan of a monitor, the rehearsal, and an end before anything else is done."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cpr import discover, journal, survey
from cpr.engines.dress import PAUSE, SENT, RehearseState
from cpr.engines.prepare import OpenMonitor
from cpr.errors import StepFailed
from cpr.model import Plan, Step
from cpr.run import Bounds, Run
from tests.qemu.faults.subject import Victim

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cpr.model import Guest, MonitorAddress, Outcome, Target

ENOUGH = "so far so good"


@dataclass(frozen=True, slots=True, kw_only=True)
class Enough(Step):
    """Fails, so that all before it is undone."""

    def describe(self) -> str:
        return "the end"

    def do(self, run: Any) -> None:
        raise StepFailed(self.describe(), ENOUGH)


def plan_of(facts: Guest, target: Target) -> Plan:
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
) -> Rehearsed:
    """Rehearse in this process. `watch` gets the run before it begins; `address` is the monitor to use."""
    facts = survey.survey(discover.find(str(pid)))
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
