"""Choosing an engine and making the plan: pure functions on facts and findings.

`auto` takes the first engine, in the order of `engines.ENGINES`, whose findings have no blocker; the plan says why it
was chosen and why the ones before it were not. What is asked about the guest is in `checks/`, how it is done in
`engines/`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cpr.checks.registry import apply_ignores, blockers, in_order
from cpr.errors import Blocked, UsageError
from cpr.model import Plan

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cpr.engines.base import Engine
    from cpr.model import Finding, Guest, Host, Rehearsal, Target

AUTO = "auto"


class NoEngine(Blocked):
    """No engine is left for this guest; `findings` says why, `passed_over` for each engine."""

    def __init__(self, guest: Guest, findings: tuple[Finding, ...], passed_over: tuple[tuple[str, str], ...]) -> None:
        stopping = blockers(findings)
        first = stopping[0] if stopping else None
        more = f", and {len(stopping) - 1} more" if len(stopping) > 1 else ""
        why = f": {first.subject}: {first.message} [{first.check}]{more}" if first else ""
        super().__init__(
            f"{guest.label} cannot be updated{why}",
            hint=(first.hint if first else "") or f"cpr check {guest.process.pid} lists everything that is in the way",
        )
        self.findings = findings
        self.passed_over = passed_over


def known_engine(name: str, engines: Mapping[str, Engine]) -> str:
    """`name` if it can be asked for.

    Raises:
        UsageError: there is no such engine, or not in this release.
    """
    if name == AUTO or name in engines:
        return name
    from cpr.engines import LATER

    here = ", ".join([AUTO, *engines])
    if name in LATER:
        raise UsageError(f"--engine {name} is not in this release", hint=f"there are: {here}")
    raise UsageError(f"--engine {name}: there is no such engine", hint=f"there are: {here}")


def judge(
    guest: Guest,
    host: Host,
    target: Target,
    findings: Iterable[Finding],
    *,
    engines: Mapping[str, Engine],
    ignored: Iterable[str] = (),
) -> dict[str, tuple[Finding, ...]]:
    """For each engine what concerns it: the checks' findings and its own, with `ignored` turned into warnings.

    Raises:
        UsageError: something in `ignored` is no check, or cannot be ignored.
    """
    own = [
        replace(finding, engines=finding.engines or (name,))
        for name, engine in engines.items()
        for finding in engine.findings(guest, host, target)
    ]
    everything = apply_ignores([*findings, *own], ignored)
    return {name: tuple(f for f in everything if not f.engines or name in f.engines) for name in engines}


def make(
    guest: Guest,
    host: Host,
    target: Target,
    rehearsal: Rehearsal | None,
    findings: Iterable[Finding],
    *,
    engine: str = AUTO,
    ignored: Iterable[str] = (),
    request: Any = None,
    engines: Mapping[str, Engine] | None = None,
) -> Plan:
    """The plan for one guest, made by the first engine that nothing blocks, or by the one that is asked for.

    `request` is handed to the engine's `steps`. `rehearsal` has spoken through `findings` already.

    Raises:
        UsageError: an engine or something to ignore that is not there.
        NoEngine: everything is blocked.
    """
    available = engines if engines is not None else _engines()
    known_engine(engine, available)
    ignored = tuple(dict.fromkeys(ignored))
    candidates = available if engine == AUTO else {engine: available[engine]}
    verdicts = judge(guest, host, target, findings, engines=candidates, ignored=ignored)
    passed_over: list[tuple[str, str]] = []
    for name, found in verdicts.items():
        stopping = blockers(found)
        if not stopping:
            return Plan(
                guest=guest,
                target=target,
                engine=name,
                reason=_reason(name, engine, passed_over),
                steps=tuple(candidates[name].steps(guest, target, request)),
                findings=found,
                passed_over=tuple(passed_over),
                ignored=ignored,
            )
        passed_over.append((name, ", ".join(dict.fromkeys(f.check for f in stopping))))
    everything = in_order(f for found in verdicts.values() for f in found)
    raise NoEngine(guest, everything, tuple(passed_over))


def _reason(name: str, wanted: str, passed_over: list[tuple[str, str]]) -> str:
    if wanted != AUTO:
        return f"--engine {name} was asked for"
    if passed_over:
        return f"the first that nothing blocks, after {', '.join(n for n, _ in passed_over)}"
    return "nothing blocks it, and its way back is full until the commit"


def _engines() -> Mapping[str, Engine]:
    from cpr.engines import ENGINES

    return ENGINES
