"""The parts of the benchmark that need no QEMU: turns, statistics, the page, the options."""

from __future__ import annotations

import argparse
import json
import socket
from pathlib import Path

import pytest

from tests.bench import __main__ as command
from tests.bench import table
from tests.bench.guest import Case
from tests.bench.host import Host
from tests.bench.measure import Cell, Kept, Results, Sample, schedule
from tests.bench.native import listening
from tests.bench.ways import WAYS
from tests.lab.qemu import QemuBuild

HOST = Host(kernel="Linux 6.12", cpus=2, cpu="Some CPU", date="2026-01-02T03:04:05+00:00", load=(0.5, 0.4, 0.3))
GIB = 2**30


def build(version: str) -> QemuBuild:
    return QemuBuild(version, version, f"1:{version}", "suite", "id", Path("/qemu"))


def cell(way: str = "handover", size: int = GIB, load: str = "idle") -> Cell:
    return Cell(Case(old=build("7.2.22"), new=build("11.1.3"), size=size, load=load), WAYS[way])


def good(which: Cell, blackout: float, *, connection: bool | None = None) -> Sample:
    return Sample(cell=which, blackout=blackout, seconds=0.5, kept=Kept(pid=False, connection=connection, ram=True))


def test_every_round_measures_every_cell_and_begins_with_another() -> None:
    cells = [cell("handover"), cell("handover+console"), cell("cpr-exec")]
    turns = list(schedule(cells, 3))
    assert [round_ for round_, _ in turns] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    firsts = [turns[at][1] for at in (0, 3, 6)]
    assert set(firsts) == set(cells)
    for at in (0, 3, 6):
        assert {which for _, which in turns[at : at + 3]} == set(cells)


def test_copies_of_big_guests_are_measured_in_every_fifth_round() -> None:
    assert [round_ for round_, _ in schedule([cell("live-migration", 8 * GIB)], 15)] == [0, 5, 10]
    assert len(list(schedule([cell("live-migration", GIB)], 15))) == 15
    assert len(list(schedule([cell("handover", 8 * GIB)], 15))) == 15


def test_the_machine_type_is_the_old_qemus() -> None:
    assert cell().case.machine == "pc-q35-7.2"


def test_summary() -> None:
    assert table.Summary.of([4.0, 1.0, 2.0]) == table.Summary(2.0, 1.0, 4.0, 3)


def test_page_has_figures_reasons_and_failures() -> None:
    kept, console, transfer, live = (
        cell(w) for w in ("handover", "handover+console", "cpr-transfer", "live-migration")
    )
    results = Results(cells=(kept, console, transfer, live), runs=2)
    results.missing[transfer] = "QEMU 7.2.22 does not know it"
    results.samples += [
        good(kept, 0.004),
        good(kept, 0.006),
        good(console, 0.012, connection=True),
        good(console, 0.010, connection=False),
        Sample(cell=live, failed="the guest is broken: count goes from 98 to 87"),
        good(live, 0.150, connection=False),
    ]
    text = table.page(results, HOST, HOST)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("  ")}
    assert rows["handover"][:3] == ["5.0", "4.0", "6.0"]
    assert rows["handover"][6:] == ["2", "no", "-", "yes"]
    assert rows["handover+console"][6:] == ["2", "no", "1/2", "yes"]
    assert rows["cpr-transfer"] == ["-", "[1]"]
    assert rows["live-migration"][6:] == ["1", "no", "no", "yes", "[2]"]
    assert "[1] cpr-transfer: QEMU 7.2.22 does not know it" in text
    assert "1 of 2 failed: the guest is broken: count goes from 98 to 87" in text
    assert "Linux 6.12, 2 x Some CPU" in text
    assert "7.2.22 (1:7.2.22, suite)" in text


def test_failed_samples_alone_are_no_figure() -> None:
    live = cell("live-migration")
    results = Results(cells=(live,), runs=3, samples=[Sample(cell=live, failed="no")] * 2)
    assert results.hopeless(live)
    assert table.blackout(results, live) is None
    assert "2 of 2 failed, not tried again: no" in table.page(results, HOST, HOST)


def test_document_is_json() -> None:
    which = cell()
    results = Results(cells=(which,), runs=1, samples=[good(which, 0.004), Sample(cell=which, failed="no")])
    value = json.loads(json.dumps(table.document(results, HOST, HOST)))
    assert value["format"] == "cpr.bench/1"
    (row,) = value["cells"]
    assert row["way"] == "handover"
    assert row["samples"][0]["blackout_seconds"] == 0.004
    assert row["samples"][1] == {"failed": "no"}


@pytest.mark.parametrize(("text", "bytes_"), [("256M", 256 * 2**20), ("1g", GIB), ("512K", 2**19)])
def test_size(text: str, bytes_: int) -> None:
    assert command.size(text) == bytes_


@pytest.mark.parametrize("words", [["--sizes", "8"], ["--pairs", "7.2"], ["--load", "x"], ["--runs", "0"]])
def test_nonsense_is_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(words)


def test_pairs() -> None:
    assert command.pairs("7.2:11.1.a,10.0:10.0") == [("7.2", "11.1.a"), ("10.0", "10.0")]
    with pytest.raises(argparse.ArgumentTypeError):
        command.pairs("7.2:9.9")


def test_listening_is_not_being_bound(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        assert not listening(path)
        server.bind(str(path))
        assert not listening(path)
        server.listen()
        assert listening(path)
