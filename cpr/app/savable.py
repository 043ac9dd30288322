"""Looking at guests that are going to be saved: as for an update, with what a reboot asks for. Nothing is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpr.app.examine import Examined, Examiner, new_binary
from cpr.checks import run_checks
from cpr.checks.migration import monitor_finding
from cpr.checks.registry import REBOOT, apply_ignores, in_order
from cpr.errors import Blocked, CprError, MonitorError
from cpr.model import Severity

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cpr.model import Candidate, Finding, NextKernel

OF_THE_JUMP = frozenset(
    {"kexec-impossible", "kexec-kernel-missing", "guest-not-saved", "restore-not-enabled", "live-update"}
)
"""Checks that do not matter where nobody jumps."""
OF_THE_BOOT = frozenset(
    {
        *("ram-volatile-over-kexec", "memmap-missing", "memmap-kaslr", "ram-on-disk", "disk-volatile-over-kexec"),
        "room-state",
    }
)
"""Checks that do not matter where the kernel stays."""


def examine(
    examiner: Examiner, candidate: Candidate, kexec: NextKernel, *, passed_over: frozenset[str] = frozenset()
) -> Examined:
    """As `Examiner.examine`, for a reboot, without a plan. `passed_over`: ids of checks that are not asked."""
    world = examiner.world
    busy = world.claimed(candidate.process)
    if busy is not None:
        return Examined(candidate=candidate, error=busy)
    try:
        guest = world.reboot_facts(world.survey(candidate))
    except MonitorError as error:
        finding = monitor_finding(error, candidate.unreadable)
        return Examined(
            candidate=candidate, findings=(finding,), error=Blocked(finding.message, hint=finding.hint)
        )
    except CprError as error:
        return Examined(candidate=candidate, error=error)
    target = None
    try:
        target = examiner.target(new_binary(guest, examiner.choices.qemu))
        rehearsal = world.rehearse(guest, target) if examiner.rehearse else None
        found = run_checks(guest, examiner.host(), target, rehearsal, mode=REBOOT, kexec=kexec)
        findings = apply_ignores(_asked(found, passed_over), examiner.choices.ignore)
    except CprError as error:
        return Examined(candidate=candidate, guest=guest, target=target, error=error)
    return Examined(candidate=candidate, guest=guest, target=target, findings=findings, error=_refusal(findings))


def _asked(findings: Iterable[Finding], passed_over: frozenset[str]) -> tuple[Finding, ...]:
    return in_order(f for f in findings if f.check not in passed_over)


def _refusal(findings: Iterable[Finding]) -> Blocked | None:
    blockers = [f for f in findings if f.severity is Severity.BLOCKER]
    if not blockers:
        return None
    more = f" (and {len(blockers) - 1} more)" if len(blockers) > 1 else ""
    return Blocked(f"{blockers[0].message} [{blockers[0].check}]{more}", hint=blockers[0].hint)
