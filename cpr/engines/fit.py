"""Who needs the guest's pid to stay: the reason for an engine that keeps it. Pure.

A supervisor takes the end of the old process for the end of the guest, so a handover is blocked there (`supervised`).
A pid file is weaker: it can be written anew, and a handover does so. But it was put there for somebody. Who reads it
between the end of the old process and the writing finds a pid that is dead, and may start the guest a second time; the
lock that QEMU holds on the file ends with the old process; and what a process in a pid namespace of its own has written
is not rewritten from outside. So it is no reason to refuse a handover, but one to keep the pid where that can be done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cpr.model import Guest, Supervisor


def pid_known_to(guest: Guest) -> str:
    """Who knows the guest by its pid, as the reason of a re-exec; "" where nobody does."""
    pid = guest.process.pid
    if guest.supervisors:
        return f"pid {pid} is watched by {' and '.join(map(_words, guest.supervisors))}: re-exec keeps the pid"
    if guest.pidfile and guest.pidfile_holds_pid:
        return f"pid {pid} stands in the pid file {guest.pidfile}: re-exec keeps the pid"
    return ""


def _words(supervisor: Supervisor) -> str:
    match supervisor.kind:
        case "systemd":
            return f"systemd ({supervisor.who})"
        case "parent":
            return f"its parent, {supervisor.who}"
    return supervisor.who or supervisor.kind
