"""The registry: what a check is, how one is declared, how all of them are run, and what may be ignored.

    @check("ram-volatile", "RAM that a second process cannot map", ignorable=False)
    def ram_volatile(guest: Guest) -> Iterator[Finding]:
        for block in guest.ram:
            if not block.shared:
                yield blocker(block.id, "...", "...")

A check is a pure function. It names the facts it wants as parameters: `guest`, `host`, `target`, `rehearsal`,
`command` (the guest's command line, parsed), and `kexec` (the next kernel, where there is going to be one). A check
whose facts are not there (no target was asked, nothing was rehearsed, the command line cannot be read) is not run; a
parameter with a default is a fact it can do without. The id and whether it may be ignored are stamped on the findings
here, so that they are said once.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from cpr.checks.command import command_of
from cpr.errors import UsageError
from cpr.model import Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from cpr.model import Guest, Host, NextKernel, Rehearsal, Target

FACTS = ("guest", "host", "target", "rehearsal", "command", "kexec")
RESTART = "restart"
REBOOT = "reboot"
BOTH = (RESTART, REBOOT)

_ORDER = {Severity.BLOCKER: 0, Severity.WARNING: 1, Severity.NOTE: 2}

F = TypeVar("F", bound="Callable[..., Iterator[Finding]]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question of the pre-check. `engines` empty: it concerns all of them."""

    id: str
    title: str
    function: Callable[..., Iterator[Finding]]
    facts: tuple[str, ...]
    needs: frozenset[str]
    ignorable: bool
    modes: frozenset[str]
    engines: tuple[str, ...]

    def findings(self, facts: dict[str, Any]) -> Iterator[Finding]:
        """What it says about `facts`; nothing where a fact it wants is None."""
        wanted = {name: facts.get(name) for name in self.facts}
        if any(wanted[name] is None for name in self.needs):
            return
        for finding in self.function(**wanted):
            yield replace(
                finding,
                check=self.id,
                engines=finding.engines or self.engines,
                ignorable=self.ignorable and finding.ignorable,
            )


REGISTRY: dict[str, Check] = {}
"""Every check by its id, in the order in which they are asked. An id is published and never re-used."""


def check(
    id: str,
    title: str,
    *,
    ignorable: bool = True,
    modes: Iterable[str] = (RESTART,),
    engines: tuple[str, ...] = (),
) -> Callable[[F], F]:
    """Declare a check. `ignorable=False`: to go on would lose the guest, so --ignore is refused."""

    def register(function: F) -> F:
        parameters = inspect.signature(function).parameters
        facts = tuple(parameters)
        unknown = set(facts) - set(FACTS)
        if unknown or id in REGISTRY:
            raise TypeError(f"check {id!r}: " + (f"unknown facts {sorted(unknown)}" if unknown else "declared twice"))
        REGISTRY[id] = Check(
            id=id,
            title=title,
            function=function,
            facts=facts,
            needs=frozenset(name for name, p in parameters.items() if p.default is inspect.Parameter.empty),
            ignorable=ignorable,
            modes=frozenset(modes),
            engines=engines,
        )
        return function

    return register


def blocker(
    subject: str, message: str, hint: str = "", *, engines: tuple[str, ...] = (), ignorable: bool = True
) -> Finding:
    """Refuses. `message` says what was seen and why that blocks; `hint` is the way out."""
    return Finding(
        check="",
        severity=Severity.BLOCKER,
        subject=subject,
        message=message,
        hint=hint,
        engines=engines,
        ignorable=ignorable,
    )


def warning(subject: str, message: str, hint: str = "", *, engines: tuple[str, ...] = ()) -> Finding:
    """Goes on; `message` says what will be lost."""
    return Finding(check="", severity=Severity.WARNING, subject=subject, message=message, hint=hint, engines=engines)


def note(subject: str, message: str, hint: str = "", *, engines: tuple[str, ...] = ()) -> Finding:
    """Goes on; nothing is lost, but somebody may want to know."""
    return Finding(check="", severity=Severity.NOTE, subject=subject, message=message, hint=hint, engines=engines)


def run_checks(
    guest: Guest,
    host: Host,
    target: Target | None,
    rehearsal: Rehearsal | None,
    *,
    mode: str = RESTART,
    kexec: NextKernel | None = None,
) -> tuple[Finding, ...]:
    """Ask everything at once. Blockers come first, then warnings, then notes; within each the registry's order."""
    facts = {
        "guest": guest,
        "host": host,
        "target": target,
        "rehearsal": rehearsal,
        "command": command_of(guest),
        "kexec": kexec,
    }
    found = [f for one in REGISTRY.values() if mode in one.modes for f in one.findings(facts)]
    return in_order(found)


def run_host_checks(host: Host, kexec: NextKernel) -> tuple[Finding, ...]:
    """What concerns no single guest of a reboot: to be asked once, whatever guests there are."""
    facts = {"host": host, "kexec": kexec}
    return in_order(f for id, one in REGISTRY.items() if id in host_checks() for f in one.findings(facts))


def host_checks() -> frozenset[str]:
    """Ids of the checks that `run_host_checks` asks; `run_checks` asks them of every guest."""
    return frozenset(id for id, one in REGISTRY.items() if REBOOT in one.modes and one.needs <= {"host", "kexec"})


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Blockers first; the order is otherwise kept, and what is said twice is said once."""
    return tuple(sorted(dict.fromkeys(findings), key=lambda f: _ORDER[f.severity]))


def apply_ignores(findings: Iterable[Finding], ids: Iterable[str]) -> tuple[Finding, ...]:
    """Blockers of `ids` turned into warnings.

    Raises:
        UsageError: an id that is no check's, or a check that cannot be ignored.
    """
    findings, wanted = tuple(findings), tuple(dict.fromkeys(ids))
    known = {**{f.check: f.ignorable for f in findings}, **{c.id: c.ignorable for c in REGISTRY.values()}}
    for id in wanted:
        if id not in known:
            choices = ", ".join(sorted(name for name, ignorable in known.items() if ignorable))
            raise UsageError(f"--ignore {id}: there is no such check", hint=f"these can be ignored: {choices}")
        firm = next((f for f in findings if f.check == id and f.severity is Severity.BLOCKER and not f.ignorable), None)
        if not known[id] or firm is not None:
            why = f" ({firm.message})" if firm else ""
            raise UsageError(
                f"--ignore {id}: this cannot be ignored, going on would lose the guest or cannot work{why}",
                hint=(firm.hint if firm else "") or "docs/blockers.md has the way out of each",
            )
    return in_order(
        replace(f, severity=Severity.WARNING, message=f"{f.message} (ignored as asked)")
        if f.check in wanted and f.severity is Severity.BLOCKER
        else f
        for f in findings
    )


def blockers(findings: Iterable[Finding], engine: str = "") -> tuple[Finding, ...]:
    """Those that block `engine` (any engine where it is not given)."""
    return tuple(
        f for f in findings if f.severity is Severity.BLOCKER and (not engine or not f.engines or engine in f.engines)
    )
