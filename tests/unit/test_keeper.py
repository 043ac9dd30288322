"""The keeper as its command sees it: a process of its own that answers, hears, and does not outlive its errand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from cpr import journal, keeper
from cpr.errors import Exit
from cpr.linux import proc
from cpr.linux.lock import make_run_directory, process_lock
from cpr.linux.process import open_process
from cpr.model import Plan, Status, Step
from cpr.run import Bounds
from tests.unit import values

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Touch(Step):
    """Leaves its name in a file, and on the way back another."""

    path: str

    def describe(self) -> str:
        return f"touch {os.path.basename(self.path)}"

    def do(self, run: Any) -> None:
        run.extra["touched"] = True
        with open(self.path, "w"):
            pass

    def undo(self, run: Any) -> None:
        with open(self.path + ".undone", "w"):
            pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Linger(Touch):
    """Done when the run must not go on."""

    def do(self, run: Any) -> None:
        Touch.do(self, run)
        while True:
            run.check(self.describe())
            time.sleep(0.005)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def plan(sleeper: subprocess.Popen[bytes], *steps: Step) -> Plan:
    process = open_process(sleeper.pid)
    with process:
        return values.plan(*steps, pid=process.pid, start_time=process.start_time)


def start(tmp_path: Path, plan: Plan, **bounds: float) -> keeper.Handle:
    return keeper.start(plan, run_id="run-1", base=str(tmp_path / "run"), bounds=Bounds(**bounds))


def appears(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not appear"
        time.sleep(0.005)


def test_a_failure_is_undone_and_told(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    done, wrong = tmp_path / "done", tmp_path / "directory"
    wrong.mkdir()
    handle = start(tmp_path, plan(sleeper, Touch(path=str(done)), Touch(path=str(wrong)), Touch(path="x", commit=True)))
    events = list(handle.events())
    outcome = handle.outcome()
    assert [(e["step"], e["state"]) for e in events][:4] == [
        ("Touch", "doing"), ("Touch", "done"), ("Touch", "doing"), ("Touch", "failed"),
    ]  # fmt: skip
    assert (outcome.status, outcome.exit_code) == (Status.ROLLED_BACK, Exit.ROLLED_BACK)
    assert "Is a directory" in outcome.error
    assert (tmp_path / "done.undone").exists()
    assert os.listdir(tmp_path / "run" / "locks") == []


@pytest.mark.parametrize("code", [Exit.INTERRUPTED, Exit.TERMINATED])
def test_an_interrupt_undoes(tmp_path: Path, sleeper: subprocess.Popen[bytes], code: Exit) -> None:
    handle = start(tmp_path, plan(sleeper, Linger(path=str(tmp_path / "a")), Touch(path="x", commit=True)))
    appears(tmp_path / "a")
    handle.interrupt(code)
    assert handle.outcome().exit_code == code
    assert (tmp_path / "a.undone").exists()


def test_an_interrupt_is_heard_that_comes_before_the_keeper_listens(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    handle = start(tmp_path, plan(sleeper, Linger(path=str(tmp_path / "a")), Touch(path="x", commit=True)), timeout=15)
    handle.interrupt()
    assert handle.outcome().exit_code == Exit.INTERRUPTED


def test_sigterm_to_the_keeper_undoes(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    handle = start(tmp_path, plan(sleeper, Linger(path=str(tmp_path / "a")), Touch(path="x", commit=True)))
    appears(tmp_path / "a")
    os.kill(handle.pid, signal.SIGTERM)
    assert handle.outcome().exit_code == Exit.TERMINATED


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGPIPE])
def test_what_a_terminal_sends_does_not_concern_it(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], number: signal.Signals
) -> None:
    handle = start(tmp_path, plan(sleeper, Linger(path=str(tmp_path / "a")), Touch(path="x", commit=True)))
    appears(tmp_path / "a")
    assert os.getsid(handle.pid) == handle.pid
    os.kill(handle.pid, number)
    handle.interrupt()
    assert handle.outcome().exit_code == Exit.INTERRUPTED


def test_it_undoes_when_nobody_is_there_any_more(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """Its standard input ends, its standard output is read by nobody."""
    handle = start(tmp_path, plan(sleeper, Linger(path=str(tmp_path / "a")), Touch(path="x", commit=True)))
    appears(tmp_path / "a")
    process = handle._process
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    assert process.wait(20) == 0
    assert (tmp_path / "a.undone").exists()
    (path,) = journal.journal_files(str(tmp_path / "run"))
    outcome = journal.read(path).outcome
    assert outcome is not None
    assert outcome["exit_code"] == Exit.INTERRUPTED


def test_the_deadline_is_the_runs(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    handle = start(tmp_path, plan(sleeper, Linger(path=str(tmp_path / "a")), Touch(path="x", commit=True)), timeout=0.3)
    outcome = handle.outcome()
    assert (outcome.exit_code, "--timeout" in outcome.hint) == (Exit.ROLLED_BACK, True)


def test_two_at_once(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """The second one names the first, and touches nothing."""
    first = start(tmp_path, plan(sleeper, Linger(path=str(tmp_path / "a")), Touch(path="x", commit=True)))
    appears(tmp_path / "a")
    second = keeper.start(plan(sleeper, Touch(path=str(tmp_path / "b"))), run_id="run-2", base=str(tmp_path / "run"))
    outcome = second.outcome()
    assert (outcome.status, outcome.exit_code) == (Status.BUSY, Exit.BUSY)
    assert "run-1" in outcome.error
    assert str(first.pid) in outcome.error
    assert not (tmp_path / "b").exists()
    first.interrupt()
    first.outcome()


def test_an_open_journal_refuses(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    left = plan(sleeper, Touch(path=str(tmp_path / "a"), commit=True))
    journal.Journal(left, "run-0", directory=str(tmp_path / "run")).abandon()
    outcome = start(tmp_path, left).outcome()
    assert outcome.exit_code == Exit.BUSY
    assert outcome.hint == "cpr recover run-0"
    assert not (tmp_path / "a").exists()


def test_no_room_for_a_journal(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    (tmp_path / "run").write_text("in the way")
    outcome = start(tmp_path, plan(sleeper, Touch(path=str(tmp_path / "a"), commit=True))).outcome()
    assert outcome.exit_code in (Exit.FAILED, Exit.PRIVILEGES)
    assert outcome.where == "the guest was not touched"
    assert not (tmp_path / "a").exists()


def test_a_keeper_that_dies_before_it_began(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    base = str(tmp_path / "run")
    make_run_directory(base)
    the_plan = plan(sleeper, Touch(path=str(tmp_path / "a"), commit=True))
    handle = start(tmp_path, the_plan)
    os.kill(handle.pid, signal.SIGKILL)  # while its interpreter starts
    outcome = handle.outcome()
    assert outcome.exit_code == Exit.FAILED
    assert "died before it began" in outcome.error
    assert not (tmp_path / "a").exists()
    pid = the_plan.guest.process
    with process_lock(base, pid.pid, pid.start_time, boot_id=proc.boot_id(), owner_uid=0, holder={}):
        pass


def test_half_a_request_is_no_request(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "cpr.keeper"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        out, err = process.communicate(keeper.LENGTH.pack(1000) + b"half", timeout=20)
    assert process.returncode == 1
    assert b"the command went away" in err
    assert out == b""
