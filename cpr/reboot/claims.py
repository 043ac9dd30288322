"""Whether a systemd unit may start its guest afresh: not while that guest is saved, nor when it was brought back.

Every run of the state directory counts, not only the open one: a guest that is back runs beside its unit, which knows
nothing of it.

Out of scope: guests saved by hand, whose files lie where their users put them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cpr.errors import CprError
from cpr.linux.process import lives
from cpr.reboot import manifest as manifests
from cpr.reboot import store
from cpr.reboot.manifest import Phase, Result

if TYPE_CHECKING:
    from cpr.reboot.manifest import Manifest, SavedGuest


def claim_on(unit: str, base: str | None = None) -> str:
    """Why `unit` must not start its guest afresh, in words; "" if it may.

    `base`: the state directory. A manifest that cannot be read is a reason, while it is the open one.
    """
    try:
        paths = store.runs(base)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    for path in reversed(paths):
        try:
            manifest = manifests.read_file(path)
        except CprError as error:
            if store.is_current(os.path.dirname(path)):
                return f"what is saved cannot be read: {error.message}"
            continue
        for guest in manifest.guests:
            if guest.unit == unit and (why := _claim(manifest, guest)):
                return why
    return ""


def _claim(manifest: Manifest, guest: SavedGuest) -> str:
    restore = guest.restore
    if restore.result is Result.OPEN:
        if manifest.phase in (Phase.UNDOING, Phase.UNDONE):
            return ""
        if manifest.phase is Phase.SAVING and not lives(guest.pid, guest.process.start_time):
            return ""  # it ended before it was saved
        return f"{guest.label} is saved (run {manifest.run}), and `cpr restore` brings it back, or gives it up"
    if restore.result in (Result.LOADED, Result.RESTORED) and lives(restore.pid, restore.start_time):
        return f"{guest.label} was brought back and runs as pid {restore.pid}"
    return ""
