"""Bars: what the project promises of handover and re-exec, judged from fresh figures of this machine (pytest -m bench).

One run measures all rows in turns, so that a slow quarter of an hour hits them alike. The figures are printed
whether or not they hold. On a busy machine the absolute bars may fail for no fault of ours: the load is printed too.
"""

from __future__ import annotations

import pytest

from tests.bench import measure, table
from tests.bench.guest import Case
from tests.bench.host import host
from tests.bench.measure import Cell, Results
from tests.bench.ways import WAYS
from tests.lab import LabError, qemu

pytestmark = pytest.mark.bench

RUNS = 15
SMALL, BIG = 256 * 2**20, 8 * 2**30

WITHOUT_CONNECTIONS_SECONDS = 0.008
WITH_CONNECTIONS_SECONDS = 0.016
BIG_TO_SMALL = 1.3
HANDOVER_TO_TRANSFER = 1.5
REEXEC_TO_EXEC = 1.3


class Bars:
    """The rows that are judged, and what came of them."""

    def __init__(self) -> None:
        """Raises LabError if a QEMU cannot be had."""
        oldest, newer, newest = (qemu.obtain(key) for key in ("7.2", "11.1.a", "11.1.b"))
        across = Case(old=oldest, new=newer, size=SMALL, load="idle")
        big = Case(old=oldest, new=newer, size=BIG, load="idle")
        near = Case(old=newer, new=newest, size=SMALL, load="idle")
        self.handover = Cell(across, WAYS["handover"])
        self.console = Cell(across, WAYS["handover+console"])
        self.big = Cell(big, WAYS["handover"])
        self.near = Cell(near, WAYS["handover"])
        self.transfer = Cell(near, WAYS["cpr-transfer"])
        self.reexec = Cell(near, WAYS["reexec+console"])
        self.exec = Cell(near, WAYS["cpr-exec"])
        cells = [self.handover, self.console, self.big, self.near, self.transfer, self.reexec, self.exec]
        self.results: Results = measure.plan(cells, RUNS)

    def median(self, cell: Cell) -> float:
        """The median blackout in seconds. A row with a failed sample has none: the test fails."""
        if reason := self.results.missing.get(cell):
            pytest.skip(f"{cell}: {reason}")
        failed = [sample.failed for sample in self.results.of(cell) if sample.failed]
        assert not failed, f"{cell}: {len(failed)} samples failed: {failed[0]}"
        summary = table.blackout(self.results, cell)
        assert summary is not None
        assert summary.count == RUNS
        return summary.median


@pytest.fixture(scope="module")
def bars(request: pytest.FixtureRequest) -> Bars:
    try:
        it = Bars()
    except LabError as error:
        pytest.skip(str(error))
    before = host()
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print()
        measure.run(it.results, lambda line: print(line, flush=True))
        print("\n" + table.page(it.results, before, host()))
    return it


def test_blackout_without_connections(bars: Bars) -> None:
    median = bars.median(bars.handover)
    assert median <= WITHOUT_CONNECTIONS_SECONDS, f"median {median * 1000:.1f} ms"


def test_blackout_with_a_console_client(bars: Bars) -> None:
    median = bars.median(bars.console)
    kept = [sample.kept for sample in bars.results.of(bars.console)]
    assert all(one is not None and one.connection and one.ram for one in kept), kept
    assert median <= WITH_CONNECTIONS_SECONDS, f"median {median * 1000:.1f} ms"


def test_blackout_does_not_grow_with_ram(bars: Bars) -> None:
    small, big = bars.median(bars.handover), bars.median(bars.big)
    assert big / small <= BIG_TO_SMALL, f"8 GiB {big * 1000:.1f} ms, 256 MiB {small * 1000:.1f} ms"


def test_handover_is_about_as_quick_as_cpr_transfer(bars: Bars) -> None:
    handover, transfer = bars.median(bars.near), bars.median(bars.transfer)
    assert handover / transfer <= HANDOVER_TO_TRANSFER, (
        f"handover {handover * 1000:.1f} ms, cpr-transfer {transfer * 1000:.1f} ms"
    )


def test_reexec_is_about_as_quick_as_cpr_exec(bars: Bars) -> None:
    """Which keeps no connection."""
    kept = [sample.kept for sample in bars.results.of(bars.reexec)]
    assert all(one is not None and one.pid and one.connection and one.ram for one in kept), kept
    ours, native = bars.median(bars.reexec), bars.median(bars.exec)
    assert ours / native <= REEXEC_TO_EXEC, f"re-exec {ours * 1000:.1f} ms, cpr-exec {native * 1000:.1f} ms"
