"""What goes wrong in the very exec.

The tracer is killed while it is under way, so it is not known at once which program the process is: the new QEMU is a
file with a lease on it, and the guest's process waits in its execve until that is given up. Or the file is, by then, a
program that does not greet.
"""

from __future__ import annotations

import os
import shutil
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cpr.errors import Exit
from cpr.linux.status import read_status
from cpr.model import Status
from tests.kernel.support import in_call, leased
from tests.qemu.conftest import build
from tests.qemu.faults.fault import Fault, Stage
from tests.qemu.faults.subject import Victim, killed
from tests.qemu.surveying import until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.lab.qemu import QemuBuild
    from tests.qemu.conftest import Command, Result

ENGINE = "reexec"
BEFORE = Fault(at="fact:exec", do="wait")
AFTER_ALL = 30.0


@pytest.fixture
def own(victim: Victim) -> Victim:
    """A guest that is moved to a program which nobody else has open."""
    victim.new = copied(victim.new, victim.lab.directory / "new")
    return victim


def copied(new: QemuBuild, directory: Path) -> QemuBuild:
    directory.mkdir()
    shutil.copy2(new.binary, directory)
    (directory / "qemu-bundle").symlink_to(new.binary.parent / "qemu-bundle")
    return replace(new, binary=directory / new.binary.name)


def tracer_in_execve(victim: Victim) -> int:
    """Pid of the tracer, when the guest's process waits in its execve."""
    until(lambda: in_call(victim.pid, "execve"))
    tracer = read_status(victim.pid).tracer
    assert tracer not in (0, os.getpid())
    return tracer


@pytest.mark.parametrize("seconds", [0.5, pytest.param(AFTER_ALL, marks=pytest.mark.full)])
def test_the_tracer_is_killed(own: Victim, stage: Stage, seconds: float) -> None:
    """What becomes the new program in time goes on there; what does not is ended, and brought back."""
    before = own.before()
    handle = own.handle(stage, BEFORE)
    moment = stage.wait()
    with leased(str(own.new.binary)) as give_up:
        later = threading.Timer(seconds, give_up)
        moment.go()
        own.kill(tracer_in_execve(own))
        later.start()
        outcome = handle.outcome()
        later.cancel()
    own.follow(outcome.pid_after)
    if seconds < AFTER_ALL:
        assert (outcome.status, outcome.exit_code, outcome.error) == (Status.UPDATED, Exit.OK, ""), outcome
        own.in_the_new(before)
    else:
        assert (outcome.status, outcome.exit_code) == (Status.ROLLED_BACK, Exit.ROLLED_BACK), outcome
        own.in_the_old_again(before)
    own.can_be_updated()


def recovered(own: Victim, cpr: Command, stage: Stage, seconds: float) -> Result:
    """What `cpr recover` says when the command, its keeper and the tracer are killed in the execve, which takes so long
    yet."""
    with own.command(stage, BEFORE) as command:
        moment = stage.wait()
        with leased(str(own.new.binary)) as give_up:
            later = threading.Timer(seconds, give_up)
            moment.go()
            tracer = tracer_in_execve(own)
            killed(command)
            own.kill(moment.keeper)
            own.kill(tracer)
            later.start()
            result = cpr("recover", "--json")
            later.cancel()
    return result


@pytest.mark.full
@pytest.mark.parametrize("seconds", [0.5, AFTER_ALL])
def test_everybody_is_killed(own: Victim, cpr: Command, stage: Stage, seconds: float) -> None:
    """`cpr recover` goes forward where it becomes the new program, and says where that is not to be known yet."""
    before = own.before()
    result = recovered(own, cpr, stage, seconds)
    if seconds == AFTER_ALL:
        assert (result.code, result.guest["status"]) == (Exit.NEEDS_ATTENTION, "needs_attention"), str(result)
        assert "is not to be known yet" in result.guest["error"]
        assert "tries again" in result.guest["hint"]
        result = cpr("recover", "--json")
    assert (result.code, result.guest["status"]) == (Exit.OK, "updated"), str(result)
    assert any("vCPU 0: thread" in note for note in result.guest["notes"]), "nobody was there to keep its id"
    own.in_the_new(before)
    own.can_be_updated()


@pytest.mark.parametrize(
    ("program", "said"),
    [
        pytest.param("exit 3", "ended at its start", id="ends"),
        pytest.param("exec sleep 1000", "not", id="hangs", marks=pytest.mark.full),
    ],
)
def test_the_new_program_does_not_greet(own: Victim, stage: Stage, program: str, said: str) -> None:
    """The guest is brought back from what is held."""
    before = own.before()
    handle = own.handle(stage, BEFORE)
    moment = stage.wait()
    own.new.binary.write_text(f"#!/bin/sh\n{program}\n")
    moment.go()
    outcome = handle.outcome()
    own.follow(outcome.pid_after)
    assert (outcome.status, outcome.exit_code) == (Status.ROLLED_BACK, Exit.ROLLED_BACK), outcome
    assert said in outcome.error, outcome
    own.in_the_old_again(before)
    own.new = build("11.1.a")
    own.can_be_updated()
