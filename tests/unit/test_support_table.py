"""The page of docs/support.md: rows that belong together are one, and what QEMU said is quoted once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.bench.host import Host
from tests.lab.qemu import QemuBuild
from tests.support_table import Move, numbers, page, quoted

HOST = Host(kernel="Linux 6.1", cpus=2, cpu="a CPU", date="2026-11-21T12:00:00+00:00", load=(0.1, 0.2, 0.3))


def build(version: str) -> QemuBuild:
    return QemuBuild(
        key=version, version=version, package=f"1:{version}", suite="s", build_id=version, binary=Path("/qemu")
    )


def move(old: str, new: str, *, guest: str = "counting", **outcome: Any) -> Move:
    known: dict[str, Any] = {"status": "updated", "findings": [], "error": None, "blackout_seconds": 0.005}
    return Move.of(build(old), build(old), build(new), {**known, **outcome}, machine="pc-q35-7.2", guest=guest)


REFUSED: dict[str, Any] = {"status": "rolled_back", "error": 'step: did not take it: "qemu-system-x86_64: VQ 0 is odd"'}


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| from")]


def test_samples_of_one_pair_are_one_row() -> None:
    moves = [move("7.2.22", "10.0.13", blackout_seconds=ms / 1000) for ms in (9.0, 4.0, 5.0)]
    assert rows(page(moves, HOST, HOST)) == [
        "| 7.2.22 | 10.0.13 | 7.2.22 | pc-q35-7.2 | updated | 3 | 5.0 | 4.0 | 9.0 |"
    ]


def test_a_refused_pair_has_qemus_words_and_no_figure() -> None:
    text = page([move("10.0.13", "11.1.3", **REFUSED), move("10.0.13", "11.1.2", **REFUSED)], HOST, HOST)
    assert rows(text) == [
        "| 10.0.13 | 11.1.2 | 10.0.13 | pc-q35-7.2 | refused, undone [1] | 1 |  |  |  |",
        "| 10.0.13 | 11.1.3 | 10.0.13 | pc-q35-7.2 | refused, undone [1] | 1 |  |  |  |",
    ]
    assert text.count("VQ 0 is odd") == 1


def test_results_that_differ_are_counted() -> None:
    text = page(
        [move("7.2.22", "10.0.13"), move("7.2.22", "10.0.13"), move("7.2.22", "10.0.13", **REFUSED)], HOST, HOST
    )
    (row,) = rows(text)
    assert "updated (2) refused, undone (1) [1] | 3 |" in row


def test_what_blocks_is_said() -> None:
    finding = {"severity": "blocker", "message": "no machine type pc-q35-11.1"}
    made = move("11.1.3", "7.2.22", status="blocked", error="cannot be updated", findings=[finding])
    assert made.words == "no machine type pc-q35-11.1"
    assert made.blackout is None


def test_header_says_where_when_and_with_what() -> None:
    text = page([move("10.0.13", "11.1.3"), move("7.2.22", "10.0.13", guest="Linux")], HOST, HOST)
    assert "Linux 6.1, 2 x a CPU" in text
    assert "2026-11-21T12:00:00" in text
    builds = [line for line in text.splitlines() if line.startswith("- QEMU ")]
    assert builds == [f"- QEMU {v} (1:{v}, s)" for v in ("7.2.22", "10.0.13", "11.1.3")]
    assert text.index("## Linux") < text.index("## counting")


def test_versions_are_numbers() -> None:
    assert sorted(["11.1.2", "7.2.22", "10.0.13"], key=numbers) == ["7.2.22", "10.0.13", "11.1.2"]


def test_only_qemus_words_are_quoted() -> None:
    assert quoted('move: "qemu-system-x86_64: a / qemu-system-x86_64: b"') == "a / b"
    assert quoted("no words") == "no words"
