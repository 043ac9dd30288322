"""The allocated file of records."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from cpr.linux.appendfile import AppendFile, read_records, sync_directory

if TYPE_CHECKING:
    from pathlib import Path


def test_records_and_the_room_for_them(tmp_path: Path) -> None:
    path = str(tmp_path / "j")
    with AppendFile(path, 8192) as file:
        status = os.stat(path)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_size == 8192
        assert status.st_blocks * 512 >= 8192
        assert read_records(path) == []
        file.append(b"one\n")
        file.append(b"two\n")
        assert read_records(path) == [b"one", b"two"]
        file.append(b"x" * 9000 + b"\n")
        file.append(b"four\n")
    assert read_records(path) == [b"one", b"two", b"x" * 9000, b"four"]
    with pytest.raises(FileExistsError):
        AppendFile(path, 1)


def test_what_was_not_needed_is_given_back(tmp_path: Path) -> None:
    path = str(tmp_path / "j")
    with AppendFile(path, 65536) as file:
        file.append(b"one\n")
        file.trim()
        assert os.stat(path).st_size == 4
        file.append(b"two\n")
    assert read_records(path) == [b"one", b"two"]


@pytest.mark.parametrize("sync", [False, True])
def test_small_and_synced(tmp_path: Path, sync: bool) -> None:
    path = str(tmp_path / "j")
    with AppendFile(path, 0, sync=sync) as file:
        file.append(b"\n")
        file.append(b"a\n")
        file.sync()
    assert read_records(path) == [b"", b"a"]
    sync_directory(path)


@pytest.mark.parametrize(
    ("content", "records"),
    [
        (b"", []),
        (b"\0" * 100, []),
        (b"one\ntwo\n", [b"one", b"two"]),
        (b"one\ntw", [b"one"]),
        (b"one\ntw\0\0\0", [b"one"]),
        (b"one\ntw\0\0\0\nthree\n", [b"one"]),
        (b"cut", []),
    ],
)
def test_torn_files(tmp_path: Path, content: bytes, records: list[bytes]) -> None:
    path = tmp_path / "j"
    path.write_bytes(content)
    assert read_records(str(path)) == records
    with AppendFile.resume(str(path)) as file:
        file.append(b"next\n")
    assert read_records(str(path)) == [*records, b"next"]


def test_no_room_is_met_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "j")
    with pytest.raises(OSError):
        AppendFile(path, 1 << 60)
    assert not os.path.exists(path)


def test_links_are_not_followed(tmp_path: Path) -> None:
    os.symlink(tmp_path / "elsewhere", tmp_path / "j")
    with pytest.raises(OSError):
        AppendFile(str(tmp_path / "j"), 10)
    with pytest.raises(OSError):
        AppendFile.resume(str(tmp_path / "j"))
    assert not (tmp_path / "elsewhere").exists()
