"""Moving the device state: what QEMU itself refuses, who is at it already, and what state the guest is in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpr.checks.memory import version_of
from cpr.checks.registry import BOTH, blocker, check, warning
from cpr.checks.words import some
from cpr.errors import MonitorHeld
from cpr.model import Finding, Runstate, Severity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cpr.errors import MonitorError
    from cpr.model import Guest, NextKernel, Target

IGNORE_SHARED = "x-ignore-shared"
"""The capability by which the stream leaves shared RAM out (QEMU 4.0)."""

SAVES_SLEEPERS = (9, 0)
"""The first QEMU that saves a guest with a VFIO device when it is suspended (mode cpr-reboot)."""

IDLE = frozenset({"", "none", "completed", "cancelled", "failed"})
"""Answers of query-migrate after which nothing goes on; everything else is somebody's migration."""

MONITOR_HINT = (
    "the guest needs a QMP socket of its own: -qmp unix:PATH,server=on,wait=off at its next start (`cpr run` adds one)"
)


@check("no-monitor", "No QMP monitor can be reached", ignorable=False, modes=BOTH)
def no_monitor(guest: Guest) -> Iterator[Finding]:
    """Everything is asked of QEMU over QMP."""
    if guest.monitor is None:
        yield blocker(
            "monitor", "no QMP monitor of the guest answers, and QEMU has to be told what to do", MONITOR_HINT
        )


@check("monitor-held", "Another client holds the only monitor", ignorable=False, modes=BOTH)
def monitor_held(guest: Guest, kexec: NextKernel | None = None) -> Iterator[Finding]:
    """A QMP monitor serves one client at a time. Re-exec borrows the session."""
    if guest.monitor is not None and guest.monitor_held:
        restart = kexec is None
        yield blocker(
            guest.monitor.label,
            f"a client holds the guest's only QMP monitor, {guest.monitor}: what was negotiated with it ends with the "
            "old QEMU",
            ("--engine reexec keeps its session; or " if restart else "")
            + "end that session, or give the guest a second QMP socket at its next start",
            engines=("handover",) if restart else (),
        )
    if guest.monitor is None:
        for chardev in guest.chardevs:
            if chardev.monitor == "control" and chardev.connected:
                yield blocker(
                    chardev.label,
                    f"another client is connected to the QMP monitor {chardev.label}, which serves one at a time",
                    "end that session, or give the guest a second QMP socket at its next start",
                )


def monitor_finding(error: MonitorError, unreadable: tuple[str, ...] = ()) -> Finding:
    """The survey could not open a monitor: said as a finding, so that it is one reason among others.

    `unreadable` is what could not be read of the process for want of privileges: then that is the reason.
    """
    held = isinstance(error, MonitorHeld)
    if unreadable and not held:
        return Finding(
            check="privileges",
            severity=Severity.BLOCKER,
            subject=error.address,
            message=f"{error.message}; CAP_SYS_PTRACE is missing to read {some(unreadable)}",
            hint="run cpr as root, or as the guest's user",
            ignorable=False,
        )
    return Finding(
        check="monitor-held" if held else "no-monitor",
        severity=Severity.BLOCKER,
        subject=error.address,
        message=error.message,
        hint=error.hint or MONITOR_HINT,
        ignorable=False,
    )


@check("not-migratable", "QEMU itself refuses to give the state away", ignorable=False, modes=BOTH)
def not_migratable(guest: Guest, kexec: NextKernel | None = None) -> Iterator[Finding]:
    """`blocked-reasons` of query-migrate (QEMU 6.0), in QEMU's own words.

    They are those of the mode that is set. VFIO's are others in mode cpr-reboot (migrate_add_blocker_modes, QEMU 9.0),
    where `vfio-no-agent` speaks of it; an older QEMU does not save the guest, asleep or not.
    """
    known = version_of(guest.binary.version)
    saves_sleepers = kexec is not None and (known is None or known >= SAVES_SLEEPERS)
    for reason in guest.blocked_reasons:
        passed_through = "VFIO" in reason.upper()
        if passed_through and saves_sleepers:
            continue
        hint = "what it names has to be unmounted, unplugged or left out at the next start"
        if passed_through and kexec is not None:
            hint = "unplug the device (device_del) for the update; QEMU saves a guest that sleeps with one from 9.0 on"
        yield blocker("migration", f'QEMU says: "{reason}"', hint)


@check("stream-cannot-skip", "A QEMU that cannot leave RAM out of the stream", ignorable=False, modes=BOTH)
def stream_cannot_skip(guest: Guest, target: Target) -> Iterator[Finding]:
    """x-ignore-shared on both sides."""
    known = {name for name, _ in guest.capabilities}
    for side, has in (("running", IGNORE_SHARED in known), ("new", IGNORE_SHARED in target.capabilities)):
        if not has:
            yield blocker(
                f"{side} QEMU",
                f"the {side} QEMU does not have the migration capability {IGNORE_SHARED} (QEMU >= 4.0), so RAM would "
                "be copied over itself",
                "update by shutting the guest down and starting it on the new QEMU",
            )


@check("busy-migration", "A migration is going on", ignorable=False, modes=BOTH)
def busy_migration(guest: Guest) -> Iterator[Finding]:
    """Somebody moves or saves the guest."""
    if guest.migration not in IDLE:
        yield blocker(
            "migration",
            f"a migration of this guest is in state {guest.migration}: one thing at a time",
            "wait for it, or cancel it (migrate_cancel)",
        )


@check("busy-job", "A block job is going on", ignorable=False, modes=BOTH)
def busy_job(guest: Guest) -> Iterator[Finding]:
    """A backup, mirror, commit or stream would be cut off, and may leave half a file."""
    for job in guest.jobs:
        yield blocker(
            job,
            f"the job {job} works on the guest's disks and would be lost with the old QEMU",
            "wait for it, or end it (block-job-complete, block-job-cancel, job-dismiss)",
        )


_STATES = {
    Runstate.PRELAUNCH: ("it has not been started yet (-S)", "start it with cont, or start it anew on the new QEMU"),
    Runstate.PRECONFIG: ("it is not configured yet (--preconfig)", "x-exit-preconfig, or start it on the new QEMU"),
    Runstate.INMIGRATE: ("its state is still coming in", "wait for its migration to end"),
    Runstate.POSTMIGRATE: ("its state was given away already", "look at who migrated it; cont resumes it here"),
    Runstate.FINISH_MIGRATE: ("its state is being given away", "wait for that to end"),
    Runstate.SUSPENDED: ("it sleeps (S3), and not every QEMU keeps it asleep", "wake it (system_wakeup)"),
    Runstate.SHUTDOWN: ("it has shut down", "quit it and start it on the new QEMU: nothing is lost"),
    Runstate.IO_ERROR: ("it stopped at an I/O error, with requests open", "repair the storage and cont it"),
    Runstate.INTERNAL_ERROR: ("KVM or QEMU gave it up", "it has to be reset or started anew"),
    Runstate.GUEST_PANICKED: ("its kernel has panicked", "it has to be reset or started anew"),
    Runstate.WATCHDOG: ("its watchdog has stopped it", "look at the guest, then cont or reset it"),
    Runstate.SAVE_VM: ("a snapshot is being saved", "wait for it"),
    Runstate.RESTORE_VM: ("a snapshot is being loaded", "wait for it"),
    Runstate.DEBUG: ("a debugger has stopped it", "let the debugger go on and detach"),
    Runstate.COLO: ("it is one half of a COLO pair", "end the replication first"),
}


@check("guest-state", "A state in which a guest cannot be moved", ignorable=False, modes=BOTH)
def guest_state(guest: Guest) -> Iterator[Finding]:
    """Running and paused guests can; a paused one is paused after the update."""
    if guest.runstate in (Runstate.RUNNING, Runstate.PAUSED):
        return
    unknown = ("a state that cpr does not know", "bring it to running or paused")
    why, way_out = next((words for state, words in _STATES.items() if state == guest.runstate), unknown)
    yield blocker(guest.runstate, f"the guest is in state {guest.runstate}: {why}", way_out)


@check("capability-left-on", "x-ignore-shared was left on", modes=BOTH)
def capability_left_on(guest: Guest) -> Iterator[Finding]:
    """With it on, a save or migration by somebody else succeeds without the RAM."""
    if (IGNORE_SHARED, True) in guest.capabilities:
        yield warning(
            IGNORE_SHARED,
            "somebody left this migration capability on: a save or migration would succeed without the guest's RAM, "
            "and the guest would be lost",
            "migrate_set_capability x-ignore-shared off",
        )
