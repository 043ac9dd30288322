"""The host VM itself: that it boots, every time, on every kernel; kexec; what survives what; how it dies."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.host import kernels
from tests.host.machine import MEMMAP, NIC_ADDRESS, NVDIMM, NVME_ADDRESS, SMALL, SYSTEMD, Machine
from tests.host.vm import Host, HostDied, fits

if TYPE_CHECKING:
    from tests.host.conftest import Hosts

pytestmark = pytest.mark.hostfull

BOOTS, KEXECS = 20, 10


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("machine", "bar"), [(SMALL, 10.0), (SYSTEMD, 40.0)], ids=["small", "systemd"])
def test_boots_in_time(hosts: Hosts, machine: Machine, bar: float) -> None:
    host = hosts.get(machine, fresh=True)
    assert host.times.boot <= fits(bar), f"load {os.getloadavg()}"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("key", kernels.KERNELS)
def test_kernels(hosts: Hosts, key: str) -> None:
    host = hosts.get(Machine(kernel=key))
    assert host.sh("uname -r").strip() == kernels.obtain(key).release
    host.sh("until test -c /dev/vhost-net && test -c /dev/net/tun; do sleep 0.1; done")
    host.sh("test -c /dev/kvm && test -f /sys/fs/cgroup/cgroup.controllers")
    assert host.sh("cat /proc/sys/kernel/yama/ptrace_scope").strip() in ("0", "1")
    assert host.cpr("list").code == 0


@pytest.mark.timeout(1200)
def test_many_boots_in_a_row(hosts: Hosts) -> None:
    hosts.end()
    times = []
    for _ in range(BOOTS):
        with Host() as host:
            times.append(host.times.boot)
    hosts.lines.append(f"{BOOTS} boots: {min(times):.1f} to {max(times):.1f} s")


@pytest.mark.timeout(900)
def test_many_kexecs_in_a_row(hosts: Hosts) -> None:
    host = hosts.get(SMALL, fresh=True)
    host.sh("echo here > /state/mark")
    keys = list(kernels.KERNELS)
    for number in range(KEXECS):
        key = keys[number % len(keys)]
        host.kexec(key)
        assert host.sh("uname -r").strip() == kernels.obtain(key).release
    assert host.sh("cat /state/mark").strip() == "here"
    times = host.times.kexecs
    hosts.lines.append(f"{KEXECS} kexecs: {min(times):.1f} to {max(times):.1f} s")
    hosts.end()


@pytest.mark.timeout(300)
def test_kexec_with_systemd(hosts: Hosts) -> None:
    host = hosts.get(SYSTEMD, fresh=True)
    host.sh("echo here > /state/mark")
    hosts.lines.append(f"systemctl kexec: {host.kexec('7.2'):.1f} s")
    assert host.sh("cat /state/mark; uname -r").split() == ["here", kernels.obtain("7.2").release]
    hosts.end()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dax", [MEMMAP, NVDIMM])
def test_persistent_memory_survives(hosts: Hosts, dax: str) -> None:
    host = hosts.get(Machine(dax=dax), fresh=True)
    host.sh("ndctl create-namespace -f -e namespace0.0 -m devdax -a 2M -M mem", 60)
    write = "import mmap,os;f=os.open('/dev/dax0.0',os.O_RDWR);m=mmap.mmap(f,1<<21);m[:5]="
    read = "import mmap,os;f=os.open('/dev/dax0.0',os.O_RDWR);m=mmap.mmap(f,1<<21);print(m[:5].decode())"
    host.sh(f'python3 -c "{write}b\'hello\'"')
    host.kexec("7.2")
    assert host.sh(f'python3 -c "{read}"').strip() == "hello"
    if dax == NVDIMM:
        host.power_cycle("6.12")
        assert host.sh(f'python3 -c "{read}"').strip() == "hello"
    hosts.end()


@pytest.mark.timeout(300)
def test_devices_have_iommu_groups_of_their_own(hosts: Hosts) -> None:
    host = hosts.get(Machine(devices=True), fresh=True)
    groups = [
        host.sh(f"ls /sys/bus/pci/devices/{address}/iommu_group/devices").split()
        for address in (NVME_ADDRESS, NIC_ADDRESS)
    ]
    assert groups == [[NVME_ADDRESS], [NIC_ADDRESS]]
    device = f"/sys/bus/pci/devices/{NVME_ADDRESS}"
    host.sh(
        f"modprobe -a vfio-pci vfio_iommu_type1; echo vfio-pci > {device}/driver_override; "
        f"test -e {device}/driver && echo {NVME_ADDRESS} > {device}/driver/unbind; "
        f"echo {NVME_ADDRESS} > /sys/bus/pci/drivers_probe"
    )
    assert host.sh(f"basename $(readlink {device}/driver)").strip() == "vfio-pci"
    assert "vfio" in host.sh("ls /dev/vfio")
    hosts.end()


@pytest.mark.timeout(120)
def test_panic_is_told_at_once_with_the_serial_log(hosts: Hosts) -> None:
    host = hosts.get(SMALL)
    began = time.monotonic()
    with pytest.raises(HostDied, match="sysrq triggered crash"):
        host.sh("echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 60", seconds=90)
    assert time.monotonic() - began < fits(10)
    assert not host.alive
    hosts.end()


@pytest.mark.timeout(120)
def test_nothing_is_left(hosts: Hosts) -> None:
    hosts.end()
    with Host() as host:
        directory = host.directory
        assert running(directory)
    assert not directory.exists()
    assert not running(directory)


def running(directory: Path) -> list[str]:
    """Pids of processes with the directory on their command line."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if str(directory).encode() in Path("/proc", name, "cmdline").read_bytes():
                found.append(name)
        except OSError:
            continue
    return found
