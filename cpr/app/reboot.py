"""A new host kernel under running guests: look at all, then save all, jump, and bring all back after the boot.

    check (rebootable.py) ─► lock ─► load the kernel ─► [saving] try the states ─► suspend ─► save ─► seal ─► [saved]
                                                    ─► [committed] end the old QEMUs ─► [jumping] jump

In brackets: the phase of the manifest, on disk before it is begun. Until the commit everything can be undone, and is:
at the first failure or interrupt all guests go on where they were. A jump that fails after it brings all back at once.

Out of scope: after the boot (bringback.py, `restore`), and what a death of ours leaves (guardian.py, finish.py).
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cpr.app.byhand import locked
from cpr.app.finish import finish_held
from cpr.app.saveall import Saving
from cpr.app.update import Update, untouched
from cpr.app.world import real_world
from cpr.checks.registry import blockers
from cpr.errors import Blocked, CprError, DeadlinePassed, Exit, Interrupted, NotFound, words
from cpr.linux import proc
from cpr.model import Outcome, Status
from cpr.reboot import manifest as manifests
from cpr.reboot import store
from cpr.reboot.facts import RESTORE_UNIT
from cpr.reboot.manifest import Manifest, Phase

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cpr.app.examine import Examined
    from cpr.app.rebootable import RebootCheck
    from cpr.app.update import Stop
    from cpr.app.world import Choices, World
    from cpr.progress import Progress
    from cpr.reboot.goingon import WentOn

SAVED = "saved: the host jumps into the new kernel, and it goes on there"


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """All guests are saved and their QEMUs have ended; the jump comes next."""

    update: Update
    manifest: Manifest
    path: str
    """Of the manifest."""
    restored_by: str
    """The unit that brings them back after the boot; "" where nothing does by itself."""


def perform_reboot(
    check: RebootCheck,
    choices: Choices,
    progress: Progress,
    stop: Stop,
    world: World | None = None,
    *,
    leaving: Callable[[Departure], None] = lambda departure: None,
) -> Update:
    """Save every guest and jump; all or nothing. Where this returns with exit code 0 the host is going down.

    `leaving` is called in front of the jump, which may leave no time for anything after it. Should it be refused, all
    that comes back then is in the answer.

    Raises:
        Blocked: the host is, or there is no guest. Busy, KexecFailed, CprError, OSError: nothing was touched.
    """
    world = world or real_world()
    run_id = world.new_run_id()
    refused = blockers(check.host)
    if refused:
        raise Blocked(f"{refused[0].message} [{refused[0].check}]", hint=refused[0].hint)
    if any(e.error is not None for e in check.guests):
        return Update(run_id=run_id, outcomes=tuple(untouched(e) for e in check.guests))
    if not check.guests:
        raise Blocked("there is no guest to save", hint="systemctl kexec, or kexec -e, jumps without cpr")
    _nobody_left()
    stop.working = True
    with contextlib.ExitStack() as held:
        for examined in check.guests:
            assert examined.guest is not None
            held.enter_context(locked(examined.guest, "update --kexec"))
        if stop.requested() is not None:
            raise Interrupted("interrupted before it began")
        directory = store.make_run(run_id)
        path = os.path.join(directory, manifests.NAME)
        held.enter_context(store.hold(path, "update --kexec"))
        return _Reboot(check, choices, run_id, progress, stop, world, directory, leaving).run()


def _nobody_left() -> None:
    """Guests of an earlier reboot that are not back would be forgotten over a second one.

    Raises:
        Blocked: there are some. ManifestError: whether there are cannot be told.
    """
    try:
        path = store.current()
    except NotFound:
        return
    manifest = manifests.read_file(path)
    if manifest.open:
        names = ", ".join(g.label for g in manifest.open)
        why = f"{names}: saved for an earlier reboot (run {manifest.run}), and not back"
        raise Blocked(why, hint="cpr restore brings them back, cpr restore --give-up NAME gives one up")


class _Reboot:
    """One run, its locks held."""

    def __init__(
        self,
        check: RebootCheck,
        choices: Choices,
        run_id: str,
        progress: Progress,
        stop: Stop,
        world: World,
        directory: str,
        leaving: Callable[[Departure], None],
    ) -> None:
        self.check = check
        self.run_id = run_id
        self.progress = progress
        self.stop = stop
        self.world = world
        self.directory = directory
        self.leaving = leaving
        self.path = os.path.join(directory, manifests.NAME)
        self.began = time.monotonic()
        self.timeout = choices.timeout
        self.saving = Saving(check.guests, directory, choices, progress, self._attend, check.kexec)
        self.manifest: Manifest | None = None

    def run(self) -> Update:
        with contextlib.ExitStack() as guarded:
            self._prepare(guarded)
            try:
                self._save()
                self._write_guests(Phase.COMMITTED)
            except BaseException as error:
                return self._undo(error)
            return self._commit()

    def _prepare(self, guarded: contextlib.ExitStack) -> None:
        """All that can be done before a guest is touched."""
        try:
            self._say("load the kernel")
            self.world.load_kernel(self.check.kexec)
            self.began = time.monotonic()
            self.saving.prepare()
            self._write(self._first())
            store.make_current(self.directory)
            guarded.enter_context(self.world.guard(self.path))
        except BaseException:
            self.saving.close()
            with contextlib.suppress(OSError, CprError):
                if self.manifest is not None:
                    self._write(replace(self.manifest, phase=Phase.UNDONE))
            self._forget()
            raise

    def _attend(self) -> None:
        if self.stop.requested() is not None:
            raise Interrupted("interrupted before the commit")
        if time.monotonic() > self.began + self.timeout:
            late = f"not done within {self.timeout:g} s"
            raise DeadlinePassed("save the guests", late, hint="--timeout allows longer")

    def _save(self) -> None:
        self.saving.try_states()
        self._attend()
        self.saving.suspend()
        self.saving.save()
        self._write_guests(Phase.SAVED)
        self._attend()

    def _commit(self) -> Update:
        """From here on there is no way back but through the states."""
        try:
            self._say("end the old QEMUs", commit=True)
            self.saving.quit()
            os.sync()
            self._write_guests(Phase.JUMPING)
            self._say("jump into the new kernel")
            update = self._update([self._saved(e) for e in self.check.guests])
            self._leave(update)
            self.world.jump()
        except BaseException as error:
            return self._bring_back(error, Phase.COMMITTED, "the jump was not made")
        return update

    def _leave(self, update: Update) -> None:
        """Whoever is told may be gone: that keeps no host from going on."""
        assert self.manifest is not None
        restored_by = RESTORE_UNIT if self.check.kexec.restores_by_itself else ""
        departure = Departure(update=update, manifest=self.manifest, path=self.path, restored_by=restored_by)
        with contextlib.suppress(OSError, ValueError):
            self.leaving(departure)

    def _undo(self, error: BaseException) -> Update:
        """Every guest goes on where it was; what is on disk of them is void first."""
        if self.saving.stuck:
            return self._bring_back(error, Phase.SAVED, "undone")
        failures: list[str] = []
        try:
            voided = [replace(g, restore=replace(g.restore, result=manifests.Result.CONTINUED))
                      for g in self.saving.known()]  # fmt: skip
            self._write_guests(Phase.UNDOING, voided)
        except (OSError, CprError) as failure:  # a full disk: without a state there is nothing to be loaded either
            failures.append(f"the manifest could not be written: {failure}")
            self.saving.remove_states()
        went = self.saving.undo()
        well = all(w.well for w in went.values())
        if well:
            with contextlib.suppress(OSError, CprError):
                self._write_guests(Phase.UNDONE, ())
            self._forget()
        outcomes = [self._undone(e, went[e.candidate.process.pid], error, failures) for e in self.check.guests]
        if not isinstance(error, (CprError, OSError)):
            raise error
        return self._update(outcomes)

    def _bring_back(self, error: BaseException, phase: Phase, what: str) -> Update:
        """What has ended is restored, and what has not goes on."""
        with contextlib.suppress(OSError, CprError):
            self._write_guests(phase)
        self.saving.close()
        said = f"{what}: {words(error)}"
        outcomes = [
            replace(o, error="; ".join(filter(None, [said, o.error]))) for o in finish_held(self.path, self.world)
        ]
        return self._update(outcomes)

    def _forget(self) -> None:
        """No kernel is loaded, and nothing is saved."""
        with contextlib.suppress(CprError):
            self.world.unload_kernel()
        self.saving.remove_states()
        with contextlib.suppress(OSError):
            store.drop_current(self.directory)

    # -- the manifest

    def _first(self) -> Manifest:
        kernel = self.check.kexec
        return Manifest(
            run=self.run_id,
            boot_id=proc.boot_id(),
            release_before=os.uname().release,
            release=kernel.release or os.path.basename(kernel.image) or "unknown",
            command_line=kernel.command_line,
            time=time.time(),
            guests=self.saving.known(),
            phase=Phase.SAVING,
        )

    def _write(self, manifest: Manifest) -> None:
        manifests.write(self.directory, manifest)
        self.manifest = manifest

    def _write_guests(
        self, phase: Phase | None = None, guests: Sequence[manifests.SavedGuest] | None = None
    ) -> None:
        assert self.manifest is not None
        changed = manifests.with_guests(self.manifest, *(self.saving.known() if guests is None else guests))
        self._write(replace(changed, phase=phase or changed.phase))

    # -- what is said

    def _say(self, text: str, *, commit: bool = False) -> None:
        self.progress.event(
            "host", {"event": "step", "step": "Reboot", "text": text, "state": "doing", "commit": commit}
        )

    def _update(self, outcomes: Sequence[Outcome]) -> Update:
        for outcome in outcomes:
            told = {"status": str(outcome.status), "exit_code": outcome.exit_code, "where": outcome.where}
            self.progress.event(outcome.guest, {"event": "outcome", **told, "error": outcome.error or None})
        return Update(run_id=self.run_id, outcomes=tuple(outcomes))

    def _outcome(self, examined: Examined, status: Status, code: Exit, where: str) -> Outcome:
        guest = examined.guest
        assert guest is not None
        return Outcome(
            guest=examined.label,
            uuid=guest.uuid,
            status=status,
            exit_code=int(code),
            where=where,
            engine="reboot",
            pid_before=guest.process.pid,
            runstate=guest.runstate,
            binary_before=guest.binary,
            total_seconds=time.monotonic() - self.began,
            findings=examined.findings,
            notes=tuple(self.saving.notes.get(guest.process.pid, ())),
        )

    def _saved(self, examined: Examined) -> Outcome:
        return self._outcome(examined, Status.SAVED, Exit.OK, SAVED)

    def _undone(self, examined: Examined, went: WentOn, error: BaseException, more: list[str]) -> Outcome:
        code = Exit.ROLLED_BACK
        if isinstance(error, Blocked):
            code = Exit.BLOCKED
        if isinstance(error, Interrupted):
            code = self.stop.requested() or Exit.INTERRUPTED
        status = Status.BLOCKED if code is Exit.BLOCKED else Status.ROLLED_BACK
        if not went.well:
            code, status = Exit.NEEDS_ATTENTION, Status.NEEDS_ATTENTION
        outcome = self._outcome(examined, status, code, went.where)
        return replace(
            outcome,
            pid_after=outcome.pid_before,
            runstate=went.runstate,
            error="; ".join([words(error), *went.failed, *more]),
            hint=error.hint if isinstance(error, CprError) else "",
        )
