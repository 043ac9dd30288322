"""Rehearsals of the state that are interrupted, hang or are killed: the guest goes on, and nothing is left."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest

from cpr.engines import dress
from cpr.errors import Exit
from cpr.model import Status
from cpr.run import Bounds
from tests.qemu.dressing import Rehearsing, ask, born, full, rehearse, unharmed
from tests.qemu.faults.fault import Fault, Stage
from tests.qemu.faults.subject import QUICK, killed
from tests.qemu.surveying import until
from tests.qemu.test_rehearsal import rehearsing

if TYPE_CHECKING:
    from cpr.qemu.rehearsal import Started
    from cpr.run import Run
    from tests.lab.start import Lab
    from tests.qemu.conftest import Command


def stuck(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rehearsing QEMUs never answer once they have been told to load; their pids."""
    pids: list[int] = []
    incoming = dress._incoming

    def hang(it: Started) -> Any:
        sock = incoming(it)
        it.process.signal(signal.SIGSTOP)
        pids.append(it.process.pid)
        return sock

    monkeypatch.setattr(dress, "_incoming", hang)
    return pids


@pytest.mark.parametrize("key", ["7.2", full("10.0"), full("11.1.a")])
def test_an_interrupt_while_the_guest_stands_still(lab: Lab, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = born(lab, key)
    pids = stuck(monkeypatch)
    interrupters: list[threading.Thread] = []

    def watch(run: Run) -> None:
        def interrupt() -> None:
            until(lambda: run.blackout_began is not None)
            run.interrupt(Exit.INTERRUPTED)

        interrupters.append(threading.Thread(target=interrupt))
        interrupters[0].start()

    with unharmed(lab, subject.guest):
        result = rehearse(subject.pid, ask(key), lab.directory, watch=watch)
        interrupters[0].join()
    assert len(pids) == 2
    assert (result.outcome.exit_code, result.outcome.status) == (Exit.INTERRUPTED, Status.ROLLED_BACK), result
    assert result.settled


def test_a_load_that_hangs_ends_at_the_longest_downtime(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = born(lab, "7.2")
    stuck(monkeypatch)
    bounds = Bounds(max_downtime=0.5)
    with unharmed(lab, subject.guest):
        result = rehearse(subject.pid, ask("10.0"), lab.directory, bounds=bounds)
    assert "not done within 0.5 s" in result.outcome.error, result
    assert result.outcome.status is Status.ROLLED_BACK
    assert subject.guest.log.largest_gap() < 3


def test_a_rehearsing_qemu_that_dies_is_a_refusal(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = born(lab, "7.2")
    incoming = dress._incoming

    def die(it: Started) -> Any:
        sock = incoming(it)
        it.process.kill()
        return sock

    monkeypatch.setattr(dress, "_incoming", die)
    with unharmed(lab, subject.guest):
        result = rehearse(subject.pid, ask("10.0"), lab.directory)
    assert "would not take the guest's state" in result.outcome.error, result


@pytest.mark.timeout(120)
@pytest.mark.parametrize("key", ["7.2", full("10.0"), full("11.1.a")])
def test_the_guest_goes_on_when_the_keeper_is_killed_while_it_stands_still(lab: Lab, cpr: Command, key: str) -> None:
    """With nobody calling anything; `cpr recover` then puts the settings back."""
    victim = Rehearsing.start(lab, key, "11.1.a", everything=False)
    before = victim.before()
    long = dataclasses.replace(QUICK, max_downtime=60.0, timeout=60.0)
    with Stage(lab.directory / "stage") as stage:
        with victim.command(stage, Fault(at="sent:migrate:old", do="wait"), bounds=long) as command:
            announced = stage.wait()
            pids = rehearsing(lab)
            assert len(pids) == 2
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            announced.go()
            until(victim.stands_still)
            killed(command)
            victim.kill(announced.keeper)
            victim.guest.log.wait_ticks(5)
            until(lambda: rehearsing(lab) == [])
    with victim.session() as session:
        assert session.execute("query-status")["status"] == "running"
    result = cpr("recover", "--json")
    assert (result.code, result.guest["status"]) == (Exit.ROLLED_BACK, "rolled_back"), str(result)
    victim.as_before(before, pause=60)


@pytest.mark.full
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "moment",
    [
        *("step:1:doing", "step:1:done", "sent:migrate-set-capabilities:old", "sent:getfd:old"),
        *("sent:migrate-incoming:old", "sent:migrate:old", "sent:query-migrate:old", "launching"),
    ],
)
def test_a_keeper_that_dies_at_any_moment(lab: Lab, cpr: Command, moment: str) -> None:
    victim = Rehearsing.start(lab, "7.2", "11.1.a", everything=False)
    before = victim.before()
    with Stage(lab.directory / "stage") as stage:
        with victim.command(stage, Fault(at=moment, do="kill_keeper")) as command:
            stage.wait()
            killed(command)
    victim.guest.log.wait_ticks(5)
    assert cpr("recover", "--json").code == Exit.ROLLED_BACK
    until(lambda: rehearsing(lab) == [])
    victim.as_before(before, pause=60)
