"""Execute a `Plan` on one guest: the journal line first, then the step; undo before the commit, forward after it.

The rules, which everything here serves:

- The commit is the sending of `cont` to the new QEMU. Before it the old QEMU may go on only when the new one is dead,
  by its pidfd. After it the old one is never resumed, whatever happens.
- Before the commit every failure, interrupt or passed deadline undoes the done steps in reverse and ends with the
  guest in the old QEMU. After it failures are collected and the rest is still done.
- A step that cannot be undone leaves its journal open, for `cpr recover`.

What the steps are is the engines' matter; who runs this in which process is the keeper's.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cpr import errors
from cpr.errors import CprError, DeadlinePassed, Exit, GuestVanished, Interrupted, MonitorError, NewQemuDied, StepFailed
from cpr.linux.process import Process, open_process
from cpr.model import Outcome, Plan, Runstate, Status, Step
from cpr.qemu import qmp

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from cpr.journal import Journal
    from cpr.linux.fds import Fd
    from cpr.model import Chardev

Report = "Callable[[dict[str, Any]], None]"

SLICE = 0.05
"""Seconds between two looks at the interrupt, the deadline and the new QEMU while waiting for an event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How long a run may take, in seconds."""

    timeout: float = 120.0
    """From the first step to the commit."""
    max_downtime: float = 5.0
    """From STOP to the commit."""


class CommitRefused(CprError):
    """Nothing ran in the new QEMU, for certain: the one case in which the way back from the commit is still open.

    It was dead or stopped before `cont` was sent, or answered it with an error.
    """


@dataclass(slots=True)
class Run:
    """What changes while a plan runs."""

    plan: Plan
    journal: Journal
    report: Callable[[dict[str, Any]], None]
    bounds: Bounds = field(default_factory=Bounds)
    old: Process | None = None
    new: Process | None = None
    old_monitor: qmp.Monitor | None = None
    new_monitor: qmp.Monitor | None = None
    descriptors: dict[str, Fd] = field(default_factory=dict)
    """What was taken from the old QEMU, by name (ram:..., listener:..., client:..., tap:...)."""
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Sockets and descriptors that end with the run."""
    clients: tuple[Chardev, ...] = ()
    words: Callable[[], str] = lambda: ""
    """What the new QEMU said last on its standard error."""
    notes: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    """What one step of an engine leaves for a later one."""
    stop_time: float | None = None
    resume_time: float | None = None
    last_runstate: str = ""
    """What the guest was when the last monitor to ask was given up."""
    doing: str = ""
    """The step that is being done."""
    undoing: bool = False
    committed: bool = False
    interrupted: int = 0
    """Exit code of the interruption (130, 143), 0 for none."""
    bound: bool = False
    """The way back is longer than the way on: an interrupt does not end the run any more."""
    held: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    blackout_began: float | None = None
    _wake: threading.Event = field(default_factory=threading.Event)

    # what steps use ------------------------------------------------------------------------------------------

    @property
    def monitor(self) -> qmp.Monitor:
        """The old QEMU's monitor."""
        assert self.old_monitor is not None
        return self.old_monitor

    @property
    def successor(self) -> qmp.Monitor:
        """The new QEMU's monitor."""
        assert self.new_monitor is not None
        return self.new_monitor

    def remaining(self) -> float:
        """Seconds left until the nearest deadline."""
        left = self.began + self.bounds.timeout - time.monotonic()
        if self.blackout_began is not None:
            left = min(left, self.blackout_began + self.bounds.max_downtime - time.monotonic())
        return left

    def check(self, step: str) -> None:
        """Raise if the run must not go on: an interrupt, a passed deadline, a dead new QEMU. Before the commit only."""
        if self.committed:
            return
        if self.interrupted and not self.bound:
            raise Interrupted("interrupted before the commit", where=errors.AS_BEFORE)
        if self.remaining() <= 0:
            limit = self.bounds.timeout if self.blackout_began is None else self.bounds.max_downtime
            which = "--timeout" if self.blackout_began is None else "--max-downtime"
            raise DeadlinePassed(step, f"not done within {limit:g} s", hint=f"{which} allows longer")
        if self.new is not None and not self.new.alive():
            raise NewQemuDied(step, "ended", self.words())

    def attend(self) -> None:
        """`check`, for whoever waits for an answer in the course of a step; on the way back nothing is in a hurry."""
        if not self.undoing:
            self.check(self.doing)

    def wait_event(
        self,
        monitor: qmp.Monitor,
        names: Collection[str],
        step: str,
        accept: Callable[[qmp.Event], bool] = lambda _: True,
        *,
        after: int = 0,
        unless: Callable[[], bool] = lambda: False,
    ) -> qmp.Event | None:
        """Wait for an event, looking at interrupts, deadlines and the new QEMU's life meanwhile. None: `unless`."""
        while True:
            try:
                return monitor.wait_event(names, accept, timeout=SLICE, after=after)
            except TimeoutError:
                self.check(step)
                if unless():
                    return None
            except MonitorError:
                if self.new is not None:
                    self.new.wait_dead(0.5)
                self.check(step)
                raise

    def kill_new(self) -> None:
        """Make sure that the new QEMU is dead.

        Raises:
            StepFailed: it is not dead, so the old one must not go on.
        """
        if self.new is None:
            return
        self.new.kill()
        if not self.new.wait_dead(15.0):
            raise StepFailed("undo", f"the new QEMU (pid {self.new.pid}) does not die", hint="cpr recover tries again")

    def interrupt(self, code: int) -> None:
        """Ask the run to undo; without effect once the commit was sent."""
        self.interrupted = self.interrupted or code

    # execution -----------------------------------------------------------------------------------------------

    def execute(self) -> Outcome:
        """Run the plan to its end, one way or the other. Never raises for what can be expected."""
        plan = self.plan
        try:
            try:
                self.old = open_process(plan.guest.process.pid, plan.guest.process.start_time)
            except (ProcessLookupError, OSError):
                raise GuestVanished(plan.guest.process.pid, "the update began") from None
            failure = self._steps()
        except CprError as error:
            failure = error
        self.tell()
        outcome = self._outcome(failure)
        if self.extra.get("leave_open"):
            self.journal.abandon()
        else:
            try:
                self.journal.close(outcome)
            except CprError as error:  # what was done is done: say so, and leave the rest to `cpr recover`
                self.journal.abandon()
                outcome = replace(outcome, notes=(*outcome.notes, f"the journal stays open: {error.message}"))
        self.closing.close()
        for monitor in (self.old_monitor, self.new_monitor):
            if monitor is not None:
                monitor.close()
        return outcome

    def _steps(self) -> CprError | None:
        begun: list[tuple[int, Step]] = []
        for index, step in enumerate(self.plan.steps):
            try:
                self.doing = step.describe()
                self.check(self.doing)
                begun.append((index, step))
                self._tell(index, step, "doing")
                if step.commit:
                    self.committed = True
                step.do(self)
                self._tell(index, step, "done")
            except BaseException as error:
                failure = _as_error(error, step)
                if isinstance(error, CommitRefused):
                    self.committed = False
                    with contextlib.suppress(CprError):
                        self.journal.step(index, "refused", str(failure))
                else:
                    with contextlib.suppress(CprError):
                        self._tell(index, step, "failed", str(failure))
                if not self.committed:
                    self._undo(begun)
                    return failure
                # a process that is being killed hangs up a moment before its pidfd tells of its end
                if self.new is not None and self.new.wait_dead(0.5 if isinstance(error, MonitorError) else 0.0):
                    return failure
                self.differences.append(failure.message)
        return None

    def _undo(self, begun: list[tuple[int, Step]]) -> None:
        """Undo in reverse; whatever fails, the rest is undone too, and the journal stays open for `cpr recover`."""
        self.undoing = True
        for index, step in reversed(begun):
            try:
                with contextlib.suppress(CprError):
                    self._tell(index, step, "undoing")
                step.undo(self)
                with contextlib.suppress(CprError):
                    self._tell(index, step, "undone")
            except Exception as error:
                self.extra["leave_open"] = True
                self.notes.append(f"could not undo '{step.describe()}': {_as_error(error, step).message}")

    def _tell(self, index: int, step: Step, state: str, error: str = "") -> None:
        self.journal.step(index, state, error)
        self.held.append(
            {
                "event": "step",
                "index": index,
                "step": step.id,
                "text": step.describe(),
                "state": state,
                "commit": step.commit,
                "blackout": step.blackout,
                **({"error": error} if error else {}),
            }
        )
        if not step.blackout or state not in ("doing", "done") or (step.commit and state == "done"):
            self.tell()

    def tell(self) -> None:
        """Report what was held back: in the blackout nobody is woken to print."""
        for message in self.held:
            self.report(message)
        self.held.clear()

    def _outcome(self, failure: CprError | None) -> Outcome:
        guest, target = self.plan.guest, self.plan.target
        blackout = None
        if self.stop_time is not None and self.resume_time is not None:
            blackout = max(0.0, self.resume_time - self.stop_time)
        status, code, where, pid_after = self._verdict(failure)
        runstate = self.last_runstate
        with contextlib.suppress(CprError, AssertionError):
            survivor = self.successor if self.committed else self.monitor
            runstate = str(survivor.execute("query-status", timeout=5)["status"])
        if self.committed and pid_after and not runstate:
            status, code = Status.NEEDS_ATTENTION, Exit.NEEDS_ATTENTION
            where = f"{errors.NEEDS_YOU}: it is in the new QEMU (pid {pid_after}), which does not answer"
        return Outcome(
            guest=guest.name or str(guest.process.pid),
            uuid=guest.uuid,
            status=status,
            exit_code=int(code),
            where=where,
            engine=self.plan.engine,
            pid_before=guest.process.pid,
            pid_after=pid_after,
            runstate=runstate,
            binary_before=guest.binary,
            binary_after=target.binary if status is Status.UPDATED else guest.binary,
            blackout_seconds=blackout,
            total_seconds=time.monotonic() - self.began,
            findings=self.plan.findings,
            error=failure.message if failure else "; ".join(self.differences),
            hint=failure.hint if failure else "",
            notes=tuple(self.notes),
        )

    def _verdict(self, failure: CprError | None) -> tuple[Status, Exit, str, int]:
        pid = self.plan.guest.process.pid
        if self.committed:
            new = self.new.pid if self.new is not None else 0
            if self.new is None or not self.new.alive():
                where = "the guest crashed: the new QEMU died after the commit, and what it had is lost"
                return Status.NEEDS_ATTENTION, Exit.NEEDS_ATTENTION, where, 0
            if self.differences:
                return Status.UPDATED, Exit.DIFFERS, errors.RUNS_NEW, new
            return Status.UPDATED, Exit.OK, errors.RUNS_NEW, new
        if self.old is None or not self.old.alive():
            if not self.extra.get("touched"):
                where = "its process ended before anything was done: by itself, or by another update"
                return Status.FAILED, Exit.NOT_FOUND, where, 0
            where = self.extra.get("lost", "the guest's process has ended by itself")
            return Status.NEEDS_ATTENTION, Exit.NEEDS_ATTENTION, where, 0
        if self.extra.get("leave_open"):
            where = f"{errors.NEEDS_YOU}: cpr recover {self.journal.run_id} tries again"
            return Status.NEEDS_ATTENTION, Exit.NEEDS_ATTENTION, where, pid
        pid = self.old.pid
        paused = "" if self.plan.guest.running else ", paused as before"
        where = errors.AS_BEFORE + paused if self.extra.get("touched") else errors.UNTOUCHED
        if isinstance(failure, Interrupted):
            code = Exit(self.interrupted or Exit.INTERRUPTED)
            return Status.ROLLED_BACK, code, where, pid
        if self.extra.get("touched"):
            return Status.ROLLED_BACK, Exit.ROLLED_BACK, where, pid
        return Status.FAILED, failure.code if failure else Exit.FAILED, where, pid


def resume_old(monitor: qmp.Monitor, before: str, *, timeout: float = 10.0) -> str:
    """Bring the old QEMU back to what it was, after the new one is dead. Returns its runstate.

    A migration that is still going on is cancelled; one that completed left the guest in `postmigrate`. A guest that
    was paused stays in what QEMU made of it: only a running one is told to go on.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        migration = monitor.execute("query-migrate").get("status", "none")
        if migration not in ("setup", "active", "device", "pre-switchover", "cancelling", "wait-unplug"):
            break
        if migration != "cancelling":
            with contextlib.suppress(errors.CommandFailed):
                monitor.execute("migrate_cancel")
        time.sleep(0.01)
    status = str(monitor.execute("query-status")["status"])
    while status == Runstate.FINISH_MIGRATE and time.monotonic() < deadline:
        time.sleep(0.005)
        status = str(monitor.execute("query-status")["status"])
    if before == Runstate.RUNNING and status in (Runstate.PAUSED, Runstate.POSTMIGRATE, Runstate.FINISH_MIGRATE):
        monitor.execute("cont")
        status = str(monitor.execute("query-status")["status"])
    return status


def _as_error(error: BaseException, step: Step) -> CprError:
    if isinstance(error, CprError):
        return error
    if isinstance(error, OSError):
        return StepFailed(step.describe(), error.strerror or str(error))
    if isinstance(error, KeyError | IndexError | TypeError | ValueError | AttributeError):
        return StepFailed(step.describe(), f"unexpected: {type(error).__name__}: {error}")
    if isinstance(error, Exception):
        return StepFailed(step.describe(), f"{type(error).__name__}: {error}")
    return Interrupted(f"{type(error).__name__} in '{step.describe()}'")


@contextlib.contextmanager
def closing_all(fds: list[Fd]) -> Iterator[list[Fd]]:
    """Close every descriptor of a list that is being filled, if filling it fails."""
    try:
        yield fds
    except BaseException:
        for fd in fds:
            fd.close()
        raise
