"""What an engine is: findings that only concern it, and the steps it would take. Pure: it reads values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cpr.model import Finding, Guest, Host, Step, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked for, as far as steps depend on it."""

    run_id: str
    ignored: tuple[str, ...] = ()
    show_events: bool = False
    """A client whose monitor is borrowed hears of STOP and RESUME."""


class Engine(Protocol):
    """One way to restart. One that is `Preferring` too may be taken before the others."""

    name: str

    def findings(self, guest: Guest, host: Host, target: Target) -> Iterable[Finding]:
        """What speaks against this engine, besides the checks that concern all of them."""

    def steps(self, guest: Guest, target: Target, request: Request) -> Sequence[Step]:
        """The steps, in order, exactly one of them the commit. Only asked for where no blocker was found."""


class Preferring(Protocol):
    """An engine that may fit a guest better than the others do. Those that are not have no opinion."""

    def preference(self, guest: Guest) -> str:
        """Why it is to be taken before the others, as a sentence to be printed; "" where it is not."""
