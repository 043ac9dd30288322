"""Looking at guests: survey, ask the new QEMU, rehearse, check, plan. Nothing is changed."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from cpr import plan as planning
from cpr.app.world import Choices, World, real_world
from cpr.checks import run_checks
from cpr.checks.binary import same_binary
from cpr.checks.migration import monitor_finding
from cpr.errors import BinaryUnusable, Blocked, CprError, Exit, MonitorError
from cpr.model import Severity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from cpr.model import Candidate, Finding, Guest, Host, Plan, Rehearsal, Target

ATTENTION_SECONDS = 0.1

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """Everything that was found about one guest, up to the plan; or the error that ended it."""

    candidate: Candidate
    guest: Guest | None = None
    target: Target | None = None
    findings: tuple[Finding, ...] = ()
    engines: tuple[tuple[str, tuple[Finding, ...]], ...] = ()
    """For each engine what speaks against it, or at least is to be said."""
    plan: Plan | None = None
    error: CprError | None = None

    @property
    def label(self) -> str:
        return self.candidate.name or str(self.candidate.process.pid)

    @property
    def blockers(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.severity is Severity.BLOCKER)

    @property
    def exit_code(self) -> Exit:
        """What a real run of this would exit with, if it went well."""
        if self.plan is not None:
            return Exit.OK
        if any(f.check == "privileges" for f in self.blockers):
            return Exit.PRIVILEGES
        return self.error.code if self.error is not None else Exit.BLOCKED if self.blockers else Exit.OK

    @property
    def outdated(self) -> bool | None:
        """Whether another QEMU is installed than the one that runs (or would be, with --qemu); None: unknown."""
        there = self.target.binary if self.target else self.guest.installed if self.guest else None
        running = self.guest.binary if self.guest else self.candidate.binary
        return None if there is None else not same_binary(running, there)


@dataclass(slots=True)
class Examiner:
    """Examines guests of one host; asks every new binary once."""

    world: World
    choices: Choices = field(default_factory=Choices)
    rehearse: bool = True
    run_id: str = ""
    _targets: dict[str, Target | CprError] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _host: Host | None = None

    def examine(self, candidate: Candidate) -> Examined:
        """Never raises for what may be wrong with one guest: that is in the answer.

        Raises:
            UsageError: the choices cannot be meant.
        """
        planning.known_engine(self.choices.engine, self.world.engines)
        busy = self.world.claimed(candidate.process)  # its monitor is held then, and its state somebody's business
        if busy is not None:
            return Examined(candidate=candidate, error=busy)
        try:
            guest = self.world.survey(candidate)
        except MonitorError as error:
            busy = self.world.claimed(candidate.process)
            if busy is not None:
                return Examined(candidate=candidate, error=busy)
            finding = monitor_finding(error, candidate.unreadable)
            blocked = Blocked(finding.message, hint=finding.hint)
            return Examined(candidate=candidate, findings=(finding,), error=blocked)
        except CprError as error:
            return Examined(candidate=candidate, error=error)
        target: Target | None = None
        try:
            target = self.target(new_binary(guest, self.choices.qemu))
            rehearsal = self.world.rehearse(guest, target) if self.rehearse else None
            findings = run_checks(guest, self.host(), target, rehearsal)
        except CprError as error:
            return Examined(candidate=candidate, guest=guest, target=target, error=error)
        return self._planned(candidate, guest, target, rehearsal, findings)

    def _planned(
        self,
        candidate: Candidate,
        guest: Guest,
        target: Target,
        rehearsal: Rehearsal | None,
        findings: tuple[Finding, ...],
    ) -> Examined:
        from cpr.engines.base import Request

        choices, engines = self.choices, self.world.engines
        verdicts = planning.judge(guest, self.host(), target, findings, engines=engines, ignored=choices.ignore)
        plan, error = None, None
        try:
            plan = planning.make(
                guest,
                self.host(),
                target,
                rehearsal,
                findings,
                engine=choices.engine,
                ignored=choices.ignore,
                request=Request(run_id=self.run_id, ignored=choices.ignore),
                engines=engines,
            )
            findings = plan.findings
        except planning.NoEngine as blocked:
            error, findings = blocked, blocked.findings
        return Examined(
            candidate=candidate,
            guest=guest,
            target=target,
            findings=findings,
            engines=tuple(verdicts.items()),
            plan=plan,
            error=error,
        )

    def target(self, path: str) -> Target:
        """The new QEMU as it answers. Raises `BinaryUnusable`, the same for every guest."""
        with self._lock:
            known = self._targets.get(path)
            if known is None:
                try:
                    known = self.world.ask(path, self.choices.qemu_options)
                except CprError as error:
                    known = error
                self._targets[path] = known
        if isinstance(known, CprError):
            raise known
        return known

    def host(self) -> Host:
        if self._host is None:
            self._host = self.world.survey_host()
        return self._host


def new_binary(guest: Guest, wanted: str) -> str:
    """The path of the new QEMU: `wanted` (a path, or a name looked up in PATH), else what is installed.

    Raises:
        BinaryUnusable: there is none.
    """
    if wanted:
        found = wanted if "/" in wanted else shutil.which(wanted)
        if not found:
            raise BinaryUnusable(wanted, "no such program in PATH", hint="--qemu takes a path")
        return found
    if guest.installed is None:
        raise BinaryUnusable(
            guest.binary.path, "no QEMU of this name is installed", hint="--qemu PATH names the one to go to"
        )
    return guest.installed.path


def list_guests(world: World | None = None, choices: Choices | None = None) -> tuple[Examined, ...]:
    """Every guest of this host, judged but not rehearsed: that is quick, and a look needs no second start."""
    world = world or real_world()
    examiner = Examiner(world=world, choices=choices or Choices(), rehearse=False)
    return in_parallel(examiner.examine, world.candidates(), examiner.choices.jobs)


def check(names: Sequence[str], choices: Choices, world: World | None = None) -> tuple[Examined, ...]:
    """The pre-check of the named guests, of all where none is named."""
    world = world or real_world()
    candidates = find_all(names, world) if names else world.candidates()
    return in_parallel(Examiner(world=world, choices=choices).examine, candidates, choices.jobs)


def show(name: str, choices: Choices, world: World | None = None) -> Examined:
    """All there is to know about one guest."""
    return check([name], choices, world)[0]


def find_all(names: Sequence[str], world: World) -> tuple[Candidate, ...]:
    """Each guest once, however often and by whatever name it is named."""
    return tuple({c.process: c for c in map(world.find, names)}.values())


def in_parallel(work: Callable[[T], R], items: Iterable[T], jobs: int) -> tuple[R, ...]:
    """`work` done to every item, up to `jobs` at a time; the answers in the items' order.

    The caller's thread only waits, in slices: Python runs signal handlers in the main thread, and a signal that comes
    just before a long wait would be heard at its end.
    """
    everything = tuple(items)
    pool = ThreadPoolExecutor(max_workers=max(1, min(jobs, len(everything))), thread_name_prefix="guest")
    try:
        futures = [pool.submit(work, item) for item in everything]
        while wait(futures, timeout=ATTENTION_SECONDS).not_done:
            continue
        return tuple(future.result() for future in futures)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
