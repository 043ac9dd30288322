"""What a unit is told that would start its guest afresh, at every moment of a jump."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cpr.cli import main
from cpr.errors import Exit
from cpr.linux.process import open_process
from cpr.reboot import manifest as manifests
from cpr.reboot import store
from cpr.reboot.claims import claim_on
from cpr.reboot.manifest import Phase, Restore, Result
from tests.unit.reboot.saved import guest, manifest

if TYPE_CHECKING:
    from pathlib import Path

UNIT = "web1.service"
GONE = 1 << 30


@pytest.fixture
def base(tmp_path: Path) -> str:
    return str(tmp_path / "cpr")


def put(base: str, run: str, phase: Phase, restore: Restore | None = None, pid: int = GONE) -> str:
    """A run whose guest is of the unit; its directory."""
    directory = store.make_run(run, base)
    saved = replace(guest(), unit=UNIT, pid=pid, restore=restore or Restore())
    manifests.write(directory, replace(manifest(saved), run=run, phase=phase))
    store.make_current(directory)
    return directory


def ourselves() -> tuple[int, int]:
    with open_process(os.getpid()) as process:
        return process.pid, process.start_time


def test_nothing_was_ever_saved(base: str) -> None:
    assert claim_on(UNIT, base) == ""


@pytest.mark.parametrize("phase", [Phase.SAVED, Phase.COMMITTED, Phase.JUMPING])
def test_a_saved_guest_is_not_started_afresh(base: str, phase: Phase) -> None:
    put(base, "1", phase)
    assert "cpr restore" in claim_on(UNIT, base)
    assert claim_on("other.service", base) == ""


@pytest.mark.parametrize("phase", [Phase.SAVING, Phase.UNDOING, Phase.UNDONE])
def test_one_that_was_not_saved_in_the_end_is(base: str, phase: Phase) -> None:
    put(base, "1", phase)
    assert claim_on(UNIT, base) == ""


def test_one_that_is_back_holds_its_unit_as_long_as_it_runs(base: str) -> None:
    pid, start_time = ourselves()
    directory = put(base, "1", Phase.JUMPING, Restore(result=Result.RESTORED, pid=pid, start_time=start_time))
    assert f"pid {pid}" in claim_on(UNIT, base)
    store.drop_current(directory)  # as when all are back
    assert f"pid {pid}" in claim_on(UNIT, base)
    put(base, "1", Phase.JUMPING, Restore(result=Result.RESTORED, pid=pid, start_time=start_time + 1))
    assert claim_on(UNIT, base) == ""


def test_given_up_by_name(base: str) -> None:
    put(base, "1", Phase.JUMPING, Restore(result=Result.GIVEN_UP))
    assert claim_on(UNIT, base) == ""


def test_an_open_manifest_that_cannot_be_read_claims_everything(base: str) -> None:
    directory = put(base, "1", Phase.JUMPING)
    path = os.path.join(directory, manifests.NAME)
    with open(path, "r+b") as file:
        file.truncate(100)
    assert "cannot be read" in claim_on(UNIT, base)
    assert "cannot be read" in claim_on("other.service", base)
    store.drop_current(directory)
    assert claim_on(UNIT, base) == ""


def test_the_command(base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CPR_STATE_DIR", base)
    assert main.run(["may-start", "--unit", UNIT]) == Exit.OK
    put(base, "1", Phase.COMMITTED)
    assert main.run(["may-start", "--unit", UNIT]) == Exit.BLOCKED
    assert UNIT in capsys.readouterr().err
    assert main.run(["may-start", "--unit", UNIT, "--json"]) == Exit.BLOCKED
    document = json.loads(capsys.readouterr().out)
    assert (document["format"], document["may_start"]) == ("cpr.may-start/1", False)
