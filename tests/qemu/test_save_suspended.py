"""A guest that is put to sleep by its agent for the save, as one with a passed-through device has to be (here without).

The saving and restoring half is called directly: nothing in this container can be passed through.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cpr.linux import proc
from cpr.model import Binary
from cpr.qemu import features
from cpr.reboot import manifest as manifests
from cpr.reboot.facts import with_reboot_facts
from cpr.reboot.manifest import Manifest, Mode
from cpr.reboot.restoring import Program, restore
from cpr.reboot.saving import Saver
from tests.qemu.moving import monitor
from tests.qemu.surveying import surveyed

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.linux import LinuxLog
    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Guest, Lab

pytestmark = pytest.mark.full


@pytest.fixture(params=["10.0", "11.1.a"])
def guest(lab: Lab, builds: Callable[[str], QemuBuild], request: pytest.FixtureRequest) -> Guest[LinuxLog]:
    ram = f"memory-backend-file,share=on,mem-path={lab.directory}/ram"
    words = ("-global", "ICH9-LPC.disable_s3=0")
    return lab.linux(builds(request.param), *words, agent=True, backend=ram, seconds=180)


def asleep(lab: Lab, guest: Guest[Any]) -> Saver:
    facts = with_reboot_facts(surveyed(guest.process))
    target = features.ask(facts.binary.path)
    saver = Saver(facts, str(lab.directory / "state"), target=target)
    saver.prepare()
    saver.suspend(60)
    return saver


def test_woken_up_again(lab: Lab, guest: Guest[LinuxLog]) -> None:
    saver = asleep(lab, guest)
    saver.save()
    saver.seal()
    went = saver.undo()
    assert went.well, went
    assert not went.failed
    ticks = len(guest.log.ticks)
    guest.log.wait(lambda: len(guest.log.ticks) > ticks + 5, 60)
    with monitor(guest) as session:
        assert session.execute("query-status")["status"] == "running"
    assert not (lab.directory / "state").exists()


def test_woken_up_in_the_new_qemu(lab: Lab, guest: Guest[LinuxLog]) -> None:
    saver = asleep(lab, guest)
    saver.save()
    known = replace(saver.seal(), suspended=True, binary_after=Binary(path=saver.guest.binary.path))
    saver.quit()
    manifest = Manifest(
        run="r", boot_id=proc.boot_id(), release_before="", release="", command_line="", time=0.0, guests=(known,),
        mode=Mode.RESTART,
    )  # fmt: skip
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
    ticks = len(guest.log.ticks)
    guest.log.wait(lambda: len(guest.log.ticks) > ticks + 5, 60)
