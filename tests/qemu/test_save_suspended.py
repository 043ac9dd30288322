"""A guest that is put to sleep by its agent for the save, as one with a passed-through device has to be (here without).

The saving and restoring half is called directly: nothing in this container can be passed through.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cpr.app.finish import finish
from cpr.app.world import real_world
from cpr.linux import proc
from cpr.model import Binary
from cpr.qemu import features
from cpr.reboot import manifest as manifests
from cpr.reboot import store
from cpr.reboot.facts import with_reboot_facts
from cpr.reboot.manifest import Manifest, Mode, Phase
from cpr.reboot.restoring import Program, restore
from cpr.reboot.saving import Saver
from tests.qemu.moving import monitor
from tests.qemu.surveying import surveyed

if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.reboot.manifest import SavedGuest
    from tests.lab.linux import LinuxLog
    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Guest, Lab

pytestmark = pytest.mark.full


@pytest.fixture(params=["10.0", "11.1.a"])
def guest(
    lab: Lab, builds: Callable[[str], QemuBuild], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Guest[LinuxLog]:
    monkeypatch.setenv("CPR_RUN_DIR", str(lab.directory / "run"))
    ram = f"memory-backend-file,share=on,mem-path={lab.directory}/ram"
    words = ("-global", "ICH9-LPC.disable_s3=0")
    return lab.linux(builds(request.param), *words, agent=True, backend=ram, seconds=180)


def asleep(lab: Lab, guest: Guest[Any]) -> Saver:
    facts = with_reboot_facts(surveyed(guest.process))
    target = features.ask(facts.binary.path)
    pinned = store.pin(guest.pid, str(lab.directory / "old"))
    saver = Saver(facts, str(lab.directory / "state"), target=target, pinned=pinned)
    saver.prepare()
    saver.suspend(60)
    return saver


def test_woken_up_again(lab: Lab, guest: Guest[LinuxLog]) -> None:
    """Before it is saved: nothing of it has ended."""
    went = asleep(lab, guest).undo()
    assert went.well, went
    assert not went.failed
    assert guest.process.alive
    goes_on(guest)


def test_undone_through_its_state(lab: Lab, guest: Guest[LinuxLog]) -> None:
    """Once it is saved, its QEMU knows no way back from there and would abort: it goes on in a copy of it."""
    saver = asleep(lab, guest)
    saver.save()
    known = replace(saver.seal(), suspended=True)
    assert saver.stuck
    path = str(lab.directory / "manifest")
    manifests.write_file(path, manifest_of(known, release="not empty", phase=Phase.SAVED))
    saver.close()
    (outcome,) = finish(path, real_world())
    assert outcome.exit_code == 6, outcome
    assert outcome.runstate == "running"
    lab.adopt(outcome.pid_after)
    assert not guest.process.alive
    goes_on(guest)


def goes_on(guest: Guest[LinuxLog]) -> None:
    ticks = len(guest.log.ticks)
    guest.log.wait(lambda: len(guest.log.ticks) > ticks + 5, 60)
    with monitor(guest) as session:
        assert session.execute("query-status")["status"] == "running"


def manifest_of(known: SavedGuest, *, release: str = "", phase: Phase = Phase.COMMITTED) -> Manifest:
    return Manifest(
        run="r",
        boot_id=proc.boot_id(),
        release_before="",
        release=release,
        command_line="",
        time=0.0,
        guests=(known,),
        phase=phase,
        mode=Mode.RESTART,
    )


def test_woken_up_in_the_new_qemu(lab: Lab, guest: Guest[LinuxLog]) -> None:
    saver = asleep(lab, guest)
    saver.save()
    known = replace(saver.seal(), suspended=True, binary_after=Binary(path=saver.guest.binary.path))
    saver.quit()
    manifest = manifest_of(known)
    assert manifests.decode(manifests.encode(manifest)) == manifest
    told: list[int] = []
    target = features.ask(saver.guest.binary.path)
    back = restore(
        known,
        manifest,
        Program(target=target),
        log=str(lab.directory / "new.log"),
        loaded=lambda pid, start_time: told.append(pid),
    )
    lab.adopt(back.pid)
    assert told == [back.pid]
    assert back.runstate == "running"
    assert not back.differences
    goes_on(guest)
