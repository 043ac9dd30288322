"""A fake world for the use cases: guests as values, engines that do nothing, keepers that replay events.

Fake: no QEMU, no process and no journal is behind it. What a keeper really does is tested elsewhere.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cpr.app import World
from cpr.errors import AS_BEFORE, RUNS_NEW, Busy, CprError, Exit, NoSuchGuest
from cpr.model import Candidate, Finding, Guest, Host, NextKernel, Outcome, Plan, Rehearsal, Status, Step, Target
from tests.unit.checks import facts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from cpr.engines.base import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeStep(Step):
    text: str

    def describe(self) -> str:
        return self.text


@dataclass
class FakeEngine:
    """An engine of three steps, and of whatever findings it is given."""

    name: str = "handover"
    own: tuple[Finding, ...] = ()
    preferred: str = ""
    requests: list[Any] = field(default_factory=list)

    def findings(self, guest: Guest, host: Host, target: Target) -> Iterable[Finding]:
        return self.own

    def preference(self, guest: Guest) -> str:
        return self.preferred

    def steps(self, guest: Guest, target: Target, request: Request) -> Sequence[Step]:
        self.requests.append(request)
        return (FakeStep(text="prepare"), FakeStep(text="continue", commit=True, blackout=True), FakeStep(text="tidy"))


class FakeKeeper:
    """Replays an update that goes well, or ends as `ending` says; can be made to wait for an interrupt."""

    def __init__(self, plan: Plan, ending: Exit = Exit.OK, *, wait: bool = False) -> None:
        self.plan = plan
        self.ending = ending
        self.wait = wait
        self.interrupted = threading.Event()
        self.code = 0

    def events(self) -> Iterator[dict[str, Any]]:
        for step in self.plan.steps:
            if self.wait:
                assert self.interrupted.wait(5)
                return
            for state in ("doing", "done"):
                yield {"event": "step", "step": step.id, "text": step.describe(), "state": state, "commit": step.commit}
        yield {"event": "blackout", "seconds": 0.0041}

    def outcome(self) -> Outcome:
        code = Exit.INTERRUPTED if self.interrupted.is_set() else self.ending
        updated = code in (Exit.OK, Exit.DIFFERS)
        guest = self.plan.guest
        return Outcome(
            guest=guest.name,
            uuid=guest.uuid,
            status=Status.UPDATED if updated else Status.ROLLED_BACK,
            exit_code=int(code),
            where=RUNS_NEW if updated else AS_BEFORE,
            engine=self.plan.engine,
            pid_before=guest.process.pid,
            pid_after=guest.process.pid + (1000 if updated else 0),
            runstate="running",
            binary_before=guest.binary,
            binary_after=self.plan.target.binary if updated else guest.binary,
            blackout_seconds=0.0041 if updated else None,
            total_seconds=0.4,
            error="" if updated else "the new QEMU died",
        )

    def interrupt(self, code: int = 130) -> None:
        self.code = code
        self.interrupted.set()


@dataclass
class FakeHost:
    """Guests by name; what happens to each. `world()` is what the use cases get."""

    guests: dict[str, Guest | CprError] = field(default_factory=dict)
    endings: dict[str, Exit] = field(default_factory=dict)
    waiting: bool = False
    target: Target | CprError = field(default_factory=facts.target)
    rehearsal: Rehearsal = field(default_factory=facts.rehearsal)
    engines: dict[str, FakeEngine] = field(default_factory=lambda: {"handover": FakeEngine()})
    asked: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    rehearsed: list[str] = field(default_factory=list)
    keepers: list[FakeKeeper] = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)
    kernel: NextKernel = field(default_factory=facts.next_kernel)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    """What was asked for of the next kernel."""
    busy: dict[int, Busy] = field(default_factory=dict)
    """By the pid of the guest."""

    def add(self, name: str, **changes: Any) -> None:
        """A guest that can be updated, but for `changes`."""
        pid = 4242 + len(self.guests)
        made = facts.guest(**{"name": name, **changes})
        self.guests[name] = replace(made, process=replace(made.process, pid=pid))

    def candidates(self) -> tuple[Candidate, ...]:
        return tuple(self._candidate(name) for name in self.guests)

    def _candidate(self, name: str) -> Candidate:
        known = self.guests[name]
        guest = known if isinstance(known, Guest) else facts.guest(name=name)
        return Candidate(
            process=guest.process, argv=guest.argv, name=name, uuid=guest.uuid, binary=guest.binary, monitors=()
        )

    def find(self, wanted: str) -> Candidate:
        if wanted not in self.guests:
            raise NoSuchGuest(wanted, tuple(self.guests))
        return self._candidate(wanted)

    def survey(self, candidate: Candidate) -> Guest:
        known = self.guests[candidate.name]
        if isinstance(known, CprError):
            raise known
        return known

    def ask(self, path: str, options: tuple[str, ...]) -> Target:
        self.asked.append((path, options))
        if isinstance(self.target, CprError):
            raise self.target
        return self.target

    def rehearse(self, guest: Guest, target: Target) -> Rehearsal:
        self.rehearsed.append(guest.name)
        return self.rehearsal

    def next_kernel(self, state_directory: str, **named: Any) -> NextKernel:
        self.kernels.append({"state_directory": state_directory, **named})
        return replace(self.kernel, unsaved=named.get("unsaved", ()))

    def start(self, plan: Plan, run_id: str, timeout: float, max_downtime: float) -> FakeKeeper:
        keeper = FakeKeeper(plan, self.endings.get(plan.guest.name, Exit.OK), wait=self.waiting)
        self.keepers.append(keeper)
        self.started.set()
        return keeper

    def world(self) -> World:
        return World(
            candidates=self.candidates,
            find=self.find,
            survey=self.survey,
            survey_host=facts.host,
            ask=self.ask,
            rehearse=self.rehearse,
            start=self.start,
            engines=self.engines,
            new_run_id=lambda: "20261120T101500-3f2a",
            claimed=lambda process: self.busy.get(process.pid),
            next_kernel=self.next_kernel,
        )
