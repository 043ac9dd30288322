"""What a unit is told that would start its guest afresh, at every moment of a jump."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cpr import journal
from cpr.cli import main
from cpr.errors import Exit
from cpr.linux import proc
from cpr.linux.dax import storage_of
from cpr.linux.process import open_process
from cpr.model import ProcessId
from cpr.reboot import manifest as manifests
from cpr.reboot import store
from cpr.reboot.claims import claim_on, unit_of
from cpr.reboot.manifest import Mode, Phase, Restore, Result
from tests.unit.reboot.saved import guest, manifest

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


def test_a_guest_that_moved_on_to_another_process_since(base: str, tmp_path: Path) -> None:
    """By an update: the pid of its restore is gone, and its RAM is in use. A child of ours has it mapped."""
    ram = tmp_path / "ram"
    ram.write_bytes(bytes(8192))
    back = Restore(result=Result.RESTORED, pid=GONE, start_time=1)
    directory = put(base, "1", Phase.JUMPING, back)
    known = manifests.read(directory)
    (saved,) = known.guests
    lies = replace(saved.ram[0], path=str(ram), storage=storage_of(str(ram)))
    manifests.write(directory, manifests.with_guests(known, replace(saved, ram=(lies,))))
    assert claim_on(UNIT, base) == ""
    script = "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script, ram], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert f"in use by pid {child.pid}" in claim_on(UNIT, base)
        child.communicate(b"\n")


def test_the_unit_of_a_guest_that_was_brought_back(base: str) -> None:
    """It is saved for a second kernel: it runs in the unit that restores, and is still the guest of its own."""
    pid, start_time = ourselves()
    process = ProcessId(pid, start_time)
    before = unit_of(process, base)
    assert before != UNIT
    put(base, "1", Phase.JUMPING, Restore(result=Result.RESTORED, pid=pid, start_time=start_time))
    assert unit_of(process, base) == UNIT
    assert unit_of(ProcessId(pid, start_time + 1), base) == before, "another one with its pid"



# -- saved by hand


def by_hand(base: str, directory: Path, restore: Restore | None = None, **changes: object) -> Path:
    """A guest of the unit, saved to a file; its manifest."""
    saved = replace(guest(), unit=UNIT, pid=GONE, restore=restore or Restore())
    known = {"run": "save-1", "phase": Phase.COMMITTED, "release": "", "boot_id": proc.boot_id(), **changes}
    made = replace(manifest(saved), **known)  # type: ignore[arg-type]
    path = directory / "web1.manifest"
    manifests.write_file(str(path), made)
    store.note_by_hand(str(path), made, base)
    return path


def test_a_guest_that_was_saved_by_hand(base: str, tmp_path: Path) -> None:
    path = by_hand(base, tmp_path)
    why = claim_on(UNIT, base)
    assert f"cpr load {tmp_path}/web1" in why
    assert claim_on("other.service", base) == ""
    path.write_bytes(path.read_bytes()[:100])
    assert "cannot be read" in claim_on(UNIT, base)
    assert claim_on("other.service", base) == "", "it is not this one's"
    path.unlink()
    assert claim_on(UNIT, base) == "", "it was thrown away"


def test_one_that_was_loaded_again_holds_its_unit_as_long_as_it_runs(base: str, tmp_path: Path) -> None:
    pid, start_time = ourselves()
    by_hand(base, tmp_path, Restore(result=Result.RESTORED, pid=pid, start_time=start_time))
    assert f"pid {pid}" in claim_on(UNIT, base)
    by_hand(base, tmp_path, Restore(result=Result.RESTORED, pid=pid, start_time=start_time + 1))
    assert claim_on(UNIT, base) == ""


def test_memory_that_ended_with_the_host(base: str, tmp_path: Path) -> None:
    by_hand(base, tmp_path, boot_id="another", mode=Mode.RESTART)
    assert claim_on(UNIT, base) == ""
    by_hand(base, tmp_path, boot_id="another", mode=Mode.REBOOT)
    assert "is saved" in claim_on(UNIT, base)


def test_a_save_that_was_undone(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPR_STATE_DIR", base)
    path = by_hand(base, tmp_path)
    assert store.by_hand() == ((UNIT, str(path)),)
    store.forget(str(path))
    assert store.by_hand() == ()
    assert claim_on(UNIT) == ""


Line = dict[str, object]
OUTSIDE: Line = {"fact": "outside", "unit": UNIT}
DONE: Line = {"outcome": {}}


def journaled(runs: Path, run: str, process: tuple[int, int], *lines: Line, boot_id: str = "") -> Path:
    """The journal of an update of a guest in this process."""
    path = Path(journal.journal_path(str(runs), run, ProcessId(*process)))
    path.parent.mkdir(parents=True)
    of: Line = {"name": "web1", "uuid": "", "runstate": "running", "pidfile": "", "cwd": "/", "discarding": []}
    of |= {"pid": process[0], "start_time": process[1], "uid": 0, "capabilities": {}, "parameters": {}, "monitor": {}}
    header = {"format": journal.FORMAT, "run": run, "boot_id": boot_id or proc.boot_id(), "steps": [], "guest": of}
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, *lines)))
    return path


def fact(name: str, process: tuple[int, int]) -> Line:
    return {"fact": name, "pid": process[0], "start_time": process[1]}


def test_a_guest_that_an_update_brought_back_outside(base: str, tmp_path: Path) -> None:
    runs = tmp_path / "run"
    old, gone = (GONE, 1), (GONE, 2)

    def claim(unit: str = UNIT) -> str:
        return claim_on(unit, base, str(runs))

    path = journaled(runs, "1", old, OUTSIDE)
    assert "is being brought back" in claim()
    assert claim("other.service") == ""
    path.unlink()
    path.parent.rmdir()
    path = journaled(runs, "1", old, OUTSIDE, fact("back", ourselves()), DONE)
    assert f"runs as pid {os.getpid()}" in claim()
    path.write_text(path.read_text().replace(proc.boot_id(), "another"))
    assert claim() == "", "of another boot"
    path.unlink()
    path.parent.rmdir()
    journaled(runs, "1", old, OUTSIDE, fact("back", gone), DONE)
    assert claim() == "", "it was shut down"
    journaled(runs, "2", gone, fact("new", ourselves()), DONE)
    assert f"runs as pid {os.getpid()}" in claim(), "a later update has put it there"
    journaled(runs, "3", ourselves(), fact("new", ourselves()), DONE)
    assert f"runs as pid {os.getpid()}" in claim(), "and it does not go round in circles"


def test_an_update_that_was_undone_and_left_nothing(base: str, tmp_path: Path) -> None:
    """It was undone before the old one was ended, or the new one could not be started: nobody runs."""
    runs = tmp_path / "run"
    journaled(runs, "1", (GONE, 1), DONE)
    journaled(runs, "2", (GONE, 1), OUTSIDE, DONE)
    (runs / "runs" / "3").mkdir()
    (runs / "runs" / "3" / "1-1.journal").write_text("nonsense")
    assert claim_on(UNIT, base, str(runs)) == ""
