"""The measurement of a file system: it comes to a number, and leaves nothing."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from cpr.linux.writerate import write_rate

if TYPE_CHECKING:
    from pathlib import Path


def test_a_rate_and_nothing_left(tmp_path: Path) -> None:
    assert write_rate(str(tmp_path), size=1 << 20) > 0
    assert os.listdir(tmp_path) == []


def test_it_ends_in_time(tmp_path: Path) -> None:
    """After the first round that ends too late."""
    assert write_rate(str(tmp_path), size=1 << 20, rounds=1 << 30, longest=0.01) > 0


def test_nowhere(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_rate(str(tmp_path / "gone"))
