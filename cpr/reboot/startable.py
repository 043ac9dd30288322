"""Before a restored QEMU is started: the way is made free, and its likeness is what can be had in this boot.

Out of scope: the command line (afresh.py), the start itself (restoring.py).
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from cpr.engines.settings import Settings
from cpr.engines.successor import MARK
from cpr.errors import CprError, StepFailed
from cpr.linux import cgroup, likeness, proc
from cpr.linux.fds import Fd
from cpr.linux.process import Process, open_process
from cpr.model import Runstate
from cpr.qemu import qmp
from cpr.reboot import ramcopy
from cpr.reboot.manifest import RamCopy

if TYPE_CHECKING:
    from cpr.linux.cgroup import Cgroup, CgroupMount
    from cpr.reboot.manifest import SavedGuest

MONITOR_SECONDS = 5.0


def end_left_behind(saved: SavedGuest, mark: str) -> None:
    """QEMUs that an attempt before us has started, known by their mark, as far as they still wait for the state.

    One that has got it may be the guest, by whatever copy of this manifest: it is left, and is in the way. Where the
    RAM is in the state a QEMU that stands still is of no use to anybody, and what it has is its own: it is ended too.

    Raises:
        StepFailed: one does not die; or nothing else would show that it is in the way.
    """
    copied = saved.ram_copy is not RamCopy.NONE and saved.state is not None and os.path.exists(saved.state.path)
    for entry in proc.processes():
        with contextlib.suppress(OSError):
            if entry.zombie or dict(proc.read_environ(entry.pid)).get(MARK) != mark:
                continue
            with open_process(entry.pid, entry.start_time) as process:
                status = _runstate(saved, process)
                if status != Runstate.INMIGRATE and not (copied and status == Runstate.PAUSED):
                    if copied and process.alive():
                        words = f"is {status or 'silent'}, and may be the guest"
                        raise StepFailed("restore", f"pid {entry.pid}, left from an earlier attempt, {words}")
                    continue
                process.kill()
                if not process.wait_dead(15.0):
                    raise StepFailed("restore", f"pid {entry.pid}, left from an earlier attempt, does not die")


def _runstate(saved: SavedGuest, process: Process) -> str:
    """By its own monitor, which comes up some moments after its start, and says nothing while much RAM is read; "" if
    it does not answer."""
    if saved.monitor is None:
        return ""
    reading = ramcopy.patience(saved.guest) if saved.guest and saved.ram_copy is not RamCopy.NONE else 0.0
    end = time.monotonic() + MONITOR_SECONDS + reading
    while process.alive() and time.monotonic() < end:
        with contextlib.suppress(CprError), qmp.connect(saved.monitor, process.pid) as monitor:
            return str(monitor.execute("query-status")["status"])
        time.sleep(0.05)
    return ""


def open_log(path: str) -> Fd:
    """Where a QEMU says what it has to say; it is added to. OSError."""
    return Fd(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644))


def like_now(saved: SavedGuest) -> tuple[likeness.Likeness, tuple[str, ...]]:
    """The likeness as it can be had now, and what is left out of it, in words.

    Its process is gone, and its pid may be somebody else's; numbers of namespaces are those of another boot.
    """
    mounts = cgroup.own_mounts()
    wanted = saved.likeness.cgroups
    placed = Settings.from_json(saved.settings).threads.values() if saved.settings else ()
    threads = [entry for placement in placed for entry in placement.cgroups]
    gone = [entry.path for entry in (*wanted, *threads) if _is_there(entry, mounts) is False]
    ours = proc.namespaces(os.getpid())
    known = {name: number for name, number in ours.items() if name in saved.likeness.namespaces}
    there = tuple(entry for entry in wanted if _is_there(entry, mounts))
    like = replace(saved.likeness, pid=0, start_time=0, cgroups=there, namespaces=known)
    return like, tuple(f"cgroup: {path} is not there any more" for path in dict.fromkeys(gone))


def settings_now(saved: SavedGuest) -> Settings:
    """What its QEMU had, but for cgroups of its threads that are gone: where a unit does not run, it has none."""
    settings, mounts = Settings.from_json(saved.settings), cgroup.own_mounts()
    threads = {
        name: replace(placement, cgroups=tuple(c for c in placement.cgroups if _is_there(c, mounts)))
        for name, placement in settings.threads.items()
    }
    return replace(settings, threads=threads)


def _is_there(entry: Cgroup, mounts: list[CgroupMount]) -> bool | None:
    """None: its hierarchy is not to be seen."""
    place = cgroup.locate(entry, mounts)
    return None if place is None else os.path.isdir(place)
