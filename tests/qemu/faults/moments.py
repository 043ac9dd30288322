"""The moments of an engine's plan at which something can go wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.qemu.faults.subject import every_step

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True)
class Moment:
    """Between two things: a step's journal line and what it does (`doing`), or that and its next line (`done`)."""

    script: Script
    index: int
    state: str

    @property
    def at(self) -> str:
        return f"step:{self.index}:{self.state}"

    def after(self, name: str) -> bool:
        """The step of that name is done."""
        return (self.index, self.state) >= (self.script.names.index(name), "done")

    @property
    def told(self) -> bool:
        """`cont` was sent."""
        return (self.index, self.state) >= (self.script.commit, "done")

    @property
    def recorded(self) -> bool:
        """The journal has the commit's line."""
        return self.index >= self.script.commit

    def __str__(self) -> str:
        return f"{self.index}-{self.script.names[self.index]}-{self.state}"


class Script:
    """The steps of an engine's plan, by name. `everyday`: for a kind of fault the moments that are not `full`."""

    def __init__(self, engine: str = "handover", everyday: Mapping[str, Sequence[str]] | None = None) -> None:
        steps = every_step(engine)
        self.names = [step.id for step in steps]
        self.commit = next(index for index, step in enumerate(steps) if step.commit)
        self._everyday = everyday or {}

    def at(self, name: str, state: str) -> str:
        """As a Fault says it."""
        return f"step:{self.names.index(name)}:{state}"

    def moments(self, kind: str, wanted: Callable[[Moment], bool] = lambda _: True) -> list[Any]:
        """Parameters: every moment that is wanted, `full` but for the everyday ones."""
        everyday = self._everyday.get(kind, ())
        there = [Moment(self, index, state) for index in range(len(self.names)) for state in ("doing", "done")]
        return [
            pytest.param(m, id=str(m), marks=() if str(m).partition("-")[2] in everyday else pytest.mark.full)
            for m in there
            if wanted(m)
        ]
