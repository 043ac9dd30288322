"""Stamps of RAM files: what is noticed, and what is not."""

from __future__ import annotations

import itertools
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from cpr.reboot.stamp import PAGE, StampError, differences, from_json, places, take, to_json

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
ID: dict[str, Any] = {"kind": "devdax", "start": 1 << 30}


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    path = tmp_path / "ram"
    path.write_bytes(os.urandom(8 * MIB))
    return path


@pytest.mark.parametrize("size", [PAGE, 2 * PAGE, 255 * PAGE, 256 * PAGE, 257 * PAGE, MIB, 766 * MIB, 1 << 40])
def test_places(size: int) -> None:
    found = places(size)
    assert found[0] == 0
    assert found[-1] == size - PAGE
    assert len(found) == len(set(found))
    assert min(192, size // PAGE) <= len(found) <= 256
    assert list(found) == sorted(found)
    assert all(place % PAGE == 0 for place in found)
    widest = max((b - a for a, b in itertools.pairwise(found)), default=0)
    assert widest <= size // 191 + PAGE, "spread evenly"
    assert sum(place < 32 * MIB for place in found) >= min(64, size // PAGE), "and at the beginning"


def test_places_of_a_size_that_is_no_multiple() -> None:
    assert places(PAGE + 1) == (0, PAGE)


def test_the_same_memory_has_the_same_stamp(ram: Path) -> None:
    stamp = take(str(ram), 8 * MIB, ID)
    assert stamp == take(str(ram), 8 * MIB, ID)
    assert differences(stamp, str(ram), dict(ID)) == ()
    assert from_json(json.loads(json.dumps(to_json(stamp)))) == stamp


@pytest.mark.parametrize("where", [0, 8 * MIB - 1, "sampled"])
def test_one_byte_of_a_sampled_page(ram: Path, where: int | str) -> None:
    stamp = take(str(ram), 8 * MIB, ID)
    position = stamp.places[100] + 17 if isinstance(where, str) else where
    data = bytearray(ram.read_bytes())
    data[position] ^= 1
    ram.write_bytes(data)
    [line] = differences(stamp, str(ram), ID)
    assert f"1 of {len(stamp.places)} sampled pages" in line
    assert hex(position // PAGE * PAGE) in line


def test_a_page_between_the_samples_is_not_seen(ram: Path) -> None:
    stamp = take(str(ram), 8 * MIB, ID)
    hidden = next(n for n in range(0, 8 * MIB, PAGE) if n not in stamp.places)
    with ram.open("r+b") as file:
        file.seek(hidden)
        file.write(bytes(PAGE))
    assert differences(stamp, str(ram), ID) == ()


def test_wiped_and_foreign_memory(ram: Path) -> None:
    stamp = take(str(ram), 8 * MIB, ID)
    ram.write_bytes(bytes(8 * MIB))
    [line] = differences(stamp, str(ram), ID)
    assert "wiped" in line
    ram.write_bytes(os.urandom(8 * MIB))
    [line] = differences(stamp, str(ram), ID)
    assert f"{len(stamp.places)} of {len(stamp.places)}" in line
    assert "..." in line


def test_memory_of_zeroes_stays_itself(tmp_path: Path) -> None:
    (tmp_path / "ram").write_bytes(bytes(MIB))
    assert differences(take(str(tmp_path / "ram"), MIB, ID), str(tmp_path / "ram"), ID) == ()


def test_another_identity_is_named_and_nothing_is_read(ram: Path) -> None:
    stamp = take(str(ram), 8 * MIB, ID)
    ram.unlink()
    assert differences(stamp, str(ram), {"kind": "file", "inode": 3}) == (
        "inode: None then, 3 now",
        "kind: devdax then, file now",
        f"start: {1 << 30} then, None now",
    )


def test_part_of_a_file(ram: Path) -> None:
    stamp = take(str(ram), 4 * MIB, ID, offset=4 * MIB)
    data = bytearray(ram.read_bytes())
    data[0] ^= 1
    ram.write_bytes(data)
    assert differences(stamp, str(ram), ID) == ()
    data[4 * MIB] ^= 1
    ram.write_bytes(data)
    assert differences(stamp, str(ram), ID)


def test_what_cannot_be_stamped(ram: Path, tmp_path: Path) -> None:
    stamp = take(str(ram), 8 * MIB, ID)
    with ram.open("r+b") as file:
        file.truncate(8 * MIB - 1)
    with pytest.raises(StampError, match="bytes, where"):
        differences(stamp, str(ram), ID)
    with pytest.raises(StampError, match="No such file"):
        take(str(tmp_path / "nowhere"), MIB, ID)
    with pytest.raises(StampError, match="neither"):
        take(str(tmp_path), MIB, ID)
    with pytest.raises(StampError, match="cannot be mapped"):
        take("/dev/null", MIB, ID)
    (tmp_path / "link").symlink_to(ram)
    with pytest.raises(StampError):
        take(str(tmp_path / "link"), MIB, ID)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StampError, match="neither"):
        take(str(tmp_path / "fifo"), MIB, ID)


def test_a_character_device_is_mapped() -> None:
    """/dev/zero in the place of device DAX."""
    stamp = take("/dev/zero", MIB, ID)
    assert differences(stamp, "/dev/zero", ID) == ()


@pytest.mark.parametrize(
    "change",
    [{"size": 0}, {"size": -1}, {"size": "1"}, {"size": True}, {"offset": None}, {"digests": []}, {"digests": [1, 2]},
     {"digests": ["a"] * 300}, {"identity": 3}, {"places": [0]}, {"places": [MIB] * 256}, {"places": None}],
)  # fmt: skip
def test_values_that_are_no_stamp(ram: Path, change: dict[str, Any]) -> None:
    value = to_json(take(str(ram), MIB, ID))
    with pytest.raises((KeyError, TypeError, ValueError)):
        from_json({**value, **change})
    for key in value:
        with pytest.raises(KeyError):
            from_json({k: v for k, v in value.items() if k != key})
