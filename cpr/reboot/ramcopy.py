"""RAM that goes into a guest's state because nothing leaves it where it is: how it is sent, and to which file.

Out of scope: which RAM that is, and what is said of it (checks/saveram.py).
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from cpr.checks.memory import skips_named_files_only
from cpr.linux.writerate import write_rate
from cpr.model import RamDirectory
from cpr.qemu import migration
from cpr.qemu.memory import DESCRIPTOR_PATH
from cpr.qemu.qmp import path_in
from cpr.reboot.afresh_ram import is_memory_file
from cpr.reboot.manifest import RamCopy
from cpr.survey_host import existing_directory, lasting_room

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from cpr.model import Guest, RamBlock, Target
    from cpr.qemu.qmp import Monitor

CHANNELS = min(8, os.cpu_count() or 1)
"""Threads that write and read a file of mapped RAM."""
SLOWEST = 20 << 20
"""Bytes per second that a disk is believed to take or give at least, before a save or load is given up."""
ROOM_TO_MEASURE = 1 << 30
"""Bytes: a measurement is not to fill a disk, not even for a moment."""
UNLIMITED = -1
CAPABILITIES: Mapping[RamCopy, tuple[str, ...]] = {
    RamCopy.NONE: migration.ONE_WAY,
    RamCopy.STREAM: migration.WITH_RAM,
    RamCopy.MAPPED: (*migration.WITH_RAM, *migration.MAPPED),
}
"""On both sides. With x-ignore-shared any shared block would be left out (up to 8.0), or any shared file."""


def prepare(monitor: Monitor, copy: RamCopy) -> None:
    """Set a QEMU up to save a guest, or to load one, with its RAM in this form."""
    migration.prepare(monitor, CAPABILITIES[copy], channels=CHANNELS if copy is RamCopy.MAPPED else 0)


def ram_directory(path: str, command_line: str, *, timeout: float = 0.0) -> RamDirectory:
    """What is known of the directory of --save-ram, which need not be there yet; nothing is left there.

    `command_line`: of the next kernel. `timeout`: seconds after which a save is undone, 0 for never. OSError.
    """
    there = existing_directory(path)
    free, volatile = lasting_room(there, command_line)
    unusable = _unusable(path)
    rate, why = None, ""
    if free < ROOM_TO_MEASURE:
        why = f"{there} has too little room for a measurement"
    elif not volatile and not unusable:
        try:
            rate = write_rate(there)
        except OSError as error:
            why = f"a test file cannot be written in {there}: {error.strerror}"
    return RamDirectory(
        path=path,
        free=free,
        volatile=volatile,
        unusable=unusable,
        rate=rate,
        unmeasured=why,
        timeout=timeout,
    )


def _unusable(path: str) -> str:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return error.strerror or str(error)
    if not stat.S_ISDIR(status.st_mode):
        return "it is no directory"
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        return f"others may enter it (owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def how(guest: Guest, target: Target | None, lost: Collection[str]) -> RamCopy:
    """How the RAM of a guest is sent. `lost`: ids of the blocks for whose sake; none: it stays in place.

    In mapped form where both QEMUs have it (9.0), and no page is there before it is loaded: zeroes are left out of it,
    and not written by who loads it (migration/ram.c, read_ramblock_mapped_ram). Flash memory is there: it has what its
    file has by now. QEMU writes the copy by a descriptor.
    """
    if not lost:
        return RamCopy.NONE
    ours = {name for name, _ in guest.capabilities}
    able = target is not None and all(n in ours and n in target.capabilities for n in migration.MAPPED)
    takes_descriptors = guest.monitor is not None and bool(guest.monitor.path)
    unlimited = guest.limits.get("RLIMIT_FSIZE", (UNLIMITED, UNLIMITED))[0] == UNLIMITED  # SIGXFSZ ends a process
    fresh = all(_fresh(guest, block) for block in guest.ram if block.id in lost) and not _has_flash(guest)
    return RamCopy.MAPPED if able and takes_descriptors and unlimited and fresh else RamCopy.STREAM


def _fresh(guest: Guest, block: RamBlock) -> bool:
    """It is not by a name, under which anything may be found when it is opened again."""
    if not block.named_file:
        return True
    if DESCRIPTOR_PATH.fullmatch(block.path):
        return is_memory_file(block)
    return os.path.isdir(path_in(guest.process.pid, os.path.join(guest.cwd, block.path)))


def _has_flash(guest: Guest) -> bool:
    """-drive if=pflash, -machine pflash0=; a word that only looks like it does no harm."""
    return any("pflash" in words for words in (*guest.argv, *(text for _, text in guest.config_files)))


def copied_by_a_trial(guest: Guest) -> tuple[str, ...]:
    """RAM blocks that a stream with x-ignore-shared would send all the same, from memory that others can map."""
    if not skips_named_files_only(guest.binary.version):
        return ()
    return tuple(b.id for b in guest.ram if b.shared and not b.named_file)


def patience(guest: Guest) -> float:
    """Seconds that writing or reading its RAM may take besides the state of its devices."""
    return sum(block.size for block in guest.ram) / SLOWEST
