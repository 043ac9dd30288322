"""What is written down of a real guest before a reboot, held against what is there afterwards; without the reboot."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import pytest

from cpr.linux.traits import likeness_of
from cpr.model import Binary, MonitorAddress
from cpr.persistence import identity
from cpr.qemu import qmp
from cpr.reboot import manifest as manifests
from cpr.reboot import stamp
from cpr.reboot.facts import with_reboot_facts
from cpr.reboot.files import disk, disk_differences, seal, state_differences
from cpr.reboot.manifest import Manifest, SavedGuest, SavedRam
from tests.qemu.surveying import surveyed

if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.qemu.qmp import Monitor
    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab


@pytest.mark.full
@pytest.mark.parametrize("key", ["10.0", "11.1.a"])
def test_a_guest_is_known_again_once(lab: Lab, builds: Callable[[str], QemuBuild], key: str) -> None:
    """Saved, ended, compared, loaded: all is as it was; and when it has run, a second load would be noticed."""
    ram, state, directory = (str(lab.directory / name) for name in ("ram", "state", "saved"))
    guest = lab.counting(builds(key), backend=f"memory-backend-file,share=on,mem-path={ram}")
    facts = with_reboot_facts(surveyed(guest.process))
    likeness = likeness_of(guest.pid)
    with qmp.connect(MonitorAddress(label="mon", path=str(guest.qmp))) as monitor:
        prepare(monitor)
        monitor.execute("migrate", uri=f"file:{state}")
        completed(monitor)
        (block,) = facts.ram
        assert block.storage is not None
        saved = SavedGuest(
            name=facts.name,
            uuid=facts.uuid,
            pid=guest.pid,
            likeness=likeness,
            own_namespaces=(),
            machine=facts.machine,
            runstate=facts.runstate,
            ram=(
                SavedRam(
                    id=block.id,
                    size=block.size,
                    path=ram,
                    storage=block.storage,
                    stamp=stamp.take(ram, block.size, identity(block.storage)),
                ),
            ),
            state=seal(state),
            disks=tuple(disk(s.path) for s in facts.disks),
            binary_before=facts.binary,
            pinned_binary="",
            binary_after=Binary(path=facts.binary.path),
        )
        assert saved.disks, "the counting guest boots from one"
        manifests.write(
            directory,
            Manifest(run="r", boot_id="b", release_before="", release="", command_line="", time=0.0, guests=(saved,)),
        )
        monitor.execute("quit")
    assert guest.process.wait(10)
    for path in (guest.qmp, lab.directory / "guest.console"):
        path.unlink(missing_ok=True)

    (known,) = manifests.read(directory).guests
    assert known == saved
    assert wrong(known) == []
    # -S: it was running when it was saved, and would run as soon as its state is there
    lab.start([*known.likeness.argv, "-S", "-incoming", "defer"], name="again")
    with connected(str(guest.qmp)) as monitor:
        prepare(monitor)
        assert known.state is not None
        monitor.execute("migrate-incoming", uri=f"file:{known.state.path}")
        completed(monitor)
        assert wrong(known) == [], "loading changed nothing"
        monitor.execute("cont")
        assert monitor.execute("query-status")["status"] == "running"
        time.sleep(1)
        monitor.execute("stop")
    [line] = wrong(known)
    assert "sampled pages differ" in line


def wrong(known: SavedGuest) -> list[str]:
    (block,) = known.ram
    assert block.stamp is not None
    assert known.state is not None
    found = [*state_differences(known.state), *(line for one in known.disks for line in disk_differences(one))]
    return found + list(stamp.differences(block.stamp, block.path, identity(block.storage)))


def prepare(monitor: Monitor) -> None:
    capability = {"capability": "x-ignore-shared", "state": True}
    monitor.execute("migrate-set-capabilities", capabilities=[capability])
    monitor.execute("migrate-set-parameters", mode="cpr-reboot")


def completed(monitor: Monitor) -> None:
    end = time.monotonic() + 30
    while (reply := monitor.execute("query-migrate")).get("status") != "completed":
        assert reply.get("status") != "failed", reply
        assert time.monotonic() < end, reply
        time.sleep(0.02)


def connected(path: str) -> Any:
    end = time.monotonic() + 20
    while not os.path.exists(path):
        assert time.monotonic() < end
        time.sleep(0.02)
    return qmp.connect(MonitorAddress(label="mon", path=path))
