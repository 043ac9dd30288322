"""Whether a saved guest may be loaded: all that it was saved with is what it was. Nothing is made that is missing.

QEMU loads a state over any memory, and silently makes a RAM file that is not there (a regular one called /dev/dax0.0,
too), so everything is looked at before it is started.

Out of scope: loading (restoring.py).
"""

from __future__ import annotations

import contextlib
import glob
import os
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

from cpr.errors import CprError, Exit
from cpr.linux import dax, pci, proc, procfile
from cpr.linux.process import lives
from cpr.model import Backing
from cpr.persistence import identity
from cpr.reboot import stamp
from cpr.reboot.files import FileError, disk_differences, state_differences
from cpr.reboot.manifest import Mode, Result
from cpr.survey_host import existing_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cpr.reboot.manifest import Manifest, SavedGuest, SavedRam

KEEP = "keep its RAM and state as they are until the reason is known"


class NotRestorable(CprError):
    """A saved guest is refused, and nothing was started: `reasons` are all that was found."""

    code = Exit.BLOCKED
    where = "saved: it runs nowhere, its RAM and state were not touched"

    def __init__(self, label: str, reasons: tuple[str, ...], *, hint: str = KEEP) -> None:
        super().__init__(f"{label} is not restored: {'; '.join(reasons)}", hint=hint)
        self.reasons = reasons


def verify(
    saved: SavedGuest,
    manifest: Manifest,
    attend: Callable[[], None] = lambda: None,
    more: Sequence[str] = (),
    *,
    hint: str = "",
) -> None:
    """Raise NotRestorable with everything that speaks against loading it. `attend` is called now and then.

    `more`: what the caller has found, `hint`: the way out of that alone.
    """
    gone = _result(saved)
    if gone:
        raise NotRestorable(saved.label, (gone,), hint="cpr list shows the guests that run")
    rebooted = manifest.boot_id != proc.boot_id()
    if rebooted and manifest.mode is Mode.RESTART:
        why = "it was saved for a restart of QEMU, and the host was booted since: its RAM is gone"
        raise NotRestorable(saved.label, (why,), hint="start it afresh")
    if not rebooted and lives(saved.pid, saved.likeness.start_time):
        why = f"the QEMU that it was saved from (pid {saved.pid}) is still there"
        raise NotRestorable(saved.label, (why,), hint="cpr recover brings it to an end")
    reasons = [*_state(saved, attend), *(line for ram in saved.ram for line in _ram(ram))]
    reasons += [*_disks(saved), *_vfio(saved)]
    if saved.own_namespaces:
        reasons.append(f"it ran in namespaces of its own ({', '.join(saved.own_namespaces)}), which are gone")
    hint = KEEP if reasons else hint
    reasons += more
    if reasons:
        raise NotRestorable(saved.label, tuple(reasons), hint=hint)


def located(saved: SavedGuest) -> SavedGuest:
    """With the paths that its RAM has in this boot: names of DAX devices are counted anew."""
    ram = tuple(replace(r, path=_path_of(r)) if r.storage.kind is Backing.DEVDAX else r for r in saved.ram)
    return saved if ram == saved.ram else replace(saved, ram=ram)


def _path_of(ram: SavedRam) -> str:
    """The device that has the identity, whatever it is called; the old name where there is none."""
    wanted = identity(ram.storage)
    for path in [ram.path, *sorted(glob.glob("/dev/dax*"))]:
        with contextlib.suppress(OSError):
            storage = dax.storage_of(path)
            if storage.kind is Backing.DEVDAX and identity(storage) == wanted:
                return path
    return ram.path


def _result(saved: SavedGuest) -> str:
    when = f"pid {saved.restore.pid}"
    return {
        Result.OPEN: "",
        Result.LOADED: f"its state was loaded already ({when}): its RAM may have moved on; cpr recover has it go on",
        Result.RESTORED: f"it was restored already ({when}): its RAM has moved on",
        Result.CONTINUED: "it went on in the QEMU that it was saved from: its RAM has moved on",
        Result.GIVEN_UP: "it was given up",
    }[saved.restore.result]


def _state(saved: SavedGuest, attend: Callable[[], None]) -> tuple[str, ...]:
    if saved.state is None:
        return ("its state was not saved to the end",)
    try:
        return state_differences(saved.state, attend)
    except FileError as error:
        return (error.message,)


def _ram(ram: SavedRam) -> Iterator[str]:
    """As it was: there, of the kind and size, in place, not in use, and with the content that was stamped."""
    if ram.volatile:
        yield from _room(ram)
        return
    name = f"RAM {ram.id}"
    try:
        status = os.lstat(ram.path)
    except OSError as error:
        yield f"{name}: {ram.path}: {error.strerror}"
        return
    if ram.storage.kind is Backing.DEVDAX:
        if not stat.S_ISCHR(status.st_mode) or not dax.is_device_dax(status.st_rdev):
            yield f"{name}: {ram.path} is no device DAX now"
            return
    elif not stat.S_ISREG(status.st_mode):
        yield f"{name}: {ram.path} is no regular file now"
        return
    elif status.st_size < ram.offset + ram.size:
        yield f"{name}: {ram.path} has {status.st_size} bytes, where {ram.offset + ram.size} are needed"
        return
    if ram.stamp is None:
        yield f"{name}: it was not stamped when it was saved"
        return
    users = mapped_by(ram.path, status)
    if users:
        yield f"{name}: {ram.path} is in use by pid {', '.join(map(str, users))}"
    try:
        for line in stamp.differences(ram.stamp, ram.path, identity(dax.storage_of(ram.path))):
            yield f"{name}: {line}"
    except (CprError, OSError) as error:
        yield f"{name}: {error}"


def _room(ram: SavedRam) -> Iterator[str]:
    """Of RAM that is made anew nothing is left to be compared; nobody else may have it, nor another kind be made."""
    if not ram.path:
        return
    with contextlib.suppress(OSError):
        if users := mapped_by(ram.path, os.stat(ram.path)):
            yield f"RAM {ram.id}: {ram.path} is in use by pid {', '.join(map(str, users))}"
    if ram.storage.kind is Backing.HUGETLB:
        there = existing_directory(os.path.dirname(ram.path))
        if dax.storage_of(there).kind is not Backing.HUGETLB:
            yield f"RAM {ram.id}: no hugetlbfs is mounted at {there}, where it is to be made"


def mapped_by(path: str, status: os.stat_result) -> list[int]:
    """Processes that have the file or device at `path` mapped shared, as far as we may look."""
    number, device = f" {status.st_ino} ", (os.major(status.st_dev), os.minor(status.st_dev))
    found = []
    for entry in proc.processes():
        with contextlib.suppress(OSError):
            if entry.pid == os.getpid() or number not in procfile.read_text(entry.pid, "maps"):
                continue
            mine = [m for m in proc.read_maps(entry.pid) if m.inode == status.st_ino and "s" in m.perms]
            if any(m.device == device or m.path == path for m in mine):  # btrfs: another device than stat tells
                found.append(entry.pid)
    return found


def _disks(saved: SavedGuest) -> tuple[str, ...]:
    return tuple(line for one in saved.disks for line in disk_differences(one))


def _vfio(saved: SavedGuest) -> Iterator[str]:
    for device in saved.vfio:
        try:
            pci.driver(device.address)
        except OSError:
            yield f"the passed-through device {device.address} is not there"
