"""Whether a systemd unit may start its guest afresh: not while that guest is saved, nor when it was brought back.

Every run of the state directory counts, not only the open one: a guest that is back runs beside its unit, which knows
nothing of it.

Out of scope: guests saved by hand, whose files lie where their users put them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cpr.errors import CprError
from cpr.linux.process import open_process
from cpr.reboot import manifest as manifests
from cpr.reboot import store
from cpr.reboot.manifest import Phase, Result

if TYPE_CHECKING:
    from cpr.reboot.manifest import Manifest, SavedGuest


def claim_on(unit: str, base: str | None = None) -> str:
    """Why `unit` must not start its guest afresh, in words; "" if it may.

    `base`: the state directory. A manifest that cannot be read is a reason, while it is the open one.
    """
    runs = os.path.join(base or store.state_directory(), "reboot")
    try:
        names = sorted(entry.name for entry in os.scandir(runs) if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{runs} cannot be read: {error.strerror}"
    for name in reversed(names):
        try:
            manifest = manifests.read(os.path.join(runs, name))
        except CprError as error:
            if _is_current(runs, name):
                return f"what is saved cannot be read: {error.message}"
            continue
        for guest in manifest.guests:
            if guest.unit == unit and (why := _claim(manifest, guest)):
                return why
    return ""


def _is_current(runs: str, name: str) -> bool:
    try:
        return os.path.basename(os.readlink(os.path.join(runs, store.CURRENT))) == name
    except OSError:
        return False


def _claim(manifest: Manifest, guest: SavedGuest) -> str:
    restore = guest.restore
    if restore.result is Result.OPEN:
        if manifest.phase in (Phase.UNDOING, Phase.UNDONE):
            return ""
        if manifest.phase is Phase.SAVING and not _lives(guest.pid, guest.process.start_time):
            return ""  # it ended before it was saved
        return f"{guest.label} is saved (run {manifest.run}), and `cpr restore` brings it back, or gives it up"
    if restore.result in (Result.LOADED, Result.RESTORED) and _lives(restore.pid, restore.start_time):
        return f"{guest.label} was brought back and runs as pid {restore.pid}"
    return ""


def _lives(pid: int, start_time: int) -> bool:
    try:
        open_process(pid, start_time).close()
    except (CprError, OSError):
        return False
    return True
