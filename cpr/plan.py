"""Choosing an engine and making the plan: pure functions on facts and findings.

`auto` takes the first engine whose findings have no blocker. Those that fit this guest better than others do (as they
keep a pid that somebody knows) come first, otherwise the order is that of `engines.ENGINES`. The plan says why it was
chosen and why the ones before it were not. What is asked about the guest is in `checks/`, how it is done in `engines/`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cpr.checks.registry import apply_ignores, blockers, in_order
from cpr.errors import Blocked, UsageError
from cpr.model import Plan

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cpr.engines.base import Engine, Preferring
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
    """The plan for one guest, made by the best fitting engine that nothing blocks, or by the one that is asked for.

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
    blocked = {name: ", ".join(dict.fromkeys(f.check for f in blockers(found))) for name, found in verdicts.items()}
    preferred = {name: why for name, one in candidates.items() if (why := _preference(one, guest))}
    order = [*preferred, *(name for name in candidates if name not in preferred)]
    chosen = next((name for name in order if not blocked[name]), None)
    if chosen is None:
        everything = in_order(f for found in verdicts.values() for f in found)
        raise NoEngine(guest, everything, tuple(blocked.items()))
    passed_over = tuple(
        (name, blocked[name] or f"nothing blocks it, but {chosen} fits better")
        for name in candidates
        if name in _before(chosen, order) or name in _before(chosen, list(candidates))
    )
    return Plan(
        guest=guest,
        target=target,
        engine=chosen,
        reason=f"--engine {engine} was asked for" if engine != AUTO else _reason(chosen, preferred, passed_over),
        steps=tuple(candidates[chosen].steps(guest, target, request)),
        findings=verdicts[chosen],
        passed_over=passed_over,
        ignored=ignored,
    )


def _preference(engine: Engine | Preferring, guest: Guest) -> str:
    ask = getattr(engine, "preference", None)
    return ask(guest) if ask is not None else ""


def _before(name: str, names: Sequence[str]) -> Sequence[str]:
    return names[: names.index(name)]


def _reason(chosen: str, preferred: Mapping[str, str], passed_over: Sequence[tuple[str, str]]) -> str:
    if chosen in preferred:
        return preferred[chosen]
    if passed_over:
        return f"the first that nothing blocks, after {', '.join(name for name, _ in passed_over)}"
    return "nothing blocks it, and its way back is full until the commit"


def _engines() -> Mapping[str, Engine]:
    from cpr.engines import ENGINES

    return ENGINES
