"""What a user does to the command: Ctrl-C, kill, a second one, limits. The guests are real, the command is `cpr`."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cpr.errors import Exit
from tests.lab.start import marked
from tests.qemu.conftest import qemus_of
from tests.qemu.faults.fault import PATIENCE, Fault, Stage
from tests.qemu.faults.moments import Script
from tests.qemu.faults.subject import Victim, killed
from tests.qemu.surveying import until

if TYPE_CHECKING:

    from tests.lab.start import Lab
    from tests.qemu.conftest import Command

SCRIPT = Script()
NAMES, at = SCRIPT.names, SCRIPT.at



class Call:
    """`cpr update` at work, with faults planted in its keeper."""

    def __init__(self, cpr: Command, victim: Victim, stage: Stage, *faults: Fault, words: tuple[str, ...] = ()) -> None:
        self.victim = victim
        binary = victim.target.binary.path
        call = ("update", victim.pid, "--qemu", binary, "-y", "--json", *words)
        self.process = cpr.start(*call, **stage.environment(faults))

    def result(self) -> dict[str, Any]:
        """The only guest of its document; its exit code is the command's."""
        out, err = self.process.communicate(timeout=PATIENCE)
        document = json.loads(out)
        assert self.process.returncode == document["exit_code"], err
        (guest,) = document["guests"]
        self.victim.follow(guest["pid_after"])
        result: dict[str, Any] = guest
        return result

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            killed(self.process)


# -- signals


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, Exit.INTERRUPTED),
        pytest.param(signal.SIGTERM, Exit.TERMINATED, marks=pytest.mark.full),
    ],
)
def test_the_first_ctrl_c_undoes(
    victim: Victim, cpr: Command, stage: Stage, number: signal.Signals, code: Exit
) -> None:
    """In the blackout; further ones change nothing."""
    before = victim.before()
    with Call(cpr, victim, stage, Fault(at=at("MoveState", "done"), do="until_interrupted")) as call:
        stage.wait()
        for _ in range(3):
            call.process.send_signal(number)
        outcome = call.result()
    assert (outcome["exit_code"], outcome["status"]) == (code, "rolled_back")
    assert "runs in the old QEMU as before" in outcome["where"]
    victim.as_before(before)
    victim.can_be_updated()


@pytest.mark.parametrize("name", ["OpenMonitor", "StartNew", "PrepareStream"])
@pytest.mark.full
def test_ctrl_c_before_the_blackout(victim: Victim, cpr: Command, stage: Stage, name: str) -> None:
    before = victim.before()
    with Call(cpr, victim, stage, Fault(at=at(name, "doing"), do="until_interrupted")) as call:
        stage.wait()
        call.process.send_signal(signal.SIGINT)
        assert call.result()["exit_code"] == Exit.INTERRUPTED
    victim.as_before(before)
    victim.can_be_updated()


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", [at("Continue", "doing"), at("Continue", "done"), at("EndOld", "done")])
def test_after_the_commit_it_is_held(
    victim: Victim, cpr: Command, stage: Stage, number: signal.Signals, moment: str
) -> None:
    before = victim.before()
    with Call(cpr, victim, stage, Fault(at=moment, do="until_interrupted")) as call:
        stage.wait()
        call.process.send_signal(number)
        outcome = call.result()
    assert (outcome["exit_code"], outcome["status"]) == (Exit.OK, "updated")
    victim.in_the_new(before)
    victim.can_be_updated()


def test_ctrl_c_while_the_new_qemu_hangs_and_holds_the_old_one_up(victim: Victim, cpr: Command, stage: Stage) -> None:
    """The old one's migration thread writes into a full socket then, and its monitor is silent."""
    before = victim.before()
    hangs = Fault(at=at("MoveState", "doing"), do="stop_new")
    sent = Fault(at="sent:migrate:old", do="go_on")
    with Call(cpr, victim, stage, hangs, sent, words=("--max-downtime", "60")) as call:
        stage.wait()
        stage.wait()
        until(victim.stands_still)
        call.process.send_signal(signal.SIGINT)
        since = time.monotonic()
        victim.guest.log.wait_ticks(5)
        assert time.monotonic() - since < 2.0
        assert call.result()["exit_code"] == Exit.INTERRUPTED
    victim.as_before(before, pause=10)
    victim.can_be_updated()


@pytest.mark.full
def test_ctrl_c_while_it_looks_and_rehearses(victim: Victim, cpr: Command, stage: Stage) -> None:
    before = victim.before()
    with Call(cpr, victim, stage) as call:
        until(lambda: rehearsing(victim.lab))
        call.process.send_signal(signal.SIGINT)
        out, _ = call.process.communicate(timeout=PATIENCE)
    assert call.process.returncode == Exit.INTERRUPTED
    assert json.loads(out)["error"]["where"] == "the guest was not touched"
    victim.as_before(before)


@pytest.mark.full
def test_a_command_that_is_killed_while_it_rehearses_leaves_no_qemu(
    victim: Victim, cpr: Command, stage: Stage
) -> None:
    before = victim.before()
    with Call(cpr, victim, stage) as call:
        until(lambda: rehearsing(victim.lab))
        killed(call.process)
    until(lambda: list(marked(str(victim.lab.directory))) == [victim.pid], 10)
    assert not rehearsing(victim.lab)
    victim.as_before(before)


@pytest.mark.full
def test_a_terminal_that_is_closed(victim: Victim, cpr: Command, stage: Stage) -> None:
    """That ends the command at once; its keeper undoes."""
    before = victim.before()
    with Call(cpr, victim, stage, Fault(at=at("MoveState", "done"), do="until_interrupted")) as call:
        stage.wait()
        call.process.send_signal(signal.SIGHUP)
        assert call.process.wait(PATIENCE) == -signal.SIGHUP
        victim.guest.log.wait_ticks(5)
        until(victim.lock_is_free)
    victim.as_before(before)
    victim.can_be_updated()


@pytest.mark.full
def test_a_command_that_is_suspended_holds_nothing_up(victim: Victim, cpr: Command, stage: Stage) -> None:
    """Ctrl-Z: the keeper goes on, and the outcome is told when the command does."""
    before = victim.before()
    with Call(cpr, victim, stage, Fault(at=at("MoveState", "done"), do="wait")) as call:
        announced = stage.wait()
        call.process.send_signal(signal.SIGSTOP)
        announced.go()
        until(victim.lock_is_free)
        call.process.send_signal(signal.SIGCONT)
        outcome = call.result()
    assert (outcome["exit_code"], outcome["status"]) == (Exit.OK, "updated")
    victim.in_the_new(before)


# -- a second one


def test_a_second_update_is_told_who_has_the_guest(victim: Victim, cpr: Command, stage: Stage) -> None:
    before = victim.before()
    with Call(cpr, victim, stage, Fault(at=at("PrepareStream", "done"), do="wait")) as call:
        announced = stage.wait()
        second = cpr("update", victim.pid, "--qemu", victim.target.binary.path, "-y", "--json")
        assert (second.code, second.guest["status"]) == (Exit.BUSY, "busy")
        assert str(announced.keeper) in second.guest["error"]
        recover = cpr("recover", "--json")
        assert (recover.code, recover.guest["status"]) == (Exit.BUSY, "busy")
        assert str(announced.keeper) in recover.guest["error"]
        (run,) = cpr("runs", "--json").json["runs"]
        assert run["run"] in second.guest["error"]
        announced.go()
        outcome = call.result()
    assert (outcome["exit_code"], outcome["status"]) == (Exit.OK, "updated")
    victim.in_the_new(before)


@pytest.mark.full
def test_many_at_once(victim: Victim, cpr: Command) -> None:
    """One has it, the others are told so, or come when it is done; the guest is moved a number of times."""
    before = victim.before()
    calls = [
        cpr.start("update", "guest", "--qemu", victim.target.binary.path, "-y", "--json", "--restart") for _ in range(4)
    ]
    codes, said = [], []
    for call in calls:
        out, err = call.communicate(timeout=PATIENCE)
        codes.append(call.returncode)
        said.append(f"{out}\n{err}")
        for guest in json.loads(out).get("guests", []):
            if guest["status"] == "updated":
                with contextlib.suppress(ProcessLookupError):
                    victim.lab.adopt(guest["pid_after"])
    assert codes.count(Exit.OK) >= 1
    # two that look at the guest at the same time may find its monitor held by each other
    assert set(codes) <= {Exit.OK, Exit.BUSY, Exit.NOT_FOUND, Exit.FAILED, Exit.BLOCKED}, "\n".join(said)
    (pid,) = qemus_of(victim.lab)
    victim.follow(pid)
    victim.in_the_new(before)


@pytest.mark.full
def test_what_was_interrupted_is_recovered_before_anything_else(victim: Victim, cpr: Command, stage: Stage) -> None:
    before = victim.before()
    victim.kill_both(stage, Fault(at=at("MoveState", "done"), do="wait"))
    second = cpr("update", victim.pid, "--qemu", victim.target.binary.path, "-y", "--json")
    assert (second.code, second.guest["status"]) == (Exit.BUSY, "busy")
    assert second.guest["hint"].startswith("cpr recover ")
    assert cpr(*second.guest["hint"].split()[1:]).code == Exit.ROLLED_BACK
    victim.as_before(before, pause=60)
    victim.can_be_updated()


# -- limits


@pytest.mark.full
def test_the_timeout(victim: Victim, cpr: Command, stage: Stage) -> None:
    before = victim.before()
    with Call(cpr, victim, stage, Fault(at=at("StartNew", "done"), do="stop_new"), words=("--timeout", "3")) as call:
        outcome = call.result()
    assert outcome["exit_code"] == Exit.ROLLED_BACK
    assert "--timeout" in outcome["hint"]
    victim.as_before(before, pause=1.0)
    victim.can_be_updated()


@pytest.mark.full
def test_the_longest_pause(victim: Victim, cpr: Command, stage: Stage) -> None:
    before = victim.before()
    with Call(
        cpr, victim, stage, Fault(at=at("MoveState", "done"), do="stop_new"), words=("--max-downtime", "0.5")
    ) as call:
        outcome = call.result()
    assert outcome["exit_code"] == Exit.ROLLED_BACK
    assert "--max-downtime" in outcome["hint"]
    assert 0.4 < outcome["blackout_seconds"] < 2.0
    victim.as_before(before, pause=2.0)
    victim.can_be_updated()


def rehearsing(lab: Lab) -> list[int]:
    """Rehearsals of the lab's guests."""
    found = []
    for pid in marked(str(lab.directory)):
        with contextlib.suppress(OSError):
            if b"CPR_RUN_PENDING=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
    return found
