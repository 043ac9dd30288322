"""Samples: one guest moved once, in a lab of its own; and many, in turns.

Nothing is left behind by a sample, whatever happened in it. Out of scope: what the figures are judged by.
"""

from __future__ import annotations

import contextlib
from collections import Counter
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


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One move. blackout and seconds in seconds. failed: why it is not a figure; the others are then of no meaning."""

    case: Case
    way: str
    blackout: float = 0.0
    seconds: float = 0.0
    kept: Kept | None = None
    failed: str = ""


@dataclass(frozen=True, kw_only=True)
class Results:
    """All samples of a run, and why some ways were not measured in some cases."""

    cases: tuple[Case, ...]
    ways: tuple[str, ...]
    runs: int
    samples: list[Sample] = field(default_factory=list)
    missing: dict[tuple[Case, str], str] = field(default_factory=dict)

    def of(self, case: Case, way: str) -> list[Sample]:
        """The samples of a way in a case."""
        return [sample for sample in self.samples if sample.case == case and sample.way == way]

    def good(self, case: Case, way: str) -> list[Sample]:
        """Those that are figures."""
        return [sample for sample in self.of(case, way) if not sample.failed]


def sample(case: Case, way: Way, memory: Memory) -> Sample:
    """Start a guest, move it, see whether it is well."""
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
            return Sample(case=case, way=way.name, blackout=moved.blackout, seconds=moved.seconds, kept=kept)
    except (WayFailed, LabError, CprError, OSError, TimeoutError) as error:
        return Sample(case=case, way=way.name, failed=" ".join(str(error).split()) or type(error).__name__)


def schedule(cases: Sequence[Case], ways: Sequence[Way], runs: int) -> Iterator[tuple[int, Case, Way]]:
    """Who comes when: round after round, each way once in each case, and each round begins with another way."""
    turns = [(case, way) for case in cases for way in ways]
    for round_ in range(runs):
        first = round_ % len(turns)
        for case, way in turns[first:] + turns[:first]:
            if way.due(case, round_):
                yield round_, case, way


def missing(case: Case, way: Way, available: int) -> str | None:
    """Why a way is not measured in a case, or None. available: bytes of memory beside that of the guests."""
    if reason := way.missing(case):
        return reason
    if way.memory(case) > available:
        return f"needs {way.memory(case) / 2**30:.1f} GiB of memory, {max(available, 0) / 2**30:.1f} are free"
    return None


def run(
    cases: Sequence[Case],
    ways: Sequence[Way],
    runs: int,
    tell: Callable[[str], None] = lambda _: None,
) -> Results:
    """Measure every way in every case `runs` times, in turns. tell: is given a line a sample."""
    results = Results(cases=tuple(cases), ways=tuple(way.name for way in ways), runs=runs)
    available = memory_available() - sum({case.size for case in cases})
    for case in cases:
        for way in ways:
            if reason := missing(case, way, available):
                results.missing[case, way.name] = reason
    failures: Counter[tuple[Case, str]] = Counter()
    with Memory() as memory:
        for round_, case, way in schedule(cases, ways, runs):
            key = case, way.name
            hopeless = failures[key] >= GIVEN_UP_AFTER and not results.good(*key)
            if key in results.missing or hopeless:
                continue
            one = sample(case, way, memory)
            results.samples.append(one)
            failures[key] += bool(one.failed)
            figure = one.failed[:300] or f"blackout {one.blackout * 1000:.1f} ms, {one.seconds:.2f} s in all"
            tell(f"round {round_ + 1} of {runs}: {case_name(case)}, {way.name}: {figure}")
    return results


def case_name(case: Case) -> str:
    """A case in words."""
    return f"{case.old.version} -> {case.new.version}, {case.size >> 20} MiB, {case.load}"


def memory_available() -> int:
    """Bytes that can be had without swapping."""
    with open("/proc/meminfo") as file:
        kibibytes = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    return kibibytes * 1024
