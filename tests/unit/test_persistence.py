"""What outlasts a kexec, and the words for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cpr.model import Backing, PmemRegion, Storage
from cpr.persistence import identity, persistence

GIB = 1 << 30
MIB = 1 << 20

E820 = PmemRegion(provider="e820", start=GIB, size=768 * MIB, namespace_uuid="u", mode="devdax", region="region0")
NFIT = replace(E820, provider="ACPI.NFIT")
DEVDAX = Storage(kind=Backing.DEVDAX, path="/dev/dax0.0", device=(252, 0), size=766 * MIB, pmem=E820)
FSDAX = Storage(kind=Backing.FSDAX, path="/pm/ram0", filesystem="ext4", device=(259, 0), inode=12, size=256 * MIB,
                fs_uuid="f", pmem=replace(E820, mode="fsdax"), disks=("pmem0",))  # fmt: skip
DISK = Storage(kind=Backing.DISK_FILE, path="/vm/ram0", filesystem="ext4", inode=3, size=GIB, disks=("sda",))
RIGHT = "ro memmap=768M!1G quiet"


@pytest.mark.parametrize(
    ("storage", "line", "kept", "reason"),
    [
        (DEVDAX, RIGHT, True, "memmap=768M!1G is on"),
        (FSDAX, RIGHT, True, "memmap=768M!1G is on"),
        (DEVDAX, "ro quiet", False, "memmap=768M!1G is not on"),
        (FSDAX, "ro quiet", False, "memmap=768M!1G is not on"),
        (DEVDAX, "memmap=512M!1G", False, "has memmap=512M!1G where memmap=768M!1G is needed"),
        (DEVDAX, "memmap=2G!512M", False, "has memmap=2G!512M where"),
        (DEVDAX, "memmap=768M!2G", False, "is not on"),
        (DEVDAX, "memmap=384M!1G,384M!1408M", True, "is on"),
        (replace(DEVDAX, pmem=NFIT), "", True, "ACPI.NFIT"),
        (replace(DEVDAX, pmem=replace(E820, provider="whatever")), RIGHT, False, "nothing is known"),
        (replace(DEVDAX, pmem=replace(E820, start=None)), RIGHT, False, "could not be read"),
        (replace(DEVDAX, pmem=None), RIGHT, False, "no nvdimm region"),
        (replace(FSDAX, kind=Backing.DISK_FILE), RIGHT, True, "not mapped by DAX"),
        (replace(FSDAX, kind=Backing.DISK_FILE), "", False, "is not on"),
        (DISK, "", True, "a file on a disk (sda)"),
        (replace(DISK, volatile="its file system lies on the RAM disk ram0"), "", False, "RAM disk"),
        (replace(DISK, disks=(), filesystem="fuse"), "", False, "no disk"),
        (replace(DISK, disks=(), filesystem="nfs4"), "", True, "nfs4"),
        (Storage(kind=Backing.TMPFS, filesystem="ramfs"), RIGHT, False, "ramfs"),
        (Storage(kind=Backing.HUGETLB), RIGHT, False, "huge pages"),
        (Storage(kind=Backing.MEMFD), RIGHT, False, "memfd"),
        (Storage(kind=Backing.ANONYMOUS), RIGHT, False, "anonymous"),
        (Storage(kind=Backing.GUEST_MEMFD), RIGHT, False, "confidential"),
        (Storage(kind=Backing.UNKNOWN), RIGHT, False, "could not be told"),
    ],
)
def test_what_is_kept(storage: Storage, line: str, kept: bool, reason: str) -> None:
    found = persistence(storage, line)
    assert (found.kept, reason in found.reason) == (kept, True), found


def test_what_is_missing_can_be_added() -> None:
    lost = persistence(DEVDAX, "ro")
    assert lost.memmap == "memmap=768M!1G"
    assert persistence(DEVDAX, f"ro {lost.memmap}").kept


def test_disks_are_slow_and_dax_is_not() -> None:
    assert persistence(DISK, "").slow
    assert not persistence(DEVDAX, RIGHT).slow


def test_identity_leaves_out_what_a_boot_counts_anew() -> None:
    again = replace(DEVDAX, path="/dev/dax1.0", device=(251, 7), pmem=replace(E820, region="region3", bus="ndbus2"))
    assert identity(again) == identity(DEVDAX)
    for other in (replace(E820, start=2 * GIB), replace(E820, namespace_uuid="v"), NFIT, replace(E820, size=GIB)):
        assert identity(replace(DEVDAX, pmem=other)) != identity(DEVDAX)
    assert identity(replace(FSDAX, device=(259, 5))) == identity(FSDAX)
    for change in ({"inode": 13}, {"fs_uuid": "g"}, {"size": 1}):
        assert identity(replace(FSDAX, **change)) != identity(FSDAX)
