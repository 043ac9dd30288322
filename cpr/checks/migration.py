"""Moving the device state: what QEMU itself refuses, and who is at it already."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpr.errors import MonitorHeld
from cpr.model import Finding, Severity

if TYPE_CHECKING:
    from cpr.errors import MonitorError


def monitor_finding(error: MonitorError) -> Finding:
    """The survey could not open a monitor: said as a finding, so that it is one reason among others."""
    held = isinstance(error, MonitorHeld)
    return Finding(
        check="monitor-held" if held else "no-monitor",
        severity=Severity.BLOCKER,
        subject=error.address,
        message=error.message,
        hint=error.hint or "the guest needs a QMP socket of its own: -qmp unix:PATH,server=on,wait=off",
        ignorable=False,
    )
