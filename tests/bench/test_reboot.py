"""The table of jumps: what it makes of events and samples. Nothing is measured here."""

from __future__ import annotations

import pytest

from tests.bench.reboot import COLUMNS, Results, Sample, parts, table


def event(second: float, text: str) -> dict[str, object]:
    return {"time": f"2026-11-20T10:15:{second:09.6f}+00:00", "guest": "host", "event": "step", "text": text}


EVENTS = [
    event(0.0, "load the kernel"),
    event(2.0, "look"),
    event(2.1, "look"),
    event(2.5, "save"),
    event(2.6, "save"),
    event(3.5, "end the old QEMUs"),
    {**event(3.6, "nothing"), "event": "outcome"},
    event(4.0, "jump into the new kernel"),
]


def test_parts_are_from_the_first_of_each_to_the_first_of_the_next() -> None:
    at = 1795169712.0  # 2026-11-20T10:15:12
    found = parts(EVENTS, at, 3.25)
    wanted = {"load": 2.0, "look": 0.5, "save": 1.0, "end": 0.5, "jump": 8.0, "restore": 3.25}
    assert found == pytest.approx(wanted)
    with pytest.raises(KeyError):
        parts(EVENTS[:-1], at, 1.0)


def sample(count: int, pause: float, *problems: str, memory: int = 64, seconds: float = 0.0) -> Sample:
    each = dict.fromkeys(COLUMNS, seconds or float(count))
    return Sample(
        count=count, kernel="7.2", parts=each, pauses=(pause,) * count, memory=memory, seen=(0.05,), problems=problems
    )


def test_rows() -> None:
    found = [sample(1, 14.0), sample(4, 16.0), sample(1, 15.0, "page 0x1000"), sample(1, 14.0, memory=640, seconds=1.1)]
    header, one, wrong, four, large, times, growth = table(Results(samples=found)).splitlines()
    assert all(name in header for name in COLUMNS)
    assert one.split() == ["64", "1", "2", *["1.00"] * 7, "14.50", "15.00", "0.05"]
    assert "page 0x1000" in wrong
    assert four.split()[:3] == ["64", "4", "1"]
    assert four.split()[-4] == "1.00", "a guest's part of the save"
    assert large.split()[:3] == ["640", "1", "1"]
    assert times == "4 guests take so many times as long as 1: save 4.0, restore 4.0 (at most 6)"
    assert growth == "640 MiB take so many times as long as 64: save 1.10, restore 1.10"


def test_nothing_measured() -> None:
    assert len(table(Results()).splitlines()) == 1
