"""What files really are: fake trees of sysfs with recorded values, and our own files."""

from __future__ import annotations

import mmap
import os
import stat
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from cpr.linux import dax
from cpr.linux.blockdev import bottom, filesystem_uuid, uuid_text
from cpr.linux.dax import FileFacts, classify, storage_of
from cpr.linux.mounts import parse_mountinfo
from cpr.model import Backing

if TYPE_CHECKING:
    from pathlib import Path

UUID = "9f5c4c0e-7a1c-4d31-9a55-0d3f6f6f0a11"
EXT4 = 0xEF53
GIB = 1 << 30
MIB = 1 << 20

MOUNTINFO = """\
24 1 254:0 / / rw,relatime - ext4 /dev/vda rw
25 24 259:0 / /pm rw,relatime - ext4 /dev/pmem0 rw,dax=always
26 24 259:1 / /pm1 rw,relatime - xfs /dev/pmem1 rw
27 24 0:40 / /data rw - btrfs /dev/vda rw,subvol=/
28 24 1:0 / /ramdisk rw - ext4 /dev/ram0 rw
29 24 253:0 / /lvm rw - xfs /dev/mapper/vg-x rw
30 24 0:50 / /nfs rw - nfs4 server:/x rw
31 24 7:0 / /loop rw - ext4 /dev/loop0 rw
32 24 9:0 / /both rw - ext4 /dev/md0 rw
33 24 0:60 / /over rw - overlay overlay rw,lowerdir=/l,upperdir=/dev/shm,workdir=/w
"""


class FakeSysfs:
    """Directories, attributes and links as sysfs has them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, path: str, **attributes: str) -> str:
        place = self.root / "sys/devices" / path
        place.mkdir(parents=True, exist_ok=True)
        for name, value in attributes.items():
            (place / name).write_text(value + "\n")
        return str(place)

    def link(self, name: str, place: str) -> None:
        link = self.root / "sys" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(place)


@pytest.fixture
def sysfs(tmp_path: Path) -> FakeSysfs:
    """Two e820 regions: a device DAX and a pmem disk with fsdax; an NVDIMM; a virtio disk and some stacked on it."""
    fake = FakeSysfs(tmp_path)
    e820 = "platform/e820_pmem/ndbus0"
    fake.add(e820, provider="e820")
    fake.add(f"{e820}/region0", resource="0x40000000", size=str(768 * MIB))
    fake.add(f"{e820}/region0/dax0.1", uuid=UUID, align=str(2 * MIB), namespace="namespace0.0", mode="ram")
    place = fake.add(f"{e820}/region0/dax0.1/dax0.0", dev="252:0", size=str(766 * MIB), align=str(2 * MIB))
    (tmp_path / "sys/bus/dax").mkdir(parents=True)
    os.symlink(tmp_path / "sys/bus/dax", f"{place}/subsystem")
    fake.link("dev/char/252:0", place)
    null = fake.add("virtual/mem/null", dev="1:3")
    os.symlink(tmp_path / "sys/class/mem", f"{null}/subsystem")
    fake.link("dev/char/1:3", null)

    fake.add(f"{e820}/region1", resource="0x100000000", size=str(GIB))
    fake.add(f"{e820}/region1/pfn1.0", uuid=UUID, align=str(2 * MIB), namespace="namespace1.0")
    fake.link("dev/block/259:0", fake.add(f"{e820}/region1/pfn1.0/block/pmem0", dev="259:0"))
    nfit = "LNXSYSTM:00/LNXSYBUS:00/ACPI0012:00/ndbus1"
    fake.add(nfit, provider="ACPI.NFIT")
    fake.add(f"{nfit}/region2", resource="0x0", size=str(GIB))
    fake.add(f"{nfit}/region2/namespace2.0", uuid=UUID)
    fake.link("dev/block/259:1", fake.add(f"{nfit}/region2/namespace2.0/block/pmem1", dev="259:1"))

    vda = fake.add("pci0000:00/virtio1/block/vda", dev="254:0")
    vda1 = fake.add("pci0000:00/virtio1/block/vda/vda1", dev="254:1", partition="1")
    fake.link("dev/block/254:0", vda)
    fake.link("dev/block/254:1", vda1)
    fake.link("class/block/vda", vda)
    fake.link("dev/block/1:0", fake.add("virtual/block/ram0", dev="1:0"))
    stacks = (("253:0", "dm-0", ("254:1",)), ("253:1", "dm-1", ("253:0", "1:0")), ("9:0", "md0", ("254:1", "259:0")))
    for number, name, below in stacks:
        fake.link(f"dev/block/{number}", fake.add(f"virtual/block/{name}", dev=number))
        for one in below:
            place = os.path.realpath(tmp_path / "sys/dev/block" / one)
            fake.link(f"devices/virtual/block/{name}/slaves/{os.path.basename(place)}", place)
    fake.link("dev/block/7:0", fake.add("virtual/block/loop0", dev="7:0"))
    return fake


def facts(**changes: Any) -> FileFacts:
    known: dict[str, Any] = {
        "target": "/pm/ram0", "mode": stat.S_IFREG | 0o600, "device": (259, 0), "rdev": (0, 0), "inode": 12,
        "size": 256 * MIB, "magic": EXT4, "dax": None, "mount": None,
    }  # fmt: skip
    return FileFacts(**{**known, **changes})


def told(sysfs: FakeSysfs, **changes: Any) -> Any:
    return classify(facts(**changes), parse_mountinfo(MOUNTINFO), root=str(sysfs.root))


def test_device_dax_is_told_before_its_file_system(sysfs: FakeSysfs) -> None:
    found = told(sysfs, target="/dev/dax0.0", mode=stat.S_IFCHR, device=(0, 6), rdev=(252, 0), size=0,
                 magic=dax.TMPFS_MAGIC)  # fmt: skip
    assert (found.kind, found.device, found.size) == (Backing.DEVDAX, (252, 0), 766 * MIB)
    region = found.pmem
    assert (region.provider, region.start, region.size) == ("e820", GIB, 768 * MIB)
    assert (region.namespace_uuid, region.mode, region.align) == (UUID, "devdax", 2 * MIB)
    assert (region.bus, region.region, region.namespace) == ("ndbus0", "region0", "namespace0.0")


def test_other_character_devices_are_unknown(sysfs: FakeSysfs) -> None:
    for rdev in ((1, 3), (252, 9)):
        assert told(sysfs, mode=stat.S_IFCHR, rdev=rdev, magic=dax.TMPFS_MAGIC).kind is Backing.UNKNOWN


def test_a_regular_file_called_dax_is_tmpfs(sysfs: FakeSysfs) -> None:
    """What QEMU makes of a mem-path whose device is gone."""
    found = told(sysfs, target="/dev/dax0.0", device=(0, 6), magic=dax.TMPFS_MAGIC)
    assert (found.kind, found.pmem) == (Backing.TMPFS, None)


def test_fsdax_by_mount_and_by_inode(sysfs: FakeSysfs) -> None:
    by_mount = told(sysfs)
    assert (by_mount.kind, by_mount.filesystem, by_mount.disks) == (Backing.FSDAX, "ext4", ("pmem0",))
    assert (by_mount.pmem.mode, by_mount.pmem.start, by_mount.inode) == ("fsdax", 4 * GIB, 12)
    by_inode = told(sysfs, device=(259, 1), dax=True)
    assert (by_inode.kind, by_inode.pmem.provider, by_inode.pmem.mode) == (Backing.FSDAX, "ACPI.NFIT", "raw")
    assert by_inode.pmem.start is None
    assert by_inode.pmem.namespace_uuid == UUID


def test_a_file_on_pmem_that_is_not_dax(sysfs: FakeSysfs) -> None:
    for changes in ({"dax": False}, {"device": (259, 1)}):
        found = told(sysfs, **changes)
        assert found.kind is Backing.DISK_FILE
        assert found.pmem is not None


@pytest.mark.parametrize(
    ("changes", "kind", "disks", "volatile"),
    [
        ({"device": (254, 0)}, Backing.DISK_FILE, ("vda",), False),
        ({"device": (253, 0)}, Backing.DISK_FILE, ("vda",), False),
        ({"device": (0, 41), "mount": 27}, Backing.DISK_FILE, ("vda",), False),
        ({"device": (1, 0)}, Backing.DISK_FILE, ("ram0",), True),
        ({"device": (9, 0)}, Backing.DISK_FILE, ("pmem0", "vda"), True),
        ({"device": (0, 50)}, Backing.DISK_FILE, (), False),
        ({"device": (0, 99)}, Backing.UNKNOWN, (), False),
    ],
)
def test_files_on_disks(
    sysfs: FakeSysfs, changes: dict[str, Any], kind: Backing, disks: tuple[str, ...], volatile: bool
) -> None:
    found = told(sysfs, **changes)
    assert (found.kind, tuple(sorted(found.disks)), bool(found.volatile)) == (kind, disks, volatile)


def test_block_devices(sysfs: FakeSysfs) -> None:
    """As disks of guests."""
    disk = told(sysfs, mode=stat.S_IFBLK, rdev=(254, 1), device=(0, 6), target="/dev/vda1")
    assert (disk.kind, disk.disks, disk.volatile, disk.pmem) == (Backing.DISK_FILE, ("vda",), "", None)
    assert told(sysfs, mode=stat.S_IFBLK, rdev=(1, 0)).volatile
    assert told(sysfs, mode=stat.S_IFBLK, rdev=(259, 0)).pmem.provider == "e820"


def test_a_stack_with_a_ram_disk_below(sysfs: FakeSysfs) -> None:
    assert "ram0" in bottom((253, 1), root=str(sysfs.root)).volatile
    assert bottom((8, 0), root=str(sysfs.root)).places == ()
    assert "more devices" in bottom((253, 1), root=str(sysfs.root), depth=0).volatile


def test_a_loop_device_is_as_lasting_as_its_file(sysfs: FakeSysfs, tmp_path: Path) -> None:
    with open("/dev/shm/cpr-test-loop", "w") as file:
        sysfs.add("virtual/block/loop0/loop", backing_file=file.name)
        try:
            assert "no file on a disk" in told(sysfs, device=(7, 0)).volatile
        finally:
            os.unlink(file.name)
    sysfs.add("virtual/block/loop0/loop", backing_file=str(tmp_path / "gone"))
    assert "cannot be told" in told(sysfs, device=(7, 0)).volatile


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"magic": dax.TMPFS_MAGIC}, Backing.TMPFS),
        ({"magic": dax.RAMFS_MAGIC}, Backing.TMPFS),
        ({"magic": dax.HUGETLBFS_MAGIC}, Backing.HUGETLB),
        ({"magic": dax.HUGETLBFS_MAGIC, "mode": stat.S_IFDIR}, Backing.HUGETLB),
        ({"magic": dax.TMPFS_MAGIC, "target": "/memfd:ram (deleted)"}, Backing.MEMFD),
        ({"magic": dax.HUGETLBFS_MAGIC, "target": "/memfd:ram (deleted)"}, Backing.MEMFD),
        ({"magic": dax.TMPFS_MAGIC, "target": "/dev/zero (deleted)"}, Backing.ANONYMOUS),
        ({"magic": dax.ANON_INODE_FS_MAGIC, "target": "anon_inode:[kvm-gmem]"}, Backing.GUEST_MEMFD),
        ({"magic": dax.ANON_INODE_FS_MAGIC, "target": "anon_inode:[eventfd]"}, Backing.UNKNOWN),
        ({"mode": stat.S_IFSOCK}, Backing.UNKNOWN),
        ({"mode": stat.S_IFBLK}, Backing.UNKNOWN),
        ({"magic": dax.OVERLAYFS_SUPER_MAGIC, "device": (0, 60)}, Backing.TMPFS),
        ({"magic": dax.OVERLAYFS_SUPER_MAGIC, "device": (0, 61)}, Backing.UNKNOWN),
    ],
)
def test_what_is_ram(sysfs: FakeSysfs, changes: dict[str, Any], kind: Backing) -> None:
    assert told(sysfs, **changes).kind is kind


def test_uuid_of_a_superblock_and_of_a_link(sysfs: FakeSysfs) -> None:
    root = sysfs.root
    (root / "dev/disk/by-uuid").mkdir(parents=True)
    wanted = uuid.UUID(UUID)
    for type, offset in (("ext4", 1024 + 0x68), ("xfs", 32)):
        (root / "dev/pmem0").write_bytes(bytes(offset) + wanted.bytes + bytes(64))
        assert filesystem_uuid((259, 0), type, root=str(root)) == UUID
    assert filesystem_uuid((254, 0), "ext4", root=str(root)) == ""
    (root / "dev/vda").write_bytes(b"short")
    (root / f"dev/disk/by-uuid/{UUID}").symlink_to("../../vda")
    assert filesystem_uuid((254, 0), "ext4", root=str(root)) == UUID
    assert filesystem_uuid((254, 0), "btrfs", root=str(root)) == UUID


def test_a_uuid_that_was_never_set_is_none() -> None:
    assert uuid_text(bytes(16)) == uuid_text(b"short") == ""
    assert uuid_text(uuid.UUID(UUID).bytes) == UUID


def test_our_own_files() -> None:
    fd = os.memfd_create("cpr-test")
    shared = mmap.mmap(-1, 4096)
    try:
        os.ftruncate(fd, 8192)
        memfd = storage_of(f"/proc/self/fd/{fd}")
        assert (memfd.kind, memfd.size, memfd.path) == (Backing.MEMFD, 8192, "/memfd:cpr-test")
    finally:
        os.close(fd)
        shared.close()
    assert storage_of("/dev/null").kind is Backing.UNKNOWN
    here = storage_of(__file__)
    assert here.kind in (Backing.DISK_FILE, Backing.TMPFS, Backing.UNKNOWN)
    with pytest.raises(FileNotFoundError):
        storage_of("/nonexistent")
