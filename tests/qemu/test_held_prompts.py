"""Somebody sits at a human monitor while the guest is updated in place, and nothing is lost or seen twice."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from cpr.errors import Exit
from tests.qemu.conftest import Command
from tests.qemu.faults.fault import Fault, Stage
from tests.qemu.managers import PROMPT, Client, Person
from tests.qemu.parties import counted
from tests.qemu.surveying import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab
    from tests.qemu.parties import Counted

    Builds = Callable[[str], QemuBuild]

full = pytest.mark.full


@pytest.fixture
def cpr(lab: Lab) -> Command:
    return Command(lab)


@pytest.fixture
def path(lab: Lab) -> Path:
    return lab.directory / "guest.hmp"


@contextlib.contextmanager
def watched(lab: Lab, build: QemuBuild, path: Path) -> Iterator[tuple[Counted, Person]]:
    """A guest, and a person at its human monitor."""
    with counted(lab, build, "-monitor", f"unix:{path},server=on,wait=off") as guest:
        with contextlib.closing(Person(path)) as person:
            yield guest, person


@pytest.mark.parametrize("route", ["7.2 11.1.a", pytest.param("10.0 11.1.b 11.1.a", marks=full)])
def test_who_is_at_the_prompt_stays_there(lab: Lab, cpr: Command, builds: Builds, path: Path, route: str) -> None:
    """With a manager at the only QMP monitor, too. The answer to what is typed meanwhile comes from the new QEMU."""
    first, *rest = route.split()
    with watched(lab, builds(first), path) as (guest, person), contextlib.closing(Client(guest.qmp)) as manager:
        said = person.types(b"info name\n", PROMPT)
        for key in rest:
            seen = len(person.received)
            result = cpr.update(guest.name, builds(key))
            assert (result.code, result.guest["engine"]) == (0, "reexec"), str(result)
            assert len(person.received) == seen
            assert person.types(b"info name\n", PROMPT) == said
            assert builds(key).version.encode() in person.types(b"info version\n", PROMPT)
            assert manager.ask("query-status")["running"] is True
        assert not person.ended
        guest.check(rounds=0)


@full
def test_what_is_typed_while_it_is_borrowed(lab: Lab, cpr: Command, builds: Builds, path: Path) -> None:
    with watched(lab, builds("7.2"), path) as (guest, person):
        said = person.types(b"info name\n", PROMPT)
        call = ("update", guest.name, "--qemu", builds("11.1.a").binary, "-y", "--json")
        with Stage(lab.directory / "stage") as stage:
            fault = Fault(at="fact:exec", do="wait")
            with cpr.start(*call, **stage.environment([fault])) as command:
                there = stage.wait()
                already = len(person.received)
                person.send(b"info name\n")
                there.go()
                command.communicate(timeout=60)
                assert command.returncode == 0
        assert person.sees(PROMPT, already) == said
        assert not person.ended


@full
def test_a_line_that_is_begun(lab: Lab, cpr: Command, builds: Builds, path: Path) -> None:
    """The update is undone and says why; the line is still there."""
    with watched(lab, builds("11.1.a"), path) as (guest, person):
        person.types(b"info na", b"\x1b[K")
        result = cpr.update(guest.name, builds("11.1.b"))
        assert result.code == Exit.ROLLED_BACK, str(result)
        assert "prompt" in result.guest["error"]
        assert "typed there" in result.guest["hint"]
        assert b"guest" in person.types(b"me\n", PROMPT) or guest.name.encode() in person.received
        assert cpr.update(guest.name, builds("11.1.b")).code == 0
        assert not person.ended


@full
@pytest.mark.parametrize("name", ["BorrowPrompts", "SaveState", "LoadState", "Continue", "GiveMonitorsBack"])
@pytest.mark.parametrize("do", ["fail", "kill_keeper"])
def test_faults(lab: Lab, cpr: Command, builds: Builds, path: Path, name: str, do: str) -> None:
    with watched(lab, builds("7.2"), path) as (guest, person):
        dry = cpr("update", guest.name, "--qemu", builds("11.1.a").binary, "-n", "--json").json["guests"][0]
        steps = [step["id"] for step in dry["plan"]["steps"]]
        said = person.types(b"info name\n", PROMPT)
        seen = len(person.received)
        with Stage(lab.directory / "stage") as stage:
            fault = Fault(at=f"step:{steps.index(name)}:done", do=do)
            cpr.update(guest.name, builds("11.1.a"), **stage.environment([fault]))
            stage.wait(0.1)
        person.send(b"info name\n")
        until(lambda: person.received[seen:].endswith(said))
        assert not person.ended
        guest.log.wait_ticks(20)
        guest.check(rounds=0)
