"""How a reboot, or a save by hand, stands: told from its manifest.

    reboots, untold = stories()
    it.counts                     {Place.BACK: 2, Place.WAITING: 1}
    it.next                       "cpr restore"

Out of scope: restarts (journal.py), and doing anything about it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from cpr.errors import CprError, ManifestError, NotFound
from cpr.linux import proc
from cpr.reboot import manifest as manifests
from cpr.reboot import store
from cpr.reboot.manifest import Mode, Phase, Result

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cpr.reboot.manifest import Manifest, SavedGuest

AS_ROOT = "what is saved for a reboot is root's alone: run cpr as root"


class Place(StrEnum):
    """Where a guest is, as far as the manifest says."""

    BACK = "back"
    WAITING = "waiting"
    """Saved: it runs nowhere."""
    LOADED = "loaded"
    """A new QEMU has its state, and may not have been told to go on."""
    INTERRUPTED = "interrupted"
    """In its old QEMU, and may stand still."""
    LOST = "lost"
    """The host went down before it was saved, or its RAM did with the host."""
    CONTINUED = "continued"
    """It went on in its old QEMU."""
    GIVEN_UP = "given_up"


NOT_OVER = (Place.WAITING, Place.LOADED, Place.INTERRUPTED, Place.LOST)
_RESULTS = {
    Result.LOADED: Place.LOADED,
    Result.RESTORED: Place.BACK,
    Result.CONTINUED: Place.CONTINUED,
    Result.GIVEN_UP: Place.GIVEN_UP,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """One run of `cpr update --kexec`, or of `cpr save`."""

    manifest: Manifest
    path: str
    """Of the manifest."""
    here: bool
    """This boot is the one that its guests were saved in."""
    current: bool = False
    """`cpr restore` means this one."""
    worker: str = ""
    """Who works on it at this moment."""

    @property
    def by_hand(self) -> bool:
        """Nobody wanted to jump."""
        return not self.manifest.release

    @property
    def file(self) -> str:
        """What a save by hand was named."""
        return self.path.removesuffix(store.MANIFEST_SUFFIX)

    def place(self, guest: SavedGuest) -> Place:
        manifest, result = self.manifest, guest.restore.result
        unsettled = self.here and result in (Result.OPEN, Result.CONTINUED)
        if unsettled and manifest.phase in (Phase.SAVING, Phase.SAVED, Phase.UNDOING):
            return Place.INTERRUPTED
        if result is not Result.OPEN:
            return _RESULTS[result]
        if manifest.phase is Phase.UNDONE:
            return Place.CONTINUED
        if guest.state is None or (manifest.mode is Mode.RESTART and not self.here):
            return Place.LOST
        return Place.WAITING

    @property
    def counts(self) -> Mapping[Place, int]:
        """How many guests are where; those that nobody waits for come last."""
        found = Counter(self.place(guest) for guest in self.manifest.guests)
        return {place: found[place] for place in sorted(found, key=list(Place).index)}

    @property
    def open(self) -> bool:
        """Somebody has to do something about it."""
        return any(place in NOT_OVER for place in self.counts)

    @property
    def next(self) -> str:
        """What a person would do now; "" for nothing."""
        places = set(self.counts)
        if self.worker or not self.open:
            return ""
        if self.by_hand:
            return self._next_by_hand(places)
        if self.here and places != {Place.LOST}:
            unless = ", if the host does not go down" if self.manifest.phase is Phase.JUMPING else ""
            return f"cpr recover{unless}"
        directory = "" if self.current else f" --directory {shlex.quote(os.path.dirname(self.path))}"
        if places & {Place.WAITING, Place.LOADED}:
            return f"cpr restore{directory}"
        lost = [g.name or g.uuid or str(g.pid) for g in self.manifest.guests if self.place(g) is Place.LOST]
        return f"cpr restore{directory} --give-up {shlex.join(lost)}, and start afresh"

    def _next_by_hand(self, places: set[Place]) -> str:
        if places & {Place.INTERRUPTED, Place.LOADED}:
            return f"cpr recover {shlex.quote(self.path)}"
        return f"cpr load {shlex.quote(self.file)}" if Place.WAITING in places else "start it afresh"


def story(path: str) -> Story:
    """Of the manifest at `path`. Raises NotFound: there is none. ManifestError."""
    manifest = manifests.read_file(path)
    return Story(
        manifest=manifest,
        path=path,
        here=manifest.boot_id == proc.boot_id(),
        current=os.path.basename(path) == manifests.NAME and store.is_current(os.path.dirname(path)),
        worker=store.working_on(path),
    )


def stories(base: str | None = None) -> tuple[tuple[Story, ...], tuple[CprError, ...]]:
    """All that the state directory knows of, the oldest first; and what keeps others from being told."""
    try:
        paths = (*store.runs(base), *(path for _, path in store.by_hand(base)))
    except OSError as error:
        return (), (CprError(f"{error.filename} cannot be read: {error.strerror}", hint=AS_ROOT, where=""),)
    found: list[Story] = []
    untold: list[CprError] = []
    for path in paths:
        try:
            found.append(story(path))
        except ManifestError as error:
            untold.append(error)
        except NotFound:
            continue  # it came to nothing before there was one, or was thrown away
    return tuple(sorted(found, key=lambda it: it.manifest.time)), tuple(untold)


def find(run: str, base: str | None = None) -> Story | None:
    """That of one run; None: there is none. Raises ManifestError: it cannot be told. OSError: nobody may look."""
    for path in store.runs(base):
        if os.path.basename(os.path.dirname(path)) == run:
            return story(path)
    for _, path in store.by_hand(base):
        with contextlib.suppress(NotFound):
            if (it := story(path)).manifest.run == run:
                return it
    return None
