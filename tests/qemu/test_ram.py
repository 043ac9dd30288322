"""Every kind of RAM: what can be mapped a second time goes over whole, what cannot is refused and left alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from cpr.errors import Exit
from tests.qemu.conftest import build
from tests.qemu.moving import descriptors, untouched, walk

if TYPE_CHECKING:

    from tests.lab.counting import CountingLog
    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Guest, Lab
    from tests.qemu.conftest import Command

full = pytest.mark.full
TMPFS = "/dev/shm"


@dataclass(frozen=True)
class Ram:
    """RAM of a guest. backend: None for what QEMU does by itself. FILE and TMPFS stand for places of the lab's."""

    backend: str | None
    more: str = ""
    """Further words; then there is no -machine memory-backend=."""
    key: str = "7.2"


# -- what a second process cannot have

REFUSED = {
    "plain": ("ram-volatile", Ram(None)),
    "ram": ("ram-volatile", Ram("memory-backend-ram")),
    "ram-shared": ("ram-volatile", Ram("memory-backend-ram,share=on")),
    # newer ones have a memfd behind it, which the stream does not leave out
    "ram-shared-11.1": ("ram-not-skipped", Ram("memory-backend-ram,share=on", key="11.1.a")),
    "memfd-private": ("ram-volatile", Ram("memory-backend-memfd,share=off")),
    "file-private": ("ram-volatile", Ram("memory-backend-file,share=off,mem-path=FILE")),
    "mem-path": ("ram-volatile", Ram(None, "-mem-path TMPFS")),
    "memfd-since-8.1": ("ram-not-skipped", Ram("memory-backend-memfd,share=on", key="10.0")),
    "one-node-of-two": (
        "ram-volatile",
        Ram(
            None,
            "-object memory-backend-file,share=on,mem-path=FILE,id=m0,size=64M -numa node,memdev=m0"
            " -object memory-backend-ram,id=m1,size=64M -numa node,memdev=m1",
        ),
    ),
}
EVERYDAY = ("plain", "file-private", "memfd-since-8.1")


def start(lab: Lab, born: QemuBuild, ram: Ram) -> Guest[CountingLog]:
    def placed(text: str) -> str:
        return text.replace("FILE", f"{lab.directory}/ram").replace("TMPFS", TMPFS)

    backend = placed(ram.backend) if ram.backend else None
    return lab.counting(born, *placed(ram.more).split(), backend=backend)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in EVERYDAY else full) for n in REFUSED])
def test_ram_that_would_be_lost_is_refused_and_left_alone(lab: Lab, cpr: Command, name: str) -> None:
    check, ram = REFUSED[name]
    guest = start(lab, build(ram.key), ram)
    with untouched(lab, guest):
        result = cpr.update(guest.pid, build(ram.key))
        assert result.code == Exit.BLOCKED, result
        assert check in [f["check"] for f in result.guest["findings"] if f["severity"] == "blocker"], result
        assert result.guest["status"] == "blocked"
        ignored = cpr.update(guest.pid, build(ram.key), "--ignore", check)
        assert ignored.code == Exit.USAGE, "what would lose the guest cannot be ignored"


# -- what it can have

MOVED = {
    "memfd": Ram("memory-backend-memfd,share=on"),
    "file": Ram("memory-backend-file,share=on,mem-path=FILE", key="11.1.a"),
    "tmpfs": Ram("memory-backend-file,share=on,mem-path=TMPFS", key="10.0"),
    "prealloc": Ram("memory-backend-memfd,share=on,prealloc=on"),
    "prealloc-threads": Ram("memory-backend-file,share=on,mem-path=FILE,prealloc=on,prealloc-threads=2", key="10.0"),
    "policy": Ram("memory-backend-memfd,share=on,policy=bind,host-nodes=0"),
    "discard-data": Ram("memory-backend-file,share=on,mem-path=FILE,discard-data=on", key="11.1.a"),
    "not-merged": Ram("memory-backend-memfd,share=on,merge=off,dump=off"),
    "not-reserved": Ram("memory-backend-file,share=on,mem-path=FILE,reserve=off", key="10.0"),
    "offset": Ram("memory-backend-file,share=on,mem-path=FILE,offset=2M", key="11.1.a"),
    "json": Ram(None, '-object {"qom-type":"memory-backend-memfd","id":"ram0","size":134217728,"share":true}'
                " -machine q35,memory-backend=ram0"),
    "numa": Ram(
        None,
        "-object memory-backend-file,share=on,mem-path=FILE,id=m0,size=96M -numa node,memdev=m0"
        " -object memory-backend-file,share=on,mem-path=FILE.1,id=m1,size=32M -numa node,memdev=m1",
    ),
}  # fmt: skip
HUGE = {
    "memfd": Ram("memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M"),
    "memfd-prealloc": Ram("memory-backend-memfd,share=on,prealloc=on,hugetlb=on,hugetlbsize=2M"),
}


def inodes_of_ram(pid: int) -> set[int]:
    """Inodes of the files of some size that a QEMU has mapped shared: its RAM."""
    found = set()
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            addresses, mode, _, _, inode, *_ = line.split()
            first, last = (int(part, 16) for part in addresses.split("-"))
            if mode.endswith("s") and last - first >= 16 << 20:
                found.add(int(inode))
    return found


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "discard-data" else full) for n in MOVED])
def test_ram_goes_over_whole(lab: Lab, cpr: Command, name: str) -> None:
    goes_over_twice(lab, cpr, MOVED[name])


def goes_over_twice(lab: Lab, cpr: Command, ram: Ram) -> None:
    """The first update may change how it is named, the second must find it again."""
    guest = start(lab, build(ram.key), ram)
    inodes, pid = inodes_of_ram(guest.pid), guest.pid
    assert inodes
    for _ in range(2):
        outcome = cpr.update(pid, build(ram.key)).guest
        assert outcome["status"] == "updated", outcome
        pid = outcome["pid_after"]
        assert inodes_of_ram(pid) == inodes, "the very same pages"
        walk(guest)


@full
@pytest.mark.parametrize("name", HUGE)
@pytest.mark.usefixtures("huge_pages")
def test_huge_pages_are_not_needed_twice(cpr: Command, name: str) -> None:
    goes_over_twice(cpr.lab, cpr, HUGE[name])


@pytest.mark.parametrize("gone", ["unlinked", pytest.param("replaced", marks=full)])
def test_ram_whose_file_is_not_at_its_path_any_more(lab: Lab, cpr: Command, gone: str) -> None:
    """It is handed on by descriptor: what the path leads to now is nobody's RAM."""
    born = build("11.1.a")
    guest = start(lab, born, Ram("memory-backend-file,share=on,mem-path=FILE"))
    path = lab.directory / "ram"
    path.unlink()
    if gone == "replaced":
        with path.open("wb") as file:
            file.truncate(128 << 20)
    inodes = inodes_of_ram(guest.pid)
    outcome = cpr.update(guest.pid, born).guest
    assert outcome["status"] == "updated", outcome
    assert inodes_of_ram(outcome["pid_after"]) == inodes
    assert [t for _, t in descriptors(outcome["pid_after"]) if t == str(path)] == []
    walk(guest)
    if gone == "replaced":
        assert os.stat(path).st_blocks == 0, "nobody has written there"
