"""Bringing the guests of a manifest back, several at a time, each written down before it runs."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cpr.app.examine import in_parallel
from cpr.errors import NEEDS_YOU, RUNS_NEW, BinaryUnusable, CprError, Exit, Interrupted
from cpr.journal import run_directory
from cpr.model import Outcome, Status, Target
from cpr.names import file_name
from cpr.reboot import manifest as manifests
from cpr.reboot import store
from cpr.reboot.manifest import Result
from cpr.reboot.restoring import NotRestored, Program, restore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cpr.app.world import World
    from cpr.reboot.manifest import Manifest, SavedGuest
    from cpr.reboot.restoring import Restored

OLD = "old"
"""--qemu old: the copy of the QEMU that the guest was saved from."""
JOBS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Back:
    """What became of one guest."""

    saved: SavedGuest
    restored: Restored | None = None
    target: Target | None = None
    error: CprError | None = None
    seconds: float = 0.0

    def outcome(self, code: Exit = Exit.NEEDS_ATTENTION) -> Outcome:
        """`code`: where it is not back."""
        saved, restored = self.saved, self.restored
        known = {"guest": saved.label, "uuid": saved.uuid, "pid_before": saved.pid, "engine": "reboot"}
        if restored is None:
            assert self.error is not None
            return Outcome(
                **known,  # type: ignore[arg-type]
                status=Status.NEEDS_ATTENTION,
                exit_code=int(code),
                where=f"{NEEDS_YOU}: {self.error.where}",
                binary_before=saved.binary_before,
                total_seconds=self.seconds,
                error=self.error.message,
                hint=self.error.hint,
            )
        stood = None
        if restored.resumed_at is not None and saved.stopped_at is not None:
            stood = max(0.0, restored.resumed_at - saved.stopped_at)
        return Outcome(
            **known,  # type: ignore[arg-type]
            status=Status.UPDATED,
            exit_code=int(Exit.DIFFERS if restored.differences else Exit.OK),
            where=RUNS_NEW,
            pid_after=restored.pid,
            runstate=restored.runstate,
            binary_before=saved.binary_before,
            binary_after=self.target.binary if self.target is not None else None,
            blackout_seconds=stood,
            total_seconds=self.seconds,
            error="; ".join(restored.differences),
            notes=tuple(restored.notes),
        )


class _Book:
    """The manifest on disk, written by several threads."""

    def __init__(self, path: str, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._lock = threading.Lock()

    def note(self, saved: SavedGuest, **changed: object) -> None:
        """What became of a guest; on disk when it returns. OSError: it is not."""
        with self._lock:
            self.manifest = manifests.noted(self.path, self.manifest, saved.pid, **changed)


def bring_back(
    path: str,
    manifest: Manifest,
    guests: Iterable[SavedGuest],
    *,
    qemu: str = "",
    world: World,
    jobs: int = JOBS,
    progress: Callable[[SavedGuest, str], None] = lambda guest, text: None,
    interrupted: Callable[[], Exit | None] = lambda: None,
) -> tuple[Back, ...]:
    """Restore guests of the manifest at `path`, which the caller holds. One that fails does not stop the others.

    `qemu`: "" for the QEMU that was meant when it was saved, and where that does not take it the old one; a path, or
    `old`, for this one and no other. Once `interrupted` answers, what is not loaded stays saved.
    """
    book = _Book(path, manifest)

    def attend() -> None:
        if interrupted() is not None:
            raise Interrupted("interrupted")

    def one(saved: SavedGuest) -> Back:
        began = time.monotonic()
        progress(saved, "restore")
        try:
            attend()
            target, restored = _restore(saved, manifest, book, qemu, world, attend)
            back = Back(saved=saved, restored=restored, target=target)
        except CprError as error:
            back = Back(saved=saved, error=error)
        except OSError as error:
            back = Back(saved=saved, error=NotRestored(f"{saved.label} is not restored: {error}"))
        if back.error is not None and saved.restore.result is Result.OPEN:
            with contextlib.suppress(OSError):
                book.note(saved, words=back.error.message, tries=saved.restore.tries + 1)
        return replace(back, seconds=time.monotonic() - began)

    backs = in_parallel(one, guests, jobs)
    store.clean(path, book.manifest)
    return backs


def _restore(
    saved: SavedGuest, manifest: Manifest, book: _Book, qemu: str, world: World, attend: Callable[[], None]
) -> tuple[Target, Restored]:
    """In the QEMU that is wanted, or, where nobody named one, in the old one."""
    wanted = OLD if qemu == OLD else qemu or saved.binary_after.path
    try:
        return _restore_in(saved, manifest, book, wanted, world, attend)
    except (NotRestored, BinaryUnusable) as error:
        result = next(g.restore.result for g in book.manifest.guests if g.pid == saved.pid)
        if qemu or not saved.pinned_binary or result is not Result.OPEN:
            raise
        refused = error.message
    attend()
    target, restored = _restore_in(saved, manifest, book, OLD, world, attend)
    restored.differences.append(f"it is back in the old QEMU, for the new one did not take it: {refused}")
    return target, restored


def _restore_in(
    saved: SavedGuest, manifest: Manifest, book: _Book, wanted: str, world: World, attend: Callable[[], None]
) -> tuple[Target, Restored]:
    program = _program(saved, wanted, world)

    def loaded(pid: int, start_time: int) -> None:
        tries = saved.restore.tries + 1
        book.note(saved, result=Result.LOADED, pid=pid, start_time=start_time, words="", tries=tries)

    restored = restore(saved, manifest, program, log=_log(saved), loaded=loaded, attend=attend)
    try:
        book.note(saved, result=Result.RESTORED)
    except OSError as error:  # it is written down that it was loaded: that is what matters
        restored.differences.append(f"the manifest could not be written any more: {error}")
    return program.target, restored


def _program(saved: SavedGuest, wanted: str, world: World) -> Program:
    """Raises BinaryUnusable."""
    if wanted != OLD:
        return Program(target=world.ask(wanted, saved.options))
    if not saved.pinned_binary:
        raise BinaryUnusable(saved.label, "no copy of its old QEMU was kept", hint="--qemu takes a path")
    if not os.path.isfile(saved.pinned_binary):
        raise BinaryUnusable(saved.pinned_binary, "the copy of its old QEMU is gone", hint="--qemu takes a path")
    return Program(target=_as_it_was(saved), copy=True)


def _as_it_was(saved: SavedGuest) -> Target:
    """The old QEMU takes its old command line: it need not be asked, and nothing is translated."""
    return Target(
        binary=replace(saved.binary_before, path=saved.pinned_binary),
        machines=frozenset(),
        machine_aliases={},
        device_types=frozenset(),
        commands=frozenset(),
        migrate_modes=frozenset(),
        capabilities=frozenset(),
        options=None,
        extra_options=saved.guest.added_options if saved.guest is not None else (),
    )


def _log(saved: SavedGuest) -> str:
    directory = os.path.join(run_directory(), "guests")
    os.makedirs(directory, mode=0o755, exist_ok=True)
    return os.path.join(directory, f"{file_name(saved.label)}-{saved.pid}.log")
