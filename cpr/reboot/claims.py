"""Whether a systemd unit may start its guest afresh: not while that guest is saved, nor when it was brought back.

Every run of the state directory counts, not only the open one: a guest that is back runs beside its unit, which knows
nothing of it. So does a guest that was saved by hand, as long as what it was saved to is there; and one whose QEMU was
replaced in place and had to be started again, which is another process than the unit's.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from cpr import journal
from cpr.errors import CprError, ManifestError, NotFound
from cpr.linux import proc
from cpr.linux.process import lives
from cpr.reboot import manifest as manifests
from cpr.reboot import store
from cpr.reboot.manifest import Mode, Phase, Result
from cpr.reboot.verifying import located, mapped_by

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cpr.journal import Record
    from cpr.model import ProcessId
    from cpr.reboot.manifest import Manifest, SavedGuest


def claim_on(unit: str, base: str | None = None, runs: str | None = None) -> str:
    """Why `unit` must not start its guest afresh, in words; "" if it may.

    `base`: the state directory, `runs`: the run directory. A manifest that cannot be read is a reason, while it is the
    open one, or the unit's; a journal that cannot be read is none.
    """
    try:
        return _of_reboots(unit, base) or _by_hand(unit, base) or _of_updates(unit, runs)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"


def _of_reboots(unit: str, base: str | None) -> str:
    for path in reversed(store.runs(base)):
        try:
            manifest = manifests.read_file(path)
        except CprError as error:
            if store.is_current(os.path.dirname(path)):
                return f"what is saved cannot be read: {error.message}"
            continue
        way = f"(run {manifest.run}), and `cpr restore` brings it back, or gives it up"
        for guest in manifest.guests:
            if guest.unit == unit and (why := _claim(manifest, guest, way)):
                return why
    return ""


def _by_hand(unit: str, base: str | None) -> str:
    for owner, path in reversed(store.by_hand(base)):
        if owner != unit:
            continue
        try:
            manifest = manifests.read_file(path)
        except ManifestError as error:
            return f"what is saved of it cannot be read: {error.message}"
        except NotFound:
            continue  # it was thrown away
        if manifest.mode is Mode.RESTART and manifest.boot_id != proc.boot_id():
            continue  # its RAM has ended with the host
        file = path.removesuffix(store.MANIFEST_SUFFIX)
        way = f"to {file}, and `cpr load {file}` goes on with it; who removes {path} gives it up"
        for guest in manifest.guests:
            if why := _claim(manifest, guest, way):
                return why
    return ""


def _of_updates(unit: str, base: str | None) -> str:
    """Of the guests that an update brought back outside of the unit, and wherever later ones have put them."""
    where: dict[tuple[int, int], tuple[int, int]] = {}
    away: list[tuple[Record, tuple[int, int] | None]] = []
    for record in _believed(base):
        before, back = (record.pid, record.start_time), _process(record, "back")
        if record.facts.get("outside", {}).get("unit") == unit:
            away.append((record, back))
        if (now := back or _process(record, "new")) is not None and lives(*now):
            where[before] = now
    for record, process in away:
        label = record.header["guest"]["name"] or f"pid {record.pid}"
        if process is None and record.open:
            return f"{label} is being brought back by an update (run {record.run}), outside of it"
        while process in where:
            process = where.pop(process)
        if process is not None and lives(*process):
            return f"{label} runs as pid {process[0]}, outside of it, since an update was undone (run {record.run})"
    return ""


def _believed(base: str | None) -> Iterator[Record]:
    """Journals of this boot that root or we have written, oldest first: everybody may put a file there."""
    for path in journal.journal_files(base):
        with contextlib.suppress(CprError, OSError):
            if os.stat(path, follow_symlinks=False).st_uid in (0, os.geteuid()):
                record = journal.read(path)
                if record.header["boot_id"] == proc.boot_id():
                    yield record


def _process(record: Record, fact: str) -> tuple[int, int] | None:
    """Pid and start time that a journal names."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return int(record.facts[fact]["pid"]), int(record.facts[fact]["start_time"])
    return None


def _claim(manifest: Manifest, guest: SavedGuest, way: str) -> str:
    restore = guest.restore
    if restore.result is Result.OPEN:
        if manifest.phase in (Phase.UNDOING, Phase.UNDONE):
            return ""
        if manifest.phase is Phase.SAVING and not lives(guest.pid, guest.process.start_time):
            return ""  # it ended before it was saved
        return f"{guest.label} is saved {way}"
    if restore.result not in (Result.LOADED, Result.RESTORED):
        return ""
    if lives(restore.pid, restore.start_time):
        return f"{guest.label} was brought back and runs as pid {restore.pid}"
    users = ", ".join(map(str, _users(guest)))
    return f"{guest.label} was brought back, and its RAM is in use by pid {users}" if users else ""


def _users(guest: SavedGuest) -> list[int]:
    """Who has its RAM mapped: an update may have moved it to another process since."""
    for ram in located(guest).ram:
        with contextlib.suppress(OSError):
            if found := mapped_by(ram.path, os.stat(ram.path)):
                return found
    return []


def unit_of(process: ProcessId, base: str | None = None) -> str:
    """The unit that a guest belongs to, "" for none: once it was brought back, still the one which had started it."""
    with contextlib.suppress(OSError):
        for path in (*store.runs(base), *(path for _, path in store.by_hand(base))):
            with contextlib.suppress(CprError):
                for guest in manifests.read_file(path).guests:
                    if (guest.restore.pid, guest.restore.start_time) == (process.pid, process.start_time):
                        return guest.unit
    return proc.unit_of(process.pid) or ""
