"""Every step of an update, and everything that can go wrong at it.

Before the commit the guest ends in the old QEMU, after it in the new one; one QEMU is left, the journal is closed, and
an ordinary update succeeds afterwards. The steps come from the plan itself, so that a new one is covered by itself.
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from cpr.errors import Exit
from cpr.model import Status
from cpr.run import Bounds
from tests.qemu.conftest import Command
from tests.qemu.faults.fault import Fault, Stage
from tests.qemu.faults.moments import Moment, Script
from tests.qemu.faults.subject import Victim, killed
from tests.qemu.surveying import until

if TYPE_CHECKING:

    pass

SHORT = Bounds(timeout=6.0, max_downtime=1.0)
"""Where something hangs, nobody wants to wait longer."""


EVERYDAY = {
    "fail": ["MoveClients-done"],
    "kill_new": ["MoveState-doing", "Continue-doing", "Continue-done"],
    "stop_new": ["MoveState-doing"],
    "kill_keeper": ["StartNew-done"],
    "command": ["MoveState-done"],
    "both": ["MoveState-done", "Continue-doing"],
}


SCRIPT = Script(everyday=EVERYDAY)
moments = SCRIPT.moments


def test_the_plan_has_every_step(victim: Victim) -> None:
    assert [step.id for step in victim.plan("x").steps] == SCRIPT.names


# -- one fault, and the command is there


@pytest.mark.parametrize("moment", moments("fail", lambda m: not m.told))
def test_it_fails(victim: Victim, moment: Moment) -> None:
    before = victim.before()
    outcome = victim.play(Fault(at=moment.at, do="fail"))
    assert "planted" in outcome.error
    touched = moment.after("KeepRamAtExit")
    if touched:
        assert (outcome.status, outcome.exit_code) == (Status.ROLLED_BACK, Exit.ROLLED_BACK)
        assert "runs in the old QEMU as before" in outcome.where
    else:
        assert outcome.exit_code in (Exit.FAILED, Exit.ROLLED_BACK)
    victim.as_before(before)
    victim.can_be_updated()


@pytest.mark.parametrize("moment", moments("fail_after", lambda m: m.told))
def test_it_fails_after_the_commit(victim: Victim, moment: Moment) -> None:
    before = victim.before()
    outcome = victim.play(Fault(at=moment.at, do="fail"))
    assert (outcome.status, outcome.exit_code) == (Status.UPDATED, Exit.DIFFERS)
    assert "planted" in outcome.error
    victim.counts()
    if moment.state == "done":
        victim.in_the_new(before)
        victim.can_be_updated()


@pytest.mark.parametrize("moment", moments("kill_new", lambda m: m.after("StartNew") and not m.told))
def test_the_new_qemu_is_killed(victim: Victim, moment: Moment) -> None:
    before = victim.before()
    outcome = victim.play(Fault(at=moment.at, do="kill_new"))
    assert (outcome.status, outcome.exit_code) == (Status.ROLLED_BACK, Exit.ROLLED_BACK)
    assert outcome.error
    victim.as_before(before)
    victim.can_be_updated()


@pytest.mark.parametrize("moment", moments("kill_new", lambda m: m.told))
def test_the_new_qemu_is_killed_after_the_commit(victim: Victim, moment: Moment) -> None:
    before = victim.before()
    outcome = victim.play(Fault(at=moment.at, do="kill_new"))
    assert (outcome.status, outcome.exit_code, outcome.pid_after) == (Status.NEEDS_ATTENTION, Exit.NEEDS_ATTENTION, 0)
    assert "crashed" in outcome.where
    victim.closed()
    assert victim.state_of(before.facts.process.pid) in ("", "postmigrate")


@pytest.mark.parametrize("moment", moments("stop_new", lambda m: m.after("StartNew") and not m.told))
def test_the_new_qemu_hangs(victim: Victim, moment: Moment) -> None:
    before = victim.before()
    outcome = victim.play(Fault(at=moment.at, do="stop_new"), bounds=SHORT)
    assert (outcome.status, outcome.exit_code) == (Status.ROLLED_BACK, Exit.ROLLED_BACK)
    assert "--timeout" in outcome.hint or "--max-downtime" in outcome.hint or "was stopped" in outcome.error
    victim.as_before(before, pause=SHORT.max_downtime + 2.0)
    victim.can_be_updated()


@pytest.mark.parametrize("moment", moments("stop_new", lambda m: m.told))
def test_the_new_qemu_hangs_for_a_while_after_the_commit(victim: Victim, stage: Stage, moment: Moment) -> None:
    before = victim.before()
    handle = victim.handle(stage, Fault(at=moment.at, do="stop_new"))
    said = stage.wait()
    until(lambda: stopped(said.new))
    time.sleep(1.0)  # a hang is a length of time
    os.kill(said.new, signal.SIGCONT)
    outcome = handle.outcome()
    victim.follow(outcome.pid_after)
    assert (outcome.status, outcome.exit_code) == (Status.UPDATED, Exit.OK)
    victim.in_the_new(before)
    victim.can_be_updated()


# -- whoever works on it dies


@pytest.mark.parametrize("moment", moments("kill_keeper", lambda m: not m.recorded))
def test_the_keeper_is_killed(victim: Victim, moment: Moment) -> None:
    """The command undoes what its keeper left."""
    before = victim.before()
    outcome = victim.play(Fault(at=moment.at, do="kill_keeper"))
    assert (outcome.status, outcome.exit_code) == (Status.ROLLED_BACK, Exit.ROLLED_BACK)
    victim.as_before(before)
    victim.can_be_updated()


@pytest.mark.parametrize("moment", moments("kill_keeper", lambda m: m.recorded))
def test_the_keeper_is_killed_after_the_commit(victim: Victim, moment: Moment) -> None:
    """The command finishes what its keeper left, `cont` if nobody can say whether it was sent."""
    before = victim.before()
    outcome = victim.play(Fault(at=moment.at, do="kill_keeper"))
    assert (outcome.status, outcome.exit_code, outcome.error) == (Status.UPDATED, Exit.OK, "")
    victim.in_the_new(before)
    victim.can_be_updated()


@pytest.mark.parametrize("moment", moments("command", lambda m: not m.recorded))
def test_the_command_is_killed(victim: Victim, stage: Stage, moment: Moment) -> None:
    """The keeper undoes, with nobody calling anything."""
    before = victim.before()
    with victim.command(stage, Fault(at=moment.at, do="until_interrupted")) as command:
        stage.wait()
        killed(command)
        since = time.monotonic()
        victim.guest.log.wait_ticks(5)
        assert time.monotonic() - since < 2.0
        until(victim.lock_is_free)
    victim.as_before(before)
    assert victim.last_outcome()["exit_code"] == Exit.INTERRUPTED
    victim.can_be_updated()


@pytest.mark.parametrize("moment", moments("command", lambda m: m.recorded))
def test_the_command_is_killed_after_the_commit(victim: Victim, stage: Stage, moment: Moment) -> None:
    """The keeper goes on to the end."""
    before = victim.before()
    with victim.command(stage, Fault(at=moment.at, do="until_interrupted")) as command:
        stage.wait()
        killed(command)
        since = time.monotonic()
        victim.guest.log.wait_ticks(5)
        assert time.monotonic() - since < 2.0
        until(victim.lock_is_free)
    outcome = victim.last_outcome()
    assert (outcome["status"], outcome["exit_code"]) == ("updated", Exit.OK)
    victim.follow(outcome["pid_after"])
    victim.in_the_new(before)
    victim.can_be_updated()


@pytest.mark.parametrize("moment", moments("both"))
def test_both_are_killed(victim: Victim, cpr: Command, stage: Stage, moment: Moment) -> None:
    """`cpr recover` brings it to an end: back before the commit's line, forward behind it."""
    before = victim.before()
    victim.kill_both(stage, Fault(at=moment.at, do="wait"))
    assert [guest["open"] for run in cpr("runs", "--json").json["runs"] for guest in run["guests"]] == [True]
    result = cpr("recover", "--json")
    if moment.recorded:
        assert (result.code, result.guest["status"]) == (Exit.OK, "updated"), str(result)
        victim.follow(result.guest["pid_after"])
        victim.in_the_new(before)
    else:
        assert (result.code, result.guest["status"]) == (Exit.ROLLED_BACK, "rolled_back"), str(result)
        victim.as_before(before, pause=60)
    again = cpr("recover", "--json")
    assert (again.code, again.json["guests"]) == (Exit.OK, [])
    victim.can_be_updated()


def stopped(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] in "Tt"
