"""The guest's RAM as the survey finds it, against every kind there is, on every version."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from cpr import survey
from cpr.linux.fds import take_fd
from cpr.model import Backing
from cpr.qemu import qmp
from tests.qemu.surveying import KEYS, candidate, start, surveyed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab

MIB = 1 << 20
TMPFS = "/dev/shm"

# backend (of id ram0), backing, shared, named file, has a descriptor
KINDS = {
    "anonymous": ("memory-backend-ram", Backing.ANONYMOUS, False, False, False),
    "memfd": ("memory-backend-memfd,share=on", Backing.MEMFD, True, False, True),
    "memfd-private": ("memory-backend-memfd,share=off", Backing.MEMFD, False, False, True),
    "tmpfs": ("memory-backend-file,share=on,mem-path={shm}/ram", Backing.TMPFS, True, True, True),
    "tmpfs-private": ("memory-backend-file,share=off,mem-path={shm}/ram", Backing.TMPFS, False, True, True),
    "tmpfs-directory": ("memory-backend-file,share=on,mem-path={shm}", Backing.TMPFS, True, True, True),
    "disk": ("memory-backend-file,share=on,mem-path={dir}/ram", Backing.DISK_FILE, True, True, True),
    "discard": ("memory-backend-file,share=on,discard-data=on,mem-path={shm}/ram", Backing.TMPFS, True, True, True),
}


@pytest.fixture
def shm(tmp_path: Path) -> object:
    if not os.path.isdir(TMPFS):
        pytest.skip(f"no {TMPFS} here")
    path = f"{TMPFS}/{tmp_path.name}-{os.getpid()}"
    os.mkdir(path)
    yield path
    for name in os.listdir(path):
        os.unlink(f"{path}/{name}")
    os.rmdir(path)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_told(
    lab: Lab, builds: Callable[[str], QemuBuild], shm: str, key: str, kind: str
) -> None:
    backend, backing, shared, named, described = KINDS[kind]
    backend = backend.format(shm=shm, dir=lab.directory)
    orphan = start(lab, builds(key), "-object", f"{backend},id=ram0,size=64M", machine="q35,memory-backend=ram0")
    guest = surveyed(orphan)
    (block,) = guest.ram
    assert (block.id, block.size, block.in_argv, block.qom_path) == ("ram0", 64 * MIB, True, "/objects/ram0")
    assert (block.backing, block.shared, block.named_file) == (backing, shared, named)
    assert (block.fd is not None) is described
    assert block.discard_data is (kind == "discard")
    if block.fd is not None:
        with take_fd(orphan.pid, block.fd) as fd:
            status = os.fstat(fd.number)
            assert (status.st_dev, status.st_ino, status.st_size) == (block.device, block.inode, 64 * MIB)
        assert {f.owner for f in guest.open_files if f.number == block.fd} == {"ram:ram0"}


@pytest.mark.parametrize("key", KEYS)
def test_m_alone_is_anonymous_and_on_the_command_line(
    lab: Lab, builds: Callable[[str], QemuBuild], key: str
) -> None:
    (block,) = surveyed(start(lab, builds(key))).ram
    assert (block.id, block.backing, block.shared, block.in_argv) == ("pc.ram", Backing.ANONYMOUS, False, True)
    assert block.qom_type == "memory-backend-ram"


@pytest.mark.parametrize("key", KEYS)
def test_mem_path_alone_is_a_private_file(
    lab: Lab, builds: Callable[[str], QemuBuild], shm: str, key: str
) -> None:
    (block,) = surveyed(start(lab, builds(key), "-mem-path", shm)).ram
    assert (block.id, block.backing, block.shared, block.in_argv) == ("pc.ram", Backing.TMPFS, False, True)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("backend", ["memory-backend-memfd,share=on", "memory-backend-file,share=on,mem-path={shm}"])
def test_blocks_of_one_size_are_not_mixed_up(
    lab: Lab, builds: Callable[[str], QemuBuild], shm: str, key: str, backend: str
) -> None:
    """Two NUMA nodes: what is written into one of them by its descriptor is seen by the guest at that node's place."""
    words = [
        word
        for number in (1, 0)  # made in the order opposite to their place
        for word in (
            *("-object", f"{backend.format(shm=shm)},id=node{number},size=32M"),
        )
    ]
    nodes = [word for number in (0, 1) for word in ("-numa", f"node,nodeid={number},memdev=node{number}")]
    orphan = start(lab, builds(key), *words, *nodes, "-smp", "2", "-S")
    found = candidate(orphan)
    with survey.open_monitor(found) as monitor:
        guest = survey.survey(found, monitor)
        blocks = {b.id: b for b in guest.ram}
        assert set(blocks) == {"node0", "node1"}
        assert blocks["node0"].inode != blocks["node1"].inode
        for number, address in ((0, 16 * MIB), (1, 48 * MIB)):
            descriptor = blocks[f"node{number}"].fd
            assert descriptor is not None
            with take_fd(orphan.pid, descriptor) as fd:
                os.pwrite(fd.number, bytes([0xA0 + number]), 16 * MIB)
            told = monitor.execute("human-monitor-command", command_line=f"xp /1xb 0x{address:x}")
            assert f"0xa{number}" in told


@pytest.mark.parametrize("key", KEYS)
def test_plugged_in_memory_is_not_on_the_command_line(
    lab: Lab, builds: Callable[[str], QemuBuild], key: str
) -> None:
    orphan = start(lab, builds(key), "-m", "64M,slots=2,maxmem=512M")
    found = candidate(orphan)
    with survey.open_monitor(found) as monitor:
        monitor.execute_arguments(
            "object-add", {"qom-type": "memory-backend-memfd", "id": "late", "size": 128 * MIB, "share": True}
        )
        monitor.execute("device_add", driver="pc-dimm", id="dimm0", memdev="late")
        guest = survey.survey(found, monitor)
    blocks = {b.id: b for b in guest.ram}
    assert blocks["late"].size == 128 * MIB
    assert not blocks["late"].in_argv
    assert blocks["pc.ram"].in_argv
    assert ("dimm0", "pc-dimm") in {(d.id, d.type) for d in guest.devices}


@pytest.mark.parametrize("key", KEYS)
def test_memory_by_an_inherited_descriptor(lab: Lab, builds: Callable[[str], QemuBuild], key: str) -> None:
    """As an update leaves it."""
    number = os.memfd_create("ram", 0)
    try:
        os.ftruncate(number, 64 * MIB)
        inode = os.fstat(number).st_ino
        orphan = start(
            lab,
            builds(key),
            *("-object", f"memory-backend-file,id=ram0,size=64M,share=on,mem-path=/proc/self/fd/{number}"),
            machine="q35,memory-backend=ram0",
            pass_fds=[number],
        )
    finally:
        os.close(number)
    (block,) = surveyed(orphan).ram
    assert (block.backing, block.shared, block.named_file, block.inode) == (Backing.MEMFD, True, True, inode)
    assert block.fd is not None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can set huge pages aside and mount them")
def test_hugetlbfs(lab: Lab, builds: Callable[[str], QemuBuild], huge_pages: None) -> None:
    place = lab.directory / "huge"
    place.mkdir()
    subprocess.run(["mount", "-t", "hugetlbfs", "cpr-lab", str(place)], check=True)
    try:
        orphan = start(
            lab,
            builds("7.2"),
            *("-object", f"memory-backend-file,id=ram0,size=64M,share=on,mem-path={place}"),
            machine="q35,memory-backend=ram0",
        )
        (block,) = surveyed(orphan).ram
        orphan.kill()
        orphan.wait(10)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
    assert block.backing is Backing.HUGETLB
    assert block.page_size >= 2 * MIB


def test_a_monitor_of_another_qemu_is_noticed(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    from cpr.errors import MonitorError

    one, other = (start(lab, builds("7.2"), name=name) for name in ("one", "other"))
    with qmp.connect(candidate(other).monitors[0], other.pid) as monitor:
        with pytest.raises(MonitorError, match="another QEMU"):
            survey.survey(candidate(one), monitor)
