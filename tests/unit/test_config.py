"""Settings: files below the environment, and nothing that cannot be meant."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cpr.config import Config, load
from cpr.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


def files(tmp_path: Path, *texts: str) -> list[str]:
    paths = []
    for number, text in enumerate(texts):
        path = tmp_path / f"{number}.toml"
        path.write_text(text)
        paths.append(str(path))
    return paths


def test_defaults(tmp_path: Path) -> None:
    assert load({}, [str(tmp_path / "none")]) == Config()


def test_later_ones_lie_above(tmp_path: Path) -> None:
    paths = files(tmp_path, "[update]\njobs = 2\ntimeout = 60", "[update]\njobs = 3\nmax-downtime = 1.5")
    assert load({"CPR_TIMEOUT": "30", "CPR_JOBS": ""}, paths) == Config(jobs=3, timeout=30.0, max_downtime=1.5)


@pytest.mark.parametrize(
    "text", ["nonsense", "[update]\nspeed = 1", "[update]\njobs = 0", '[update]\njobs = "x"', "[other]\n", "update = 1"]
)
def test_what_cannot_be_meant(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"0\.toml"):
        load({}, files(tmp_path, text))


@pytest.mark.parametrize(("name", "value"), [("CPR_TIMEOUT", "soon"), ("CPR_MANAGER_EVENTS", "some")])
def test_a_variable_that_cannot_be_meant(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=name):
        load({name: value}, [])
