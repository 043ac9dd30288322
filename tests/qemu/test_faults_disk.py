"""No room: in the run directory, from the beginning or all of a sudden, and where the guest has its files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cpr.errors import Exit
from cpr.linux.lock import make_run_directory
from cpr.model import Status
from tests.qemu.faults.fault import Fault, Stage
from tests.qemu.faults.moments import Script
from tests.qemu.faults.subject import Victim

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.start import Lab
    from tests.qemu.conftest import Command

SCRIPT = Script()
NAMES, at = SCRIPT.names, SCRIPT.at
MIB = 1 << 20


class Tmpfs:
    """A file system of its own, small."""

    def __init__(self, path: Path, options: str) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(path)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"cannot mount here: {done.stderr.strip()}")

    def fill(self) -> None:
        """Not a byte is left."""
        with open(self.path / "full", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                return

    def use_inodes(self) -> None:
        """Not a file can be made any more."""
        for number in range(1 << 16):
            try:
                (self.path / f"full{number}").touch()
            except OSError:
                return

    def free(self) -> None:
        for path in self.path.glob("full*"):
            path.unlink()

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.path)], check=True)


@pytest.fixture
def room(lab: Lab) -> Iterator[Tmpfs]:
    """The run directory."""
    it = Tmpfs(lab.directory / "run", "size=1m,nr_inodes=64,mode=0755")
    yield it
    it.close()


@pytest.mark.parametrize("what", ["bytes", pytest.param("inodes", marks=pytest.mark.full)])
@pytest.mark.parametrize("when", ["empty", pytest.param("made", marks=pytest.mark.full)])
def test_a_full_run_directory_is_met_before_anything_is_done(
    room: Tmpfs, victim: Victim, cpr: Command, what: str, when: str
) -> None:
    if when == "made":
        make_run_directory(str(room.path))
    before = victim.before()
    if what == "bytes":
        room.fill()
    else:
        room.use_inodes()
    result = cpr.update(victim.pid, victim.new)
    assert result.code in (Exit.FAILED, Exit.BLOCKED), str(result)
    assert result.guest["where"] == "the guest was not touched"
    outcome = victim.play()  # and where no check says so before
    assert (outcome.status, outcome.exit_code, outcome.where) == (
        Status.FAILED, Exit.FAILED, "the guest was not touched",
    )  # fmt: skip
    assert str(room.path) in outcome.error
    room.free()
    victim.as_before(before)
    victim.can_be_updated()


FILLED = ["TakeDescriptors:done", "StartNew:done", "MoveState:doing", "MoveState:done", "Continue:doing", "EndOld:done"]


def moment(text: str) -> str:
    name, _, state = text.partition(":")
    return f"step:{NAMES.index(name)}:{state}"


@pytest.mark.full
@pytest.mark.parametrize("when", FILLED)
def test_a_run_directory_that_fills_meanwhile_is_no_matter(room: Tmpfs, victim: Victim, when: str) -> None:
    """Its journal has its room already."""
    before = victim.before()
    outcome = victim.play(Fault(at=moment(when), do="fill", argument=str(room.path)))
    assert (outcome.status, outcome.exit_code) == (Status.UPDATED, Exit.OK)
    assert not any("journal" in note for note in outcome.notes)
    victim.in_the_new(before)
    room.free()
    victim.can_be_updated()


@pytest.mark.full
@pytest.mark.parametrize("when", FILLED)
def test_recover_needs_no_room(room: Tmpfs, victim: Victim, cpr: Command, stage: Stage, when: str) -> None:
    before = victim.before()
    victim.kill_both(stage, Fault(at=moment(when), do="wait"))
    for left in os.listdir(room.path / "locks"):
        (room.path / "locks" / left).unlink()  # it would have its room too
    room.fill()
    result = cpr("recover", "--json")
    victim.follow(result.guest["pid_after"])
    if NAMES.index(when.partition(":")[0]) >= NAMES.index("Continue"):
        assert (result.code, result.guest["status"]) == (Exit.OK, "updated"), str(result)
        victim.in_the_new(before)
    else:
        assert (result.code, result.guest["status"]) == (Exit.ROLLED_BACK, "rolled_back"), str(result)
        victim.as_before(before, pause=120)
    room.free()
    victim.can_be_updated()


@pytest.mark.full
def test_a_commit_whose_line_cannot_be_written_is_none(victim: Victim) -> None:
    before = victim.before()
    outcome = victim.play(Fault(at=moment("Continue:doing"), do="no_room"))
    assert (outcome.status, outcome.exit_code) == (Status.ROLLED_BACK, Exit.ROLLED_BACK)
    assert "No space left" in outcome.error
    victim.as_before(before)
    victim.can_be_updated()


@pytest.mark.full
def test_the_guests_own_disk_is_full(lab: Lab) -> None:
    """Its image, its sockets, its log and its pid file lie there."""
    room = Tmpfs(lab.directory / "small", "size=4m,nr_inodes=64,mode=0755")
    try:
        (lab.directory / "small").chmod(0o755)
        victim = Victim.start(
            lab, name="small/guest", everything=False, words=("-pidfile", f"{lab.directory}/small/pid")
        )
        before = victim.before()
        room.fill()
        outcome = victim.play()
        assert (outcome.status, outcome.exit_code) == (Status.UPDATED, Exit.OK), outcome
        assert (lab.directory / "small" / "pid").read_text().strip() == str(victim.pid)
        victim.in_the_new(before)
        outcome = victim.play(Fault(at="step:5:done", do="fail"))
        assert outcome.exit_code == Exit.ROLLED_BACK
        victim.counts()
        victim.alone()
    finally:
        lab.close()
        room.close()
