"""A guest with a passed-through NVMe over a kexec: asleep for the jump, and refused where it cannot be put to sleep."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.host import guests, jumps
from tests.host.guests import LASTING, Lies
from tests.host.jumps import BY_HAND
from tests.host.machine import NVME_ADDRESS
from tests.host.test_kexec import findings
from tests.host.vm import Stayed

if TYPE_CHECKING:
    from tests.host.conftest import Hosts

pytestmark = pytest.mark.hostfull


@pytest.mark.timeout(900)
@pytest.mark.parametrize("key", ["11.1.a", "10.0"])
def test_asleep_over_the_jump_and_awake_after_it(hosts: Hosts, key: str) -> None:
    host = hosts.get(jumps.persistent((256,), devices=True), fresh=True)
    (path,) = jumps.device_dax(host)
    jumps.to_vfio(host, NVME_ADDRESS)
    guest = guests.start_linux(host, key, name="passed", lies=Lies(LASTING, path, NVME_ADDRESS))
    took = jumps.jump(host, "7.2", "passed", *BY_HAND)
    restored = jumps.restore(host)
    assert restored.code == 0, restored
    row = jumps.back(restored)["passed"]
    assert "its clock was set by the guest agent" in row["notes"], row
    hosts.lines.append(f"vfio, QEMU {key}: left in {took:.1f} s, restored in {row['total_seconds']:.1f} s")
    log = guest.whole()
    assert log.sound, log.problems()
    assert len(log.boot_ids) == 1
    assert guest.runstate() == "running"
    driver = host.sh(f"basename $(readlink /sys/bus/pci/devices/{NVME_ADDRESS}/driver)").strip()
    assert driver == "vfio-pci"


@pytest.mark.timeout(900)
def test_an_old_qemu_that_does_not_save_it_is_refused_before_it_sleeps(hosts: Hosts) -> None:
    host = hosts.get(jumps.persistent((256,), devices=True), fresh=True)
    (path,) = jumps.device_dax(host)
    jumps.to_vfio(host, NVME_ADDRESS)
    guest = guests.start_linux(host, "7.2", name="passed", lies=Lies(LASTING, path, NVME_ADDRESS))
    refused = host.cpr("update", "--kexec", "passed", "-y", "--json", *jumps.next_kernel("7.2"), *BY_HAND)
    assert refused.code == 3, refused
    assert "not-migratable" in findings(refused.out), refused
    assert guest.whole().sound
    assert guest.runstate() == "running"


@pytest.mark.timeout(900)
def test_no_agent_is_refused_and_one_that_does_not_sleep_is_undone(hosts: Hosts) -> None:
    host = hosts.get(jumps.persistent((256,), devices=True), fresh=True)
    (path,) = jumps.device_dax(host)
    jumps.to_vfio(host, NVME_ADDRESS)
    lies = Lies(LASTING, path, NVME_ADDRESS)
    guest = guests.start_linux(host, "10.0", name="passed", lies=lies, words=["cpr.awake"])
    # somebody else holds the only line to the agent
    hold = f"import socket, time; s = socket.socket(socket.AF_UNIX); s.connect('{guest.stem}.agent'); time.sleep(600)"
    holder = int(host.sh(f'python3 -S -c "{hold}" > /dev/null 2>&1 < /dev/null & echo $!'))
    refused = host.cpr("check", "passed", "--kexec", "--json", *jumps.next_kernel("7.2"))
    assert refused.code == 3, refused
    assert "vfio-no-agent" in findings(refused.out), refused
    host.sh(f"kill {holder}")
    assert guest.whole().sound
    with pytest.raises(Stayed) as caught:
        jumps.jump(host, "7.2", "passed", *BY_HAND, seconds=300)
    assert caught.value.said.code == 6, caught.value.said
    log = guest.whole(seconds=180)
    assert log.sound, log.problems()
    assert guest.runstate() == "running"
