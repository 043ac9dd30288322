"""State files and disks: what is noticed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from cpr.reboot.files import FileError, disk, disk_differences, seal, state_differences

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    path.write_bytes(os.urandom(300_000))
    return path


def test_a_state_file_that_stays(state: Path) -> None:
    sealed = seal(str(state))
    assert (sealed.size, len(sealed.sha256)) == (300_000, 64)
    assert state_differences(sealed) == ()


def test_cut_changed_and_lost(state: Path) -> None:
    sealed, data = seal(str(state)), state.read_bytes()
    state.write_bytes(data[:-1])
    assert "299999 now" in state_differences(sealed)[0]
    state.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert "changed" in state_differences(sealed)[0]
    state.unlink()
    with pytest.raises(FileError, match="No such file"):
        state_differences(sealed)
    state.mkdir()
    with pytest.raises(FileError, match="regular"):
        state_differences(sealed)


def test_an_empty_state_is_none(state: Path) -> None:
    state.write_bytes(b"")
    with pytest.raises(FileError, match="empty"):
        seal(str(state))


def test_a_link_is_no_state(state: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(state)
    with pytest.raises(FileError):
        seal(str(tmp_path / "link"))


def test_a_disk_that_stays(state: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(state)
    before = disk(str(tmp_path / "link"))
    state.read_bytes()
    assert disk_differences(before) == ()


def test_disks_that_were_changed(state: Path) -> None:
    before = disk(str(state))
    os.utime(state, ns=(before.mtime_ns, before.mtime_ns + 1))
    assert "was written" in disk_differences(before)[0]
    with state.open("ab") as file:
        file.write(b"x")
    assert "300001 now" in disk_differences(before)[0]
    other = state.with_name("other")
    other.write_bytes(bytes(300_000))
    os.rename(other, state)
    assert "another file" in disk_differences(before)[0]
    state.unlink()
    assert "No such file" in disk_differences(before)[0]


def test_what_is_no_disk(tmp_path: Path) -> None:
    for path in (str(tmp_path), "/dev/null"):
        with pytest.raises(FileError, match="neither"):
            disk(path)


MIB = 1 << 20


def test_a_state_with_holes(tmp_path: Path) -> None:
    """Where zeroes are holes and where they are written is the same; what is changed, or grows, is not."""
    written, holes = tmp_path / "written", tmp_path / "holes"
    data = {0: b"head", 5 * MIB - 2: b"over", 9 * MIB + 17: b"tail"}
    written.write_bytes(bytes(12 * MIB + 5))
    holes.touch()
    for path in (written, holes):
        with path.open("r+b") as file:
            file.truncate(12 * MIB + 5)
            for at, text in data.items():
                file.seek(at)
                file.write(text)
    assert holes.stat().st_blocks < written.stat().st_blocks
    looks: list[int] = []
    first, second = (seal(str(path), sparse=True, attend=lambda: looks.append(1)) for path in (written, holes))
    assert (first.sha256, first.size, first.sparse) == (second.sha256, second.size, True)
    assert looks, "an interrupt is noticed meanwhile"
    assert state_differences(second) == ()
    with holes.open("r+b") as file:
        file.seek(3 * MIB)
        file.write(b"x")
    assert "changed" in state_differences(second)[0]
    with holes.open("r+b") as file:
        file.seek(3 * MIB)
        file.write(b"\0")
    assert state_differences(second) == ()
    os.truncate(holes, 13 * MIB)
    assert f"{13 * MIB} now" in state_differences(second)[0]


def test_a_chunk_at_another_place_is_another_state(tmp_path: Path) -> None:
    path = tmp_path / "state"
    sums = set()
    for at in (0, MIB, 2 * MIB):
        with path.open("wb") as file:
            file.truncate(4 * MIB)
            file.seek(at)
            file.write(b"x" * MIB)
        sums.add(seal(str(path), sparse=True).sha256)
    assert len(sums) == 3
