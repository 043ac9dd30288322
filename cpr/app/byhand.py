"""One guest saved to a file, or loaded from one, by hand and without a jump: `cpr save` and `cpr load`."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cpr.app import bringback, savable
from cpr.app.examine import Examined, Examiner
from cpr.app.finish import finish_held
from cpr.app.world import Choices, World, real_world
from cpr.checks.binary import same_binary
from cpr.checks.reboot import copied
from cpr.errors import (
    AS_BEFORE,
    Blocked,
    Busy,
    CprError,
    Exit,
    Interrupted,
    ManifestError,
    NotFound,
    UsageError,
    words,
)
from cpr.journal import run_directory
from cpr.linux import proc
from cpr.linux.lock import LockHeld, make_run_directory, process_lock
from cpr.reboot import manifest as manifests
from cpr.reboot import store
from cpr.reboot.manifest import Manifest, Mode, Phase, Result
from cpr.reboot.saving import Saver
from cpr.reboot.trial import try_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cpr.app.bringback import Back
    from cpr.model import Guest, NextKernel
    from cpr.reboot.goingon import WentOn
    from cpr.reboot.manifest import SavedGuest


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What came of `save`: where there is no manifest the guest was refused and not touched."""

    examined: Examined
    path: str
    manifest: Manifest | None = None
    seconds: float = 0.0
    """From the first look to its end."""
    notes: tuple[str, ...] = ()

    @property
    def guest(self) -> SavedGuest | None:
        return self.manifest.guests[0] if self.manifest is not None else None


class SaveFailed(CprError):
    """It could not be saved; `where` says where the guest is."""

    code = Exit.ROLLED_BACK
    where = AS_BEFORE


def save(
    name: str,
    path: str,
    mode: Mode,
    choices: Choices,
    *,
    save_ram: str = "",
    interrupted: Callable[[], Exit | None] = lambda: None,
    world: World | None = None,
) -> Saved:
    """Save one guest to `path`, with a manifest and a copy of its QEMU beside it, and end it. All or nothing.

    `save_ram`: a directory to which its RAM is copied, and its state with it, where a boot would take that; what is at
    `path` then is the manifest and the copy alone.

    Raises:
        UsageError: there is something at `path` already. SaveFailed: it runs on. Blocked: the QEMU that is to load it
            does not take its state, and it runs on. CprError, OSError: not touched.
    """
    world = world or real_world()
    path = os.path.abspath(path)
    for there in (path, path + store.MANIFEST_SUFFIX, path + store.OLD_SUFFIX):
        if os.path.lexists(there):
            raise UsageError(f"{there} is there already", hint="name another file, or load what is saved there")
    candidate = world.find(name)
    # nobody jumps: systemd need not be asked
    kexec = world.next_kernel(os.path.dirname(path), restoring=False, save_ram=save_ram)
    passed_over = savable.OF_THE_JUMP | (savable.OF_THE_BOOT if mode is Mode.RESTART else frozenset())
    examined = savable.examine(Examiner(world=world, choices=choices), candidate, kexec, passed_over=passed_over)
    if examined.error is not None or examined.guest is None:
        return Saved(examined=examined, path=path)

    def attend() -> None:
        code = interrupted()
        if code is not None:
            raise Interrupted("interrupted", where=AS_BEFORE)

    lost = frozenset(block.id for block in copied(examined.guest, kexec))
    state = _beside_its_ram(examined.guest, path, save_ram) if lost else path

    manifest_path = path + store.MANIFEST_SUFFIX
    with locked(examined.guest, "save"), store.hold(manifest_path, "save"), contextlib.ExitStack() as held:
        began = time.monotonic()
        try:
            pinned = store.pin(examined.guest.process.pid, path + store.OLD_SUFFIX)
            saver = Saver(
                examined.guest, state, target=examined.target, pinned=pinned, lost=lost, attend=attend
            )
            manifest = _manifest(saver.prepare(), kexec, mode)
            manifests.write_file(manifest_path, manifest)
            _note(manifest_path, manifest)
            held.enter_context(world.guard(manifest_path))
        except BaseException:
            store.forget(manifest_path)
            raise
        try:
            notes = _tried(saver, examined)
            attend()
            if manifest.guests[0].vfio:
                saver.suspend()
            saver.save()
            manifest = manifests.with_guests(manifest, saver.seal())
            manifests.write_file(manifest_path, _at(manifest, Phase.SAVED))
            manifest = _at(manifest, Phase.COMMITTED)
            manifests.write_file(manifest_path, manifest)
            saver.quit()
        except BaseException as error:
            if saver.stuck:
                raise _through_its_state(saver, manifest_path, manifest, world) from error
            _void(manifest_path, manifest, state)
            _undone(saver.undo(), error, manifest_path)
        if mode is Mode.REBOOT:
            os.sync()  # RAM in a file on a disk
        seconds = time.monotonic() - began
        return Saved(examined=examined, path=path, manifest=manifest, seconds=seconds, notes=notes)


def _note(path: str, manifest: Manifest) -> None:
    """For `cpr runs` and, where it matters, for `cpr may-start`.

    Raises:
        Blocked: nobody could tell its service that it is saved.
    """
    (guest,) = manifest.guests
    try:
        store.note_by_hand(path, manifest)
    except (ManifestError, OSError) as error:
        if guest.unit.endswith(".service"):
            raise Blocked(
                f"{guest.unit} could start {guest.label} afresh while it is saved: that it is cannot be noted in "
                f"{store.state_directory()} ({words(error)})",
                hint="run cpr as root, or name a directory of your own in CPR_STATE_DIR",
            ) from None


def _tried(saver: Saver, examined: Examined) -> tuple[str, ...]:
    """What there is to say of its state in another QEMU than its own, if one is to load it. Raises StateNotAccepted."""
    guest, target = examined.guest, examined.target
    if guest is None or target is None or same_binary(guest.binary, target.binary):
        return ()
    return try_state(saver, target)


def _beside_its_ram(guest: Guest, path: str, save_ram: str) -> str:
    name = f"{os.path.basename(path)}-{int(time.time())}-{store.state_name(guest.name, guest.process.pid)}"
    return os.path.join(store.make_directory(save_ram), name)


def _through_its_state(saver: Saver, manifest_path: str, manifest: Manifest, world: World) -> CprError:
    """It sleeps and is saved: it goes on in a copy of its QEMU. What is to be said of it."""
    known = manifests.with_guests(manifest, saver.known)
    manifests.write_file(manifest_path, _at(known, Phase.SAVED))
    saver.close()
    for outcome in finish_held(manifest_path, world):
        if outcome.exit_code == Exit.NEEDS_ATTENTION:
            return NeedsAttention(outcome.error, where=outcome.where, hint=outcome.hint)
    return SaveFailed("it was not saved, and is back in a copy of its QEMU")


def _void(manifest_path: str, manifest: Manifest, state: str) -> None:
    """Before it runs on: its state may not be loaded any more. On a full disk the state goes instead."""
    gone_on = [replace(g, restore=replace(g.restore, result=Result.CONTINUED)) for g in manifest.guests]
    try:
        manifests.write_file(manifest_path, _at(manifests.with_guests(manifest, *gone_on), Phase.UNDOING))
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(state)


def _undone(went: WentOn, error: BaseException, manifest_path: str) -> None:
    """Raises what is to be said of it."""
    if went.well:
        store.forget(manifest_path)
    failed = f"; {'; '.join(went.failed)}" if went.failed else ""
    if isinstance(error, Interrupted) and went.well:
        raise Interrupted(f"interrupted{failed}", where=went.where)
    if not isinstance(error, (CprError, OSError)) or (isinstance(error, Blocked) and went.well and not failed):
        raise error
    failure = SaveFailed(f"it was not saved: {words(error)}{failed}", where=went.where)
    failure.hint = error.hint if isinstance(error, CprError) else ""
    if not went.well:
        raise NeedsAttention(failure.message, where=went.where, hint=f"cpr recover {manifest_path}")
    raise failure


class NeedsAttention(CprError):
    """A guest stands still."""

    code = Exit.NEEDS_ATTENTION


def _manifest(guest: SavedGuest, kexec: NextKernel, mode: Mode) -> Manifest:
    return Manifest(
        run=f"save-{guest.pid}-{int(time.time())}",
        boot_id=proc.boot_id(),
        release_before=os.uname().release,
        release="",
        command_line=kexec.command_line,
        time=time.time(),
        guests=(guest,),
        phase=Phase.SAVING,
        mode=mode,
    )


def _at(manifest: Manifest, phase: Phase) -> Manifest:
    return replace(manifest, phase=phase)


@contextlib.contextmanager
def locked(guest: Guest, command: str) -> Iterator[None]:
    """Nobody else of ours works on the guest. Raises Busy, OSError."""
    directory = run_directory()
    make_run_directory(directory)
    process = guest.process
    try:
        with process_lock(
            directory,
            process.pid,
            process.start_time,
            boot_id=proc.boot_id(),
            owner_uid=guest.uid,
            holder={"run": command, "command": command},
        ):
            yield
    except LockHeld as held:
        who = f"run {held.holder.get('run', '?')} (pid {held.holder.get('pid', '?')})"
        raise Busy(f"{who} is working on {guest.label}", held.holder, hint="wait for it") from None


def load(
    path: str,
    *,
    qemu: str = "",
    interrupted: Callable[[], Exit | None] = lambda: None,
    world: World | None = None,
) -> Back:
    """Load the guest that was saved to `path`. `qemu`: a path, `old` for the copy of the one it was saved from.

    Raises:
        NotFound: no manifest is beside it. NotRestorable: it is not what it was. NotRestored: QEMU does not take it.
        Busy: somebody else loads it.
    """
    world = world or real_world()
    path = os.path.abspath(path)
    manifest_path = path if path.endswith(store.MANIFEST_SUFFIX) else path + store.MANIFEST_SUFFIX
    if not os.path.lexists(manifest_path):
        raise NotFound(f"no guest is saved in {path}: there is no {manifest_path}", hint="cpr save makes both")
    with store.hold(manifest_path, "load"):
        manifest = manifests.read_file(manifest_path)
        if manifest.phase is not Phase.COMMITTED and manifest.boot_id == proc.boot_id():
            raise CprError(
                f"{path}: its save was not brought to an end ({manifest.phase})", hint=f"cpr recover {manifest_path}"
            )
        (back,) = bringback.bring_back(
            manifest_path, manifest, manifest.guests, qemu=qemu, world=world, interrupted=interrupted
        )
        if back.error is not None:
            raise back.error
        return back
