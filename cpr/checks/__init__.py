"""The pre-check: one function a question, facts in, findings out, no I/O. `docs/blockers.md` explains every id."""

from cpr.checks import memory  # isort: skip - importing registers; this is the order in which findings are told
from cpr.checks import migration, process, drift, binary, devices, inplace, host  # isort: skip
from cpr.checks import reboot, saveram, afterboot  # isort: skip
from cpr.checks.registry import (
    REGISTRY,
    Check,
    apply_ignores,
    blocker,
    blockers,
    check,
    host_checks,
    in_order,
    note,
    run_checks,
    run_host_checks,
    warning,
)

__all__ = [
    "REGISTRY",
    "Check",
    "afterboot",
    "apply_ignores",
    "binary",
    "blocker",
    "blockers",
    "check",
    "devices",
    "drift",
    "host",
    "host_checks",
    "in_order",
    "inplace",
    "memory",
    "migration",
    "note",
    "process",
    "reboot",
    "run_checks",
    "run_host_checks",
    "saveram",
    "warning",
]
