"""runs, log and recover over journals that a run has written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from cpr.cli import main
from cpr.errors import RUNS_NEW
from cpr.journal import Journal
from cpr.model import Outcome, Status
from tests.unit import values
from tests.unit.fake_world import FakeStep

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CPR_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("CPR_STATE_DIR", str(tmp_path / "state"))
    return tmp_path


def write(run: str, *, close: bool = True) -> None:
    journal = Journal(values.plan(FakeStep(text="prepare"), FakeStep(text="continue", commit=True)), run)
    journal.step(0, "doing")
    journal.step(0, "done")
    if not close:
        journal.abandon()
        return
    journal.close(Outcome(guest="web1", uuid="u", status=Status.UPDATED, exit_code=0, where=RUNS_NEW))


@pytest.mark.usefixtures("run_dir")
def test_no_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["runs"]) == 0
    assert capsys.readouterr().out == "no runs\n"
    assert main.run(["recover"]) == 0
    assert "nothing to recover" in capsys.readouterr().out


@pytest.mark.usefixtures("run_dir")
def test_runs(capsys: pytest.CaptureFixture[str]) -> None:
    write("20261120T101500-0001")
    write("20261120T101600-0002", close=False)
    assert main.run(["runs"]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["RUN", "GUEST", "ENGINE", "FROM", "TO", "RESULT"]
    assert first.split() == ["20261120T101500-0001", "web1", "handover", "7.2.22", "11.1.3", "updated"]
    assert "cpr recover" in second
    assert main.run(["runs", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [(r["run"], r["guests"][0]["open"]) for r in document["runs"]] == [
        ("20261120T101500-0001", False),
        ("20261120T101600-0002", True),
    ]


@pytest.mark.usefixtures("run_dir")
def test_log(capsys: pytest.CaptureFixture[str]) -> None:
    write("20261120T101500-0001")
    assert main.run(["log", "20261120T101500-0001"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[0] == "done"
    assert "not reached" in lines[2]
    assert "<- commit" in lines[2]
    assert main.run(["log", "20261120T101500-0001", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [s["state"] for s in document["guests"][0]["steps"]] == ["done", None]
    assert document["guests"][0]["outcome"]["status"] == "updated"


def test_a_journal_that_cannot_be_read(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("20261120T101500-0001")
    [path] = run_dir.rglob("*.journal")
    path.write_text("nonsense\n")
    assert main.run(["runs"]) == 0
    assert "no runs" in capsys.readouterr().out
    assert main.run(["log", "20261120T101500-0001"]) == 1
    assert "not a readable journal" in capsys.readouterr().err
