"""Samples: one guest moved once, in a lab of its own; and many, in turns.

Nothing is left behind by a sample, whatever happened in it. Out of scope: what the figures are judged by.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cpr.errors import CprError
from tests.bench import WayFailed
from tests.bench.guest import BenchGuest, Case, Memory, ram_identity
from tests.lab import LabError
from tests.lab.start import Lab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.bench.ways import Way

GIVEN_UP_AFTER = 2
"""So many failures without a success, and a way is not tried again in that case."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What the guest has still got. connection: None if nobody was connected."""

    pid: bool
    connection: bool | None
    ram: bool


@dataclass(frozen=True)
class Cell:
    """A way in a case: what a row of the table is about."""

    case: Case
    way: Way

    def __str__(self) -> str:
        return f"{self.case}, {self.way.name}"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One move. blackout and seconds in seconds. failed: why it is not a figure; the others are then of no meaning."""

    cell: Cell
    blackout: float = 0.0
    seconds: float = 0.0
    kept: Kept | None = None
    failed: str = ""


@dataclass(kw_only=True)
class Results:
    """All samples of a run so far, and why some cells are not measured."""

    cells: Sequence[Cell]
    runs: int
    samples: list[Sample] = field(default_factory=list)
    missing: dict[Cell, str] = field(default_factory=dict)

    @property
    def cases(self) -> list[Case]:
        """The cases, in their order."""
        return list(dict.fromkeys(cell.case for cell in self.cells))

    def of(self, cell: Cell) -> list[Sample]:
        """The samples of a cell."""
        return [sample for sample in self.samples if sample.cell == cell]

    def good(self, cell: Cell) -> list[Sample]:
        """Those that are figures."""
        return [sample for sample in self.of(cell) if not sample.failed]

    def hopeless(self, cell: Cell) -> bool:
        """It has only ever failed."""
        return len(self.of(cell)) >= GIVEN_UP_AFTER and not self.good(cell)


def sample(cell: Cell, memory: Memory) -> Sample:
    """Start a guest, move it, see whether it is well."""
    case, way = cell.case, cell.way
    try:
        with Lab() as lab, contextlib.closing(BenchGuest(lab, case, memory.get(case.size), native=way.native)) as guest:
            guest.boot()
            if way.client:
                guest.connect_client()
            ram, count = ram_identity(guest.process.pid), guest.count()
            moved = way.move(guest)
            guest.prove_well(moved.console)
            connected = None if guest.client is None else not guest.client.hung_up
            if guest.client is not None and connected:
                guest.client.check(beyond=count)
            kept = Kept(
                pid=moved.process.pid == guest.process.pid,
                connection=connected,
                ram=ram_identity(moved.process.pid) == ram,
            )
            return Sample(cell=cell, blackout=moved.blackout, seconds=moved.seconds, kept=kept)
    except (WayFailed, LabError, CprError, OSError, ValueError, subprocess.SubprocessError) as error:
        return Sample(cell=cell, failed=" ".join(str(error).split()) or type(error).__name__)


def schedule(cells: Sequence[Cell], runs: int) -> Iterator[tuple[int, Cell]]:
    """Who comes when: round after round (counted from 0) each cell once; each round begins with another cell."""
    for round_ in range(runs):
        first = round_ % len(cells)
        for cell in [*cells[first:], *cells[:first]]:
            if cell.way.due(cell.case, round_):
                yield round_, cell


def plan(cells: Sequence[Cell], runs: int) -> Results:
    """What can be measured here, and why the rest cannot."""
    results = Results(cells=tuple(cells), runs=runs)
    available = memory_available() - sum({cell.case.size for cell in cells})
    for cell in cells:
        needed = cell.way.memory(cell.case)
        if reason := cell.way.missing(cell.case):
            results.missing[cell] = reason
        elif needed > available:
            free = f"{max(available, 0) / 2**30:.1f} are free beside the guests"
            results.missing[cell] = f"needs {needed / 2**30:.1f} GiB more memory, {free}"
    return results


def run(results: Results, tell: Callable[[str], None] = lambda _: None) -> None:
    """Measure what was planned, in turns. tell: is given a line a sample."""
    turns = [turn for turn in schedule(results.cells, results.runs) if turn[1] not in results.missing]
    began = time.monotonic()
    with Memory() as memory:
        for done, (round_, cell) in enumerate(turns, 1):
            if results.hopeless(cell):
                continue
            one = sample(cell, memory)
            results.samples.append(one)
            figure = f"FAILED: {one.failed[:300]}"
            if not one.failed:
                figure = f"blackout {one.blackout * 1000:.1f} ms, {one.seconds:.2f} s in all"
            left = (time.monotonic() - began) / done * (len(turns) - done) / 60
            tell(f"round {round_ + 1} of {results.runs}, {left:.0f} min left: {cell}: {figure}")


def memory_available() -> int:
    """Bytes that can be had without swapping."""
    with open("/proc/meminfo") as file:
        kibibytes = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    return kibibytes * 1024
