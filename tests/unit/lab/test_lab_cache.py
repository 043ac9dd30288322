"""The cache: built once, whole or not at all, anew for another recipe."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from tests.lab import LabError, cache


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CPR_LAB_CACHE", str(tmp_path / "lab"))
    monkeypatch.delenv("SUDO_UID", raising=False)
    return tmp_path / "lab"


def build(workspace: cache.Workspace) -> None:
    time.sleep(0.2)
    (workspace.out / "who").write_text(str(os.getpid()))
    (workspace.scratch / "junk").touch()


def artifact_in_child(_: int) -> str:
    return (cache.artifact("thing", "1", build) / "who").read_text()


def test_artifact_is_built_once_by_one_of_many(root: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        builders = pool.map(artifact_in_child, range(3))
    assert len(set(builders)) == 1
    assert [entry.name for entry in root.iterdir() if "partial" in entry.name] == []


def test_artifact_there_is_found_in_milliseconds() -> None:
    first = cache.artifact("thing", "1", build)
    start = time.monotonic()
    assert cache.artifact("thing", "1", build) == first
    assert time.monotonic() - start < 0.05


def test_other_recipe_is_another_artifact() -> None:
    assert cache.artifact("thing", "1", build) != cache.artifact("thing", "2", build)
    assert len(cache.artifacts()) == 2


def test_failed_build_leaves_nothing(root: Path) -> None:
    def fail(workspace: cache.Workspace) -> None:
        (workspace.out / "half").touch()
        raise LabError("no mirror")

    with pytest.raises(LabError, match="no mirror"):
        cache.artifact("thing", "1", fail)
    assert [entry.name for entry in root.iterdir()] == [".thing.lock"]


def test_old_recipes_go_when_they_are_old() -> None:
    old = cache.artifact("thing", "1", build)
    other = cache.artifact("another", "1", build)
    for directory in (old, other):
        os.utime(directory, (0, 0))
    new = cache.artifact("thing", "2", build)
    assert cache.artifacts() == sorted([other, new])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_under_sudo_everything_belongs_to_the_person(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_UID", "65534")
    artifact = cache.artifact("thing", "1", build)
    for path in (root, root / ".thing.lock", artifact, artifact / "who"):
        assert path.stat().st_uid == 65534
