"""Finishing or undoing a save that was interrupted, in the boot that it was begun in, by what its manifest says.

    a guest whose old QEMU lives                 goes on in it; that its state is void is written down before
    one that has ended, and was saved            is restored, in the copy of the old QEMU
    one whose state was loaded already           is told to go on
    one that has ended, and was not saved        is lost, and said so

After a boot it is `cpr restore` that goes on; only what is loaded already is told to run.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from cpr.app import bringback
from cpr.app.examine import in_parallel
from cpr.errors import AS_BEFORE, NEEDS_YOU, Blocked, Busy, CprError, Exit
from cpr.linux import proc
from cpr.linux.process import lives, open_process
from cpr.model import Outcome, ProcessId, Status
from cpr.qemu import qmp
from cpr.reboot import manifest as manifests
from cpr.reboot import store
from cpr.reboot.goingon import go_on, is_stuck
from cpr.reboot.manifest import Phase, Result
from cpr.reboot.restoring import settle
from cpr.reboot.saving import end

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cpr.app.world import World
    from cpr.linux.lock import ProcessLock
    from cpr.reboot.manifest import Manifest, SavedGuest

JOBS = 16
MONITOR_SECONDS = 10.0


def watched(path: str) -> bool:
    """Whether a guardian has anything to do: not once the jump has begun, nor where all is over."""
    manifest = manifests.read_file(path)
    return manifest.phase not in (Phase.JUMPING, Phase.UNDONE) and manifest.boot_id == proc.boot_id()


def claimed(process: ProcessId) -> CprError | None:
    """A reboot that was interrupted and left this QEMU as it was saved, as far as we may look."""
    with contextlib.suppress(CprError, OSError):
        manifest = manifests.read_file(store.current())
        if manifest.boot_id == proc.boot_id() and any(g.process == process for g in manifest.open):
            holder = {"run": manifest.run}
            return Busy(f"run {manifest.run} was interrupted and is not recovered", holder, hint="cpr recover")
    return None


def finish(path: str, world: World, *, patience: float = 0.0) -> tuple[Outcome, ...]:
    """Bring every guest of the manifest at `path` to where it runs; what became of each. Safe to repeat.

    `patience`: seconds that whoever holds the manifest is waited for.

    Raises:
        Busy: somebody works on it. Blocked: the host is going down. NotFound, ManifestError, OSError.
    """
    with _held(path, patience):
        manifest = manifests.read_file(path)
        if is_jumping(manifest):
            if world.going_down():
                raise about_to_jump(manifest)
            manifests.write_file(path, replace(manifest, phase=Phase.COMMITTED))
        return finish_held(path, world)


def is_jumping(manifest: Manifest) -> bool:
    """The jump was asked for, and this is still the old boot: it may come at any moment, or was not made."""
    return manifest.phase is Phase.JUMPING and manifest.boot_id == proc.boot_id()


def about_to_jump(manifest: Manifest) -> Blocked:
    """What is said to whoever would bring guests back into a host that goes down."""
    return Blocked(
        f"run {manifest.run}: the host is about to jump into {manifest.release}, and was not booted since",
        hint="after the boot cpr restore brings them back; for no jump, stop the shutdown (systemctl cancel), and have "
        "cpr recover bring them back here",
        where="the guests are saved: they run nowhere, their RAM and state are as they were",
    )


def finish_held(path: str, world: World) -> tuple[Outcome, ...]:
    """As `finish`, by who holds the manifest."""
    manifest = manifests.read_file(path)
    if manifest.phase is Phase.UNDONE:
        return ()
    if manifest.boot_id != proc.boot_id():
        return finish_loaded(path, manifest.guests)
    if manifest.release:
        with contextlib.suppress(CprError):
            world.unload_kernel()
    alive = {g.pid for g in manifest.guests if lives(g.process.pid, g.process.start_time)}
    stuck = {g.pid for g in manifest.open if g.pid in alive and _ended_as_stuck(g)}
    alive -= stuck
    going = [g for g in manifest.guests if g.pid in alive and g.restore.result in (Result.OPEN, Result.CONTINUED)]
    manifest = _void(path, manifest, going)
    outcomes = list(in_parallel(_continue, going, JOBS))
    ended = [g for g in manifest.open if g.pid not in alive]
    # one that is saved by hand was to end, and may be loaded when somebody wants it
    sealed = tuple(g for g in ended if g.state is not None and (manifest.release or g.pid in stuck))
    if sealed:
        backs = bringback.bring_back(path, manifest, sealed, qemu=_qemu(sealed), world=world)
        outcomes += [_came_back(back) for back in backs]
        manifest = manifests.read_file(path)
    outcomes += [_lost(g) for g in ended if g.state is None]
    outcomes += finish_loaded(path, manifest.guests)
    if all(outcome.exit_code != Exit.NEEDS_ATTENTION for outcome in outcomes) and not _left(manifest):
        manifests.write_file(path, replace(manifests.read_file(path), phase=Phase.UNDONE))
        store.clean(path, manifest)
        if not manifest.release:
            store.forget(path)
    return tuple(outcomes)


def _left(manifest: Manifest) -> bool:
    """Guests that are saved and wait for somebody."""
    return any(g.state is not None for g in manifest.open)


def _held(path: str, patience: float) -> ProcessLock:
    end = time.monotonic() + patience
    while True:
        try:
            return store.hold(path, "recover")
        except Busy:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def _ended_as_stuck(saved: SavedGuest) -> bool:
    """Whether it was saved while it slept, so that it goes on in another QEMU only; then this one is ended."""
    if saved.state is None or saved.guest is None or saved.monitor is None:
        return False
    with (
        contextlib.suppress(CprError, OSError),
        open_process(saved.pid, saved.process.start_time) as process,
        qmp.connect(saved.monitor, saved.pid, timeout=MONITOR_SECONDS) as monitor,
    ):
        if is_stuck(monitor, saved.guest, suspended=saved.suspended):
            end(monitor, process, saved.guest)
            return True
    return False


def _void(path: str, manifest: Manifest, going: list[SavedGuest]) -> Manifest:
    """Their states may not be loaded any more, from before the first of them runs."""
    if not going:
        return manifest
    gone_on = [replace(g, restore=replace(g.restore, result=Result.CONTINUED, time=time.time())) for g in going]
    manifest = manifests.with_guests(manifest, *gone_on)
    if manifest.phase in (Phase.SAVING, Phase.SAVED):
        manifest = replace(manifest, phase=Phase.UNDOING)
    manifests.write_file(path, manifest)
    return manifest


def _continue(saved: SavedGuest) -> Outcome:
    """It goes on in its old QEMU."""
    assert saved.guest is not None
    assert saved.monitor is not None
    try:
        with qmp.connect(saved.monitor, saved.pid, timeout=MONITOR_SECONDS) as monitor:
            went = go_on(saved.guest, monitor, suspended=saved.suspended)
    except CprError as error:
        return _needs(saved, f"its old QEMU (pid {saved.pid}) could not be told to go on", error.message)
    if not went.well:
        return _needs(saved, went.where.removeprefix(f"{NEEDS_YOU}: "), "; ".join(went.failed))
    return Outcome(
        guest=saved.label,
        uuid=saved.uuid,
        status=Status.ROLLED_BACK,
        exit_code=int(Exit.ROLLED_BACK),
        where=went.where,
        engine="reboot",
        pid_before=saved.pid,
        pid_after=saved.pid,
        runstate=went.runstate,
        binary_before=saved.binary_before,
        binary_after=saved.binary_before,
        error="; ".join(went.failed),
        notes=("finished by recover",),
    )


def _needs(saved: SavedGuest, where: str, error: str) -> Outcome:
    return Outcome(
        guest=saved.label,
        uuid=saved.uuid,
        status=Status.NEEDS_ATTENTION,
        exit_code=int(Exit.NEEDS_ATTENTION),
        where=f"{NEEDS_YOU}: {where}",
        engine="reboot",
        pid_before=saved.pid,
        binary_before=saved.binary_before,
        error=error,
        hint="cpr recover tries again",
    )


def _lost(saved: SavedGuest) -> Outcome:
    where = "its QEMU has ended by itself before it was saved"
    return replace(_needs(saved, where, ""), hint="look at the guest's own log, and start it afresh")


def _qemu(sealed: tuple[SavedGuest, ...]) -> str:
    return bringback.OLD if sealed and all(g.pinned_binary for g in sealed) else ""


def _came_back(back: bringback.Back) -> Outcome:
    """Restored in the boot that it was saved in: as before, but for its pid."""
    outcome = back.outcome()
    if back.restored is None:
        return outcome
    return replace(outcome, status=Status.ROLLED_BACK, exit_code=int(Exit.ROLLED_BACK), where=AS_BEFORE)


def finish_loaded(path: str, guests: Iterable[SavedGuest]) -> tuple[Outcome, ...]:
    """Of those whose state was loaded by a restore that died then: they go on. The manifest is held."""
    outcomes = tuple(_loaded(path, g) for g in guests if g.restore.result is Result.LOADED)
    if outcomes:
        store.clean(path, manifests.read_file(path))
    return outcomes


def _loaded(path: str, saved: SavedGuest) -> Outcome:
    """Its new QEMU has the state, and may not have been told to go on."""
    new = ProcessId(saved.restore.pid, saved.restore.start_time)
    if not lives(new.pid, new.start_time):
        where = f"the QEMU that had loaded its state (pid {new.pid}) has ended: its RAM may have moved on"
        return replace(_needs(saved, where, ""), hint="it cannot be loaded again; start it afresh")
    assert saved.monitor is not None
    assert saved.guest is not None
    try:
        with qmp.connect(saved.monitor, new.pid, timeout=MONITOR_SECONDS) as monitor:
            settled = settle(saved, saved.guest, monitor, new.pid, new.start_time)
    except CprError as error:
        return _needs(saved, f"its new QEMU (pid {new.pid}) could not be told to go on", error.message)
    manifests.noted(path, manifests.read_file(path), saved.pid, result=Result.RESTORED)
    settled.notes.append("finished by recover")
    return bringback.Back(saved=saved, restored=settled).outcome()
