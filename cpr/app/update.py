"""Updating guests: what would be done, and doing it. The keeper runs each plan; its events are passed on."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cpr import plan as planning
from cpr.app.examine import Examined, Examiner, find_all, in_parallel
from cpr.app.world import Choices, Handle, World, real_world
from cpr.errors import UNTOUCHED, CprError, Exit, Interrupted
from cpr.model import Outcome, Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cpr.progress import Progress

WORST_FIRST = (
    Exit.NEEDS_ATTENTION,
    Exit.DIFFERS,
    Exit.TERMINATED,
    Exit.INTERRUPTED,
    Exit.ROLLED_BACK,
    Exit.FAILED,
    Exit.PRIVILEGES,
    Exit.BUSY,
    Exit.NOT_FOUND,
    Exit.BLOCKED,
    Exit.WOULD_UPDATE,
    Exit.OK,
)
"""Which outcome decides the exit code where there are several guests."""


class Stop:
    """Ctrl-C and SIGTERM, on their way to every keeper. Calls may come from a signal handler."""

    def __init__(self) -> None:
        self._code: Exit | None = None
        self.working = False
        """Whether something may have been done already."""
        self._handles: list[Handle] = []
        self._lock = threading.RLock()

    def request(self, code: Exit) -> None:
        """Undo whatever is not committed. Only the first one counts."""
        with self._lock:
            if self._code is not None:
                return
            self._code = code
            handles = list(self._handles)
        for handle in handles:
            handle.interrupt(int(code))

    def requested(self) -> Exit | None:
        """The exit code of the interruption, None where there was none."""
        return self._code

    def watch(self, handle: Handle) -> None:
        with self._lock:
            self._handles.append(handle)
            late = self._code
        if late is not None:
            handle.interrupt(int(late))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What an update would do."""

    run_id: str
    choices: Choices
    guests: tuple[Examined, ...]

    @property
    def to_do(self) -> tuple[Examined, ...]:
        return tuple(e for e in self.guests if e.plan is not None)

    @property
    def exit_code(self) -> Exit:
        """What the real run would exit with, if every plan went well."""
        return worst(e.exit_code if e.plan is None else Exit.OK for e in self.guests if not self._skipped(e))

    def _skipped(self, examined: Examined) -> bool:
        return self.choices.skip_blocked and examined.exit_code is Exit.BLOCKED


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What came out of an update of several guests."""

    run_id: str
    outcomes: tuple[Outcome, ...]

    @property
    def exit_code(self) -> Exit:
        return worst(Exit(o.exit_code) for o in self.outcomes)


def prepare(names: Sequence[str], choices: Choices, world: World | None = None) -> Prepared:
    """Plans for the named guests; where none is named, for every guest that runs another QEMU than it would get.

    A named guest is updated to the same binary too, if that is what was asked for.

    Raises:
        NotFound: a name that no guest has. Before anything is done to any other.
        UsageError: choices that cannot be meant.
    """
    world = world or real_world()
    planning.known_engine(choices.engine, world.engines)
    candidates = find_all(names, world) if names else world.candidates()
    run_id = world.new_run_id()
    examiner = Examiner(world=world, choices=choices, run_id=run_id)
    guests = in_parallel(examiner.examine, candidates, choices.jobs)
    if not names:
        guests = tuple(replace(e, plan=None) if e.outdated is False and e.plan else e for e in guests)
    return Prepared(run_id=run_id, choices=choices, guests=guests)


def perform(prepared: Prepared, progress: Progress, stop: Stop, world: World | None = None) -> Update:
    """Run every plan, up to `jobs` at a time; what happens to one guest does not stop the others."""
    world = world or real_world()

    stop.working = bool(prepared.to_do)

    def one(examined: Examined) -> Outcome:
        outcome = _perform_one(examined, prepared, progress, stop, world)
        progress.event(examined.label, {"event": "outcome", **_summary(outcome)})
        return outcome

    return Update(run_id=prepared.run_id, outcomes=in_parallel(one, prepared.guests, prepared.choices.jobs))


def _perform_one(examined: Examined, prepared: Prepared, progress: Progress, stop: Stop, world: World) -> Outcome:
    if examined.plan is None:
        return untouched(examined, skip_blocked=prepared.choices.skip_blocked)
    interrupted = stop.requested()
    if interrupted is not None:
        error = Interrupted("interrupted before it began")
        return replace(untouched(replace(examined, plan=None, error=error)), exit_code=int(interrupted))
    try:
        handle = world.start(examined.plan, prepared.run_id, prepared.choices.timeout, prepared.choices.max_downtime)
        stop.watch(handle)
        for event in handle.events():
            progress.event(examined.label, event)
        outcome = handle.outcome()
    except CprError as error:
        return untouched(replace(examined, plan=None, error=error))
    except OSError as error:
        failure = CprError(f"no keeper can be started: {error.strerror or error}")
        return untouched(replace(examined, plan=None, error=failure))
    interrupted = stop.requested()
    if outcome.exit_code == Exit.INTERRUPTED and interrupted is not None:
        return replace(outcome, exit_code=int(interrupted))
    return outcome


def untouched(examined: Examined, *, skip_blocked: bool = False) -> Outcome:
    """The outcome of a guest for which nothing was done: up to date, blocked, skipped, or in error."""
    error, code = examined.error, examined.exit_code
    status = Status.UNCHANGED
    if error is not None or examined.blockers:
        status = {Exit.BLOCKED: Status.BLOCKED, Exit.BUSY: Status.BUSY}.get(code, Status.FAILED)
        if status is Status.BLOCKED and skip_blocked:
            status, code = Status.SKIPPED, Exit.OK
    guest = examined.guest
    pid = examined.candidate.process.pid
    return Outcome(
        guest=examined.label,
        uuid=examined.candidate.uuid,
        status=status,
        exit_code=int(code),
        where=error.where if error is not None else UNTOUCHED,
        pid_before=pid,
        pid_after=pid,
        runstate=guest.runstate if guest else "",
        binary_before=guest.binary if guest else examined.candidate.binary,
        binary_after=guest.binary if guest else examined.candidate.binary,
        findings=examined.findings,
        error=error.message if error is not None else "",
        hint=error.hint if error is not None else "",
    )


def worst(codes: Iterable[Exit]) -> Exit:
    """The one that decides the exit code."""
    found = set(codes) or {Exit.OK}
    return next((code for code in WORST_FIRST if code in found), Exit.FAILED)


def _summary(outcome: Outcome) -> dict[str, Any]:
    return {
        "status": str(outcome.status),
        "exit_code": outcome.exit_code,
        "where": outcome.where,
        "blackout_seconds": outcome.blackout_seconds,
        "error": outcome.error or None,
    }
