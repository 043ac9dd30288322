"""A guest that was saved, or was going to be, goes on in the QEMU that it is in: the way back before the commit.

Out of scope: whether it may (manifest.py, recovery.py): never once its state was loaded elsewhere.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpr.engines.settings import set_discard
from cpr.engines.stream import NAME
from cpr.errors import AS_BEFORE, NEEDS_YOU, UNTOUCHED, CommandFailed, CprError
from cpr.model import Runstate
from cpr.qemu import migration
from cpr.run import resume_old

if TYPE_CHECKING:

    from cpr.model import Guest
    from cpr.qemu.qmp import Monitor

WAKE_SECONDS = 10.0
STANDS_STILL = (Runstate.PAUSED, Runstate.PRELAUNCH, Runstate.POSTMIGRATE, Runstate.FINISH_MIGRATE)


@dataclass(frozen=True, slots=True, kw_only=True)
class WentOn:
    """Where the guest is afterwards, and what could not be put back."""

    runstate: str
    where: str
    failed: tuple[str, ...] = ()
    stuck: bool = False
    """It can only go on in another QEMU: see `is_stuck`."""

    @property
    def well(self) -> bool:
        """It is as it was, but perhaps for a setting."""
        return self.where in (AS_BEFORE, UNTOUCHED)


def go_on(guest: Guest, monitor: Monitor | None, *, suspended: bool) -> WentOn:
    """Undo a save as far as it came. Safe to repeat; never raises. `monitor` None: nothing was done to the guest.

    `suspended`: it was put to sleep for the save. A guest that was paused stays so.
    """
    if monitor is None:
        return WentOn(runstate=guest.runstate, where=UNTOUCHED)
    failed: list[str] = []
    runstate = ""
    try:
        if is_stuck(monitor, guest, suspended=suspended):
            where = f"{NEEDS_YOU}: {guest.label} is saved, and this QEMU cannot wake it up"
            return WentOn(runstate=Runstate.POSTMIGRATE, where=where, stuck=True)
    except CprError as error:
        failed.append(error.message)

    def resume() -> None:
        nonlocal runstate
        runstate = resume_old(monitor, guest.runstate)
        if guest.runstate == Runstate.SUSPENDED and runstate in STANDS_STILL:
            monitor.execute("cont")
            runstate = _status(monitor)
        if suspended:
            runstate = wake(monitor)

    def settings() -> None:
        put_settings_back(monitor, guest)

    for step in (resume, settings):
        try:
            step()
        except CprError as error:
            failed.append(error.message)
    ran = guest.runstate in (Runstate.RUNNING, Runstate.SUSPENDED)
    well = runstate == guest.runstate or (bool(runstate) and not ran)
    label = f"{guest.label} is {runstate or 'in an unknown state'} in its old QEMU and does not go on"
    return WentOn(runstate=runstate, where=AS_BEFORE if well else f"{NEEDS_YOU}: {label}", failed=tuple(failed))


def is_stuck(monitor: Monitor, guest: Guest, *, suspended: bool) -> bool:
    """Whether it was saved to the end while it slept: `cont` then ends QEMU, which knows no way from there (seen with
    10.0: there is no transition from postmigrate to suspended in system/runstate.c; before 8.2 it is woken up first).

    Its state is complete, and can be loaded by another one.
    """
    asleep = suspended or guest.runstate == Runstate.SUSPENDED
    return asleep and _status(monitor) == Runstate.POSTMIGRATE and "mode" in _parameters(monitor)


def put_settings_back(monitor: Monitor, guest: Guest) -> None:
    """Capabilities, parameters, mode and discard-data as they were. Raises CprError: the first that could not be."""
    with contextlib.suppress(CommandFailed):
        monitor.execute("closefd", fdname=NAME)
    migration.restore(monitor, dict(guest.capabilities), guest.parameters)
    restore_mode(monitor, guest)
    set_discard(monitor, [b.qom_path for b in guest.ram if b.discard_data], on=True)
    migration.close_file(monitor)


def restore_mode(monitor: Monitor, guest: Guest) -> None:
    """The migration mode that the guest had (8.2): left at cpr-reboot, somebody's next migration would be one."""
    now = _parameters(monitor).get("mode")
    wanted = guest.parameters.get("mode", "normal")
    if now is not None and now != wanted:
        monitor.execute("migrate-set-parameters", mode=wanted)


def wake(monitor: Monitor, timeout: float = WAKE_SECONDS) -> str:
    """Wake a suspended guest up; its runstate afterwards. One that is still falling asleep is waited for.

    system_wakeup does nothing before the guest sleeps.
    """
    end = time.monotonic() + timeout
    status = _status(monitor)
    if status in STANDS_STILL:
        monitor.execute("cont")
        status = _status(monitor)
    asked = False
    while time.monotonic() < end:
        if status == Runstate.SUSPENDED:
            asked = True
            with contextlib.suppress(CommandFailed):
                monitor.execute("system_wakeup")
        elif asked:
            break
        time.sleep(0.05)
        status = _status(monitor)
    return status


def _parameters(monitor: Monitor) -> dict[str, Any]:
    found: dict[str, Any] = monitor.execute("query-migrate-parameters")
    return found


def _status(monitor: Monitor) -> str:
    return str(monitor.execute("query-status")["status"])
