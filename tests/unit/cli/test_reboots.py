"""`cpr runs` and `cpr log` show reboots beside restarts, in words and as documents."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cpr.cli import main
from cpr.errors import RUNS_NEW, Exit
from cpr.journal import Journal
from cpr.linux import proc
from cpr.model import Outcome, Status
from cpr.reboot import manifest as manifests
from cpr.reboot import store
from cpr.reboot.manifest import Phase, Restore, Result
from tests.unit import values
from tests.unit.fake_world import FakeStep
from tests.unit.reboot.saved import guest, manifest

if TYPE_CHECKING:
    from pathlib import Path

RUN = "20261120T101500-3f2a"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CPR_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("CPR_STATE_DIR", str(tmp_path / "state"))
    return str(tmp_path / "state")


def jumped(base: str) -> str:
    """web1 is back, db1 was tried and waits; the manifest's path."""
    back = Restore(result=Result.RESTORED, pid=5151, start_time=7, time=1_700_000_100.0, tries=1)
    waits = Restore(words="db1 is not restored: RAM ram0: /dev/dax0.1: No such file", time=1_700_000_101.0, tries=2)
    known = manifest(replace(guest(), restore=back), replace(guest(4343, "db1"), restore=waits))
    directory = store.make_run(RUN, base)
    store.make_current(directory)
    return manifests.write(directory, replace(known, phase=Phase.JUMPING))


def restarted() -> None:
    """A restart of today: after the reboot."""
    journal = Journal(values.plan(FakeStep(text="go", commit=True)), "20200101T000000-0001")
    journal.close(Outcome(guest="web1", uuid="u", status=Status.UPDATED, exit_code=0, where=RUNS_NEW))


def test_runs(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    jumped(base)
    restarted()
    assert main.run(["runs"]) == Exit.OK
    head, reboot, restart = capsys.readouterr().out.splitlines()
    assert head.split() == ["RUN", "GUEST", "ENGINE", "FROM", "TO", "RESULT"]
    columns = re.split(r" {2,}", reboot)
    assert columns == [RUN, "web1, db1", "reboot", "6.12.8", "7.2.1", "1 back, 1 waiting: cpr restore"]
    assert "handover" in restart, "in the order of time, not of names"
    assert main.run(["runs", "--json"]) == Exit.OK
    document = json.loads(capsys.readouterr().out)
    assert document["unreadable"] == []
    first, second = document["runs"]
    assert (second["mode"], second["run"]) == ("restart", "20200101T000000-0001")
    assert (first["run"], first["mode"], first["phase"], first["open"]) == (RUN, "reboot", "jumping", True)
    assert (first["kernel_before"], first["kernel_after"]) == ("6.12.8", "7.2.1")
    assert first["counts"] == {"back": 1, "waiting": 1}
    assert first["next"] == "cpr restore"
    assert first["time"] == "2023-11-14T22:13:20+00:00"
    assert [(g["name"], g["place"], g["pid_after"]) for g in first["guests"]] == [
        ("web1", "back", 5151), ("db1", "waiting", None),
    ]  # fmt: skip


def test_log(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = jumped(base)
    assert main.run(["log", RUN]) == Exit.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"run {RUN}: kernel 6.12.8 -> 7.2.1, 2023-11-14T22:13:20+00:00, jumping, the host was booted since: "
        "1 back, 1 waiting"
    )
    assert "web1 (pid 4242)" in lines[1]
    assert "back as pid 5151" in lines[1]
    assert "waiting, 2 attempt(s)" in lines[2]
    assert "/dev/dax0.1" in lines[3]
    assert "/var/lib/cpr/web1.state" in lines[4]
    assert lines[-1] == "  next: cpr restore"
    assert main.run(["log", RUN, "--json"]) == Exit.OK
    document = json.loads(capsys.readouterr().out)
    assert (document["format"], document["run"], document["manifest"]) == ("cpr.log/1", RUN, path)
    assert document["guests"][1]["attempts"] == 2
    assert "/dev/dax0.1" in document["guests"][1]["error"]


def test_all_are_back(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It stays visible, and nothing is left to do."""
    path = jumped(base)
    known = manifests.with_restore(manifests.read_file(path), 4343, Restore(result=Result.GIVEN_UP))
    manifests.write_file(path, known)
    store.drop_current(os.path.dirname(path))
    assert main.run(["runs"]) == Exit.OK
    assert capsys.readouterr().out.rstrip().endswith("1 back, 1 given up")
    assert main.run(["log", RUN]) == Exit.OK
    assert "next:" not in capsys.readouterr().out


def test_what_cannot_be_read_is_said(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = jumped(base)
    os.truncate(path, 100)
    assert main.run(["runs"]) == Exit.OK
    out, err = capsys.readouterr()
    assert out == "no runs\n"
    assert path in err
    assert main.run(["runs", "--json"]) == Exit.OK
    (error,) = json.loads(capsys.readouterr().out)["unreadable"]
    assert path in error["message"]
    for command in (["log", RUN], ["recover"]):
        assert main.run(command) == Exit.NOT_FOUND, "the guests are saved, and nobody can tell where"
        assert path in capsys.readouterr().err


def test_a_guest_saved_by_hand(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "web1.manifest")
    known = replace(
        manifest(guest()), run="save-4242-1700000000", release="", phase=Phase.COMMITTED, boot_id=proc.boot_id()
    )
    manifests.write_file(path, known)
    store.note_by_hand(path, known)
    assert main.run(["runs"]) == Exit.OK
    row = capsys.readouterr().out.splitlines()[1]
    assert re.split(r" {2,}", row) == [
        "save-4242-1700000000", "web1", "save", "7.2.22", "11.1.3", f"1 waiting: cpr load {tmp_path}/web1",
    ]  # fmt: skip
    assert main.run(["log", "save-4242-1700000000", "--json"]) == Exit.OK
    document = json.loads(capsys.readouterr().out)
    assert (document["mode"], document["kernel_after"], document["manifest"]) == ("save", None, path)
    assert main.run(["log", "save-4242-1700000000"]) == Exit.OK
    lines = capsys.readouterr().out.splitlines()
    assert f"saved to {tmp_path}/web1" in lines[0]
    assert lines[-1] == f"  next: cpr load {tmp_path}/web1"
    os.unlink(path)
    assert main.run(["log", "save-4242-1700000000"]) == Exit.NOT_FOUND
