"""After the boot: bring back every guest that was saved for it, or some by name."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from cpr.app import bringback
from cpr.app.finish import about_to_jump, finish_loaded, is_jumping
from cpr.app.update import Update
from cpr.app.world import World, real_world
from cpr.errors import Blocked, NoSuchGuest
from cpr.linux import proc
from cpr.model import Outcome, Status
from cpr.reboot import manifest as manifests
from cpr.reboot import store
from cpr.reboot.manifest import Phase, RamCopy, Result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from cpr.errors import Exit
    from cpr.progress import Progress
    from cpr.reboot.manifest import Manifest, SavedGuest


def restore(
    names: Sequence[str],
    *,
    qemu: str = "",
    directory: str = "",
    give_up: bool = False,
    progress: Progress,
    interrupted: Callable[[], Exit | None] = lambda: None,
    world: World | None = None,
) -> Update:
    """Bring back the named guests of the open manifest, all where none is named; one that fails stops no other.

    `qemu`: a path, or `old`. `directory`: of another run than the open one. `give_up`: they are not brought back, and
    nobody is to try again.

    Raises:
        NotFound: no manifest, or no such guest in it. ManifestError. Busy: somebody else does it.
        Blocked: it is of this boot, and was not brought to an end, or the host is about to jump.
    """
    world = world or real_world()
    path = os.path.join(os.path.abspath(directory), manifests.NAME) if directory else store.current()
    with store.hold(path, "restore"):
        manifest = manifests.read_file(path)
        if is_jumping(manifest):
            raise about_to_jump(manifest)
        if manifest.boot_id == proc.boot_id() and manifest.phase is not Phase.COMMITTED:
            why = f"run {manifest.run} is of this boot, and was interrupted ({manifest.phase})"
            raise Blocked(why, hint="cpr recover", where="the guests are in their old QEMUs")
        loaded = () if give_up else finish_loaded(path, manifest.guests)
        manifest = manifests.read_file(path)
        chosen = tuple(find(manifest, name) for name in names) if names else manifest.open
        if give_up:
            return Update(run_id=manifest.run, outcomes=tuple(_given_up(path, manifest, chosen)))
        backs = bringback.bring_back(
            path,
            manifest,
            {g.pid: g for g in chosen}.values(),
            qemu=qemu,
            world=world,
            interrupted=interrupted,
            progress=lambda saved, text: progress.event(
                saved.label, {"event": "step", "step": "Restore", "text": text, "state": "doing", "commit": False}
            ),
        )
        kernel = _kernel_note(manifest)
        outcomes = tuple(replace(o, notes=(*o.notes, *kernel)) for o in (back.outcome() for back in backs))
        return Update(run_id=manifest.run, outcomes=loaded + outcomes)


def find(manifest: Manifest, name: str) -> SavedGuest:
    """A guest by name, uuid or the pid that it had. Raises NoSuchGuest."""
    for guest in manifest.guests:
        if name in (guest.name, guest.uuid, str(guest.pid)):
            return guest
    raise NoSuchGuest(name, [g.label for g in manifest.guests], hint="these were saved for the reboot")


def _kernel_note(manifest: Manifest) -> tuple[str, ...]:
    release = os.uname().release
    if not manifest.release or manifest.release in (release, "unknown"):
        return ()
    return (f"the host was to run the kernel {manifest.release}, and runs {release}",)


def _ram_now(guest: SavedGuest) -> str:
    return "its RAM was not touched" if guest.ram_copy is RamCopy.NONE else "the copy of its RAM was in that"


def _given_up(path: str, manifest: Manifest, guests: Iterable[SavedGuest]) -> Iterable[Outcome]:
    for guest in guests:
        if guest.restore.result is not Result.OPEN:
            raise Blocked(f"{guest.label} is {guest.restore.result} already", where="where it was")
        manifest = manifests.noted(path, manifest, guest.pid, result=Result.GIVEN_UP, words="given up by name")
        yield Outcome(
            guest=guest.label,
            uuid=guest.uuid,
            status=Status.SKIPPED,
            exit_code=0,
            where=f"given up: it runs nowhere, and its state is removed; {_ram_now(guest)}",
            engine="reboot",
            pid_before=guest.pid,
        )
    store.clean(path, manifest)
