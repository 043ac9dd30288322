"""Every step of an update in place, and everything that can go wrong at it.

Until the exec the guest ends where it was. Between exec and commit it is brought back into the old QEMU, in another
process; after the commit it is in the new one, in its own.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import pytest

from cpr.errors import Exit
from cpr.linux import proc
from cpr.model import Status
from cpr.run import Bounds
from tests.qemu.faults.fault import Fault, Stage
from tests.qemu.faults.moments import Moment, Script
from tests.qemu.faults.subject import Victim
from tests.qemu.surveying import until
from tests.qemu.test_likeness import helpers
from tests.qemu.test_reexec import masters_of

if TYPE_CHECKING:
    from tests.lab.start import Lab
    from tests.qemu.conftest import Command

SHORT = Bounds(timeout=6.0, max_downtime=1.5)


EVERYDAY = {
    "fail": ["SaveState-done", "LoadState-done"],
    "kill_new": ["LoadState-doing"],
    "kill_keeper": ["ExecNew-doing", "ExecNew-done"],
    "both": ["LoadState-doing"],
}


ENGINE = "reexec"
SCRIPT = Script(ENGINE, EVERYDAY)
moments = SCRIPT.moments
EXEC = "ExecNew"


def test_the_plan_has_every_step(victim: Victim) -> None:
    assert [step.id for step in victim.plan("x").steps] == SCRIPT.names


def check_rolled_back(victim: Victim, before: Any, outcome: Any, moment: Moment) -> None:
    assert (outcome.status, outcome.exit_code) == (Status.ROLLED_BACK, Exit.ROLLED_BACK), outcome
    assert "runs in the old QEMU as before" in outcome.where
    if moment.after(EXEC):
        victim.in_the_old_again(before)
    else:
        victim.as_before(before)
    victim.can_be_updated()


@pytest.mark.parametrize("moment", moments("fail", lambda m: not m.told and m.after("PrepareExec")))
def test_it_fails(victim: Victim, moment: Moment) -> None:
    before = victim.before()
    outcome = victim.play(Fault(at=moment.at, do="fail"))
    assert "planted" in outcome.error
    check_rolled_back(victim, before, outcome, moment)


@pytest.mark.parametrize("moment", moments("kill_new", lambda m: m.after(EXEC) and not m.told))
def test_the_new_program_dies(victim: Victim, moment: Moment) -> None:
    before = victim.before()
    outcome = victim.play(Fault(at=moment.at, do="kill_new"))
    check_rolled_back(victim, before, outcome, moment)


@pytest.mark.parametrize("moment", moments("stop_new", lambda m: m.after(EXEC) and not m.told))
def test_the_new_program_hangs(victim: Victim, moment: Moment) -> None:
    before = victim.before()
    outcome = victim.play(Fault(at=moment.at, do="stop_new"), bounds=SHORT)
    check_rolled_back(victim, before, outcome, moment)


@pytest.mark.parametrize("moment", moments("kill_new", lambda m: m.told))
def test_the_new_program_dies_after_the_commit(victim: Victim, moment: Moment) -> None:
    outcome = victim.play(Fault(at=moment.at, do="kill_new"))
    assert (outcome.status, outcome.exit_code, outcome.pid_after) == (Status.NEEDS_ATTENTION, Exit.NEEDS_ATTENTION, 0)
    assert "crashed" in outcome.where
    victim.closed()


@pytest.mark.parametrize("at", ["fact:back", pytest.param("sent:cont:new", marks=pytest.mark.full)])
def test_the_keeper_is_killed_on_the_way_back(victim: Victim, at: str) -> None:
    """The new program died, and then the keeper: the old one, started again, is found, also without its pid."""
    before = victim.before()
    dies = Fault(at=SCRIPT.at("LoadState", "doing"), do="kill_new")
    outcome = victim.play(dies, Fault(at=at, do="kill_keeper"))
    assert (outcome.status, outcome.exit_code) == (Status.ROLLED_BACK, Exit.ROLLED_BACK), outcome
    victim.in_the_old_again(before)
    assert victim.guest.console.hangups == 0
    victim.can_be_updated()


@pytest.mark.parametrize("moment", moments("kill_keeper"))
def test_the_keeper_is_killed(victim: Victim, moment: Moment) -> None:
    """Its command goes back where the old program still runs, and forward where the new one does."""
    before = victim.before()
    outcome = victim.play(Fault(at=moment.at, do="kill_keeper"))
    if moment.after(EXEC):
        assert (outcome.status, outcome.exit_code, outcome.error) == (Status.UPDATED, Exit.OK, ""), outcome
        victim.in_the_new(before)
    else:
        assert (outcome.status, outcome.exit_code) == (Status.ROLLED_BACK, Exit.ROLLED_BACK), outcome
        victim.as_before(before)
    victim.can_be_updated()


@pytest.mark.parametrize("then", ["", "fail", pytest.param("kill_keeper", marks=pytest.mark.full)])
def test_what_is_typed_when_the_state_is_saved_is_not_lost(victim: Victim, stage: Stage, then: str) -> None:
    """The old program would read it, and end; or it goes on, and reads it then."""
    log, typed = victim.guest.log, b"ab"
    victim.guest.console.send(typed[:1])
    log.wait(lambda: log.echoed, 10, "no echo")
    faults = [Fault(at=SCRIPT.at("SaveState", "done"), do="wait")]
    faults += [Fault(at="fact:standing in", do=then)] if then else []
    handle = victim.handle(stage, *faults)
    saved = stage.wait()
    victim.guest.console.send(typed[1:])
    time.sleep(0.2)  # a QEMU that listens would have it by now
    saved.go()
    outcome = handle.outcome()
    assert outcome.status == (Status.ROLLED_BACK if then else Status.UPDATED), outcome
    victim.counts()
    log.wait(lambda: len(log.echoed) >= len(typed), 10, "what was typed is lost")
    assert bytes(log.echoed) == typed
    assert victim.guest.console.hangups == 0
    victim.alone()
    victim.closed()
    victim.can_be_updated()


@pytest.mark.parametrize("do", ["fail", pytest.param("kill_keeper", marks=pytest.mark.full)])
def test_it_ends_while_clients_of_ours_wait(victim: Victim, do: str) -> None:
    """Those that the new QEMU was to accept: the next update does not take them for somebody who waits."""
    before = victim.before()
    outcome = victim.play(Fault(at="fact:exec", do=do))
    assert (outcome.status, outcome.exit_code) == (Status.ROLLED_BACK, Exit.ROLLED_BACK), outcome
    victim.as_before(before)
    victim.can_be_updated()


@pytest.mark.parametrize("moment", moments("both", lambda m: m.index >= SCRIPT.names.index(EXEC)))
def test_both_are_killed(victim: Victim, cpr: Command, stage: Stage, moment: Moment) -> None:
    before = victim.before()
    victim.kill_both(stage, Fault(at=moment.at, do="wait"))
    result = cpr("recover", "--json")
    if moment.after(EXEC):
        assert (result.code, result.guest["status"]) == (Exit.OK, "updated"), str(result)
        victim.in_the_new(before)
    else:
        assert (result.code, result.guest["status"]) == (Exit.ROLLED_BACK, "rolled_back"), str(result)
        victim.as_before(before, pause=60)
    again = cpr("recover", "--json")
    assert (again.code, again.json["guests"]) == (Exit.OK, [])
    victim.can_be_updated()


TEARDOWN = ("-run-with", "async-teardown=on")


@pytest.mark.parametrize("dies", [False, pytest.param(True, marks=pytest.mark.full)])
def test_no_helper_of_the_old_program_is_left(lab: Lab, cpr: Command, stage: Stage, dies: bool) -> None:
    """It would hold the old program's memory; it is ended, and reaped, by whoever brings the guest into the new one."""
    victim = Victim.start(lab, "10.0", engine=ENGINE, words=TEARDOWN, everything=False)
    (old,) = helpers(lab)
    if dies:
        victim.kill_both(stage, Fault(at=SCRIPT.at("LoadState", "doing"), do="wait"))
        result = cpr("recover", "--json")
        assert (result.code, result.guest["status"]) == (Exit.OK, "updated"), str(result)
    else:
        assert victim.play().status == Status.UPDATED
    until(lambda: old not in helpers(lab))
    assert len(helpers(lab)) == 1, "the new program has one of its own"
    assert list(proc.children(victim.pid)) == helpers(lab), "what has ended is reaped"
    victim.counts()


PTY = ("-chardev", "pty,id=p0", "-serial", "chardev:p0")


@pytest.mark.parametrize("faulty", ["fails", pytest.param("dies", marks=pytest.mark.full)])
def test_a_pty_stays_open(lab: Lab, cpr: Command, stage: Stage, faulty: str) -> None:
    """Whoever has its other end open goes on, also where the old program is started again, or cpr is."""
    victim = Victim.start(lab, engine=ENGINE, words=PTY)
    before = victim.before()
    (name,) = (c.filename for c in before.facts.chardevs if c.label == "p0")
    slave = os.open(name.removeprefix("pty:"), os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        there = masters_of(victim.pid)
        if faulty == "fails":
            outcome = victim.play(Fault(at=SCRIPT.at("LoadState", "done"), do="fail"))
            assert outcome.status == Status.ROLLED_BACK, outcome
            assert not any("pty" in note for note in outcome.notes), outcome
            victim.in_the_old_again(before)
        else:
            victim.kill_both(stage, Fault(at=SCRIPT.at("LoadState", "doing"), do="wait"))
            result = cpr("recover", "--json")
            assert (result.code, result.guest["status"]) == (Exit.OK, "updated"), str(result)
            assert not any("pty" in note for note in result.guest["notes"]), str(result)
            victim.in_the_new(before)
        assert masters_of(victim.pid) == there
        os.write(slave, b"x")  # EIO where nobody has the master
        with pytest.raises(BlockingIOError):
            os.read(slave, 1)  # nothing, and no end
        victim.can_be_updated()
        assert masters_of(victim.pid) == there
    finally:
        os.close(slave)
