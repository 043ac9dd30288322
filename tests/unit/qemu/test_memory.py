"""RAM blocks from recorded texts: maps, mountinfo and HMP tables."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from typing import Any

import pytest

from cpr.linux.fds import OpenDescriptor
from cpr.linux.mounts import parse_mountinfo
from cpr.linux.proc import parse_maps
from cpr.model import Backing
from cpr.qemu import memory, ram_addresses
from cpr.qemu.memory import Backend, Opened

MIB = 1 << 20

RAMBLOCK_10 = """\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                      r0    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007fb00bfff000  rw
   0000:00:01.0/vga.vram    4 KiB  0x0000000010080000 0x0000000001000000 0x0000000001000000 0x00007fb00ac00000  rw
    /rom@etc/acpi/tables    4 KiB  0x0000000011140000 0x0000000000020000 0x0000000000200000 0x00007fb00a600000  ro
             /objects/r1    2 MiB  0x0000000010000000 0x0000000000040000 0x0000000000040000 0x00007fb070600000  rw
"""
RAMBLOCK_7 = """\
              Block Name    PSize              Offset               Used              Total
                      r0    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000
"""
MTREE = """\
FlatView #0
 AS "VGA", root: bus master container
 Root memory region: (none)
  No rendered FlatView

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): node0
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000cbfff (prio 0, rom): node0 @00000000000c0000
  0000000000100000-0000000001ffffff (prio 0, ram): node0 @0000000000100000
  0000000002000000-0000000003ffffff (prio 0, ram): node1
  0000000100000000-0000000103ffffff (prio 0, nv-ram): nv @0000000000001000

FlatView #2
 AS "I/O", root: io
  0000000000000000-0000000000000007 (prio 0, ram): other
"""
MAPS = """\
7f0000000000-7f0004000000 rw-s 00000000 00:01 1001                       /memfd:memory-backend-memfd (deleted)
7f0010000000-7f0014000000 rw-s 00000000 00:01 1002                       /memfd:memory-backend-memfd (deleted)
7f0020000000-7f0022000000 rw-s 00000000 00:1b 2001                       /dev/shm/ram0
7f0022000000-7f0024000000 rw-s 02000000 00:1b 2001                       /dev/shm/ram0
7f0030000000-7f0034000000 rw-p 00000000 fe:00 3001                       /var/lib/vm/ram
7f0040000000-7f0044000000 rw-s 00000000 00:05 4001                       /dev/dax0.0
7f0050000000-7f0054000000 rw-s 00000000 00:20 5001 /dev/hugepages/qemu_back_mem.ram0.Ab12Cd (deleted)
7f0060000000-7f0064000000 rw-s 00000000 00:01 6001                       /dev/zero (deleted)
7f0070000000-7f0074000000 rw-p 00000000 00:00 0
7f0080000000-7f0084000000 r-xp 00000000 fe:00 7001                       /usr/bin/qemu-system-x86_64
7f0090000000-7f0094000000 rw-s 00000000 00:1b 2002                       /dev/shm/qemu-4242-shm-0 (deleted)
"""
MOUNTINFO = """\
21 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
22 21 0:5 / /dev rw,nosuid shared:2 - devtmpfs devtmpfs rw,size=4096k
23 22 0:27 / /dev/shm rw,nosuid,nodev shared:3 - tmpfs tmpfs rw
24 22 0:32 / /dev/hugepages rw shared:4 - hugetlbfs hugetlbfs rw,pagesize=2M
25 21 259:1 / /mnt/pm\\040em rw - ext4 /dev/pmem0 rw,dax=always
junk
"""


def backend(kind: str = "file", **more: Any) -> Backend:
    values: dict[str, Any] = {"id": "ram0", "qom_path": "/objects/ram0", "size": 64 * MIB, "share": True}
    return Backend(qom_type=f"memory-backend-{kind}", **(values | more))


def descriptor(number: int, inode: int, target: str = "", device: int = 0, flags: int = os.O_RDWR) -> OpenDescriptor:
    return OpenDescriptor(
        number=number,
        target=target,
        device=device,
        inode=inode,
        mode=stat.S_IFREG | 0o600,
        position=0,
        flags=flags,
        mount_id=0,
    )


def test_host_addresses_where_the_table_has_them() -> None:
    assert ram_addresses.parse_ramblocks(RAMBLOCK_10)["r0"] == 0x7FB00BFFF000
    assert ram_addresses.parse_ramblocks(RAMBLOCK_10)["/objects/r1"] == 0x7FB070600000
    assert ram_addresses.parse_ramblocks(RAMBLOCK_7) == {}
    assert ram_addresses.parse_ramblocks("") == {}


def test_flat_views_of_the_memory_address_space() -> None:
    views = ram_addresses.parse_flat_views(MTREE)
    assert views == {"node0": (0, 0), "node1": (0x2000000, 0), "nv": (0x100000000, 0x1000)}


@pytest.mark.parametrize(
    ("wanted", "inode"),
    [
        (backend(path="/dev/shm/ram0"), 2001),
        (backend(path="/var/lib/vm/ram", share=False), 3001),
        (backend(path="/dev/hugepages"), 5001),
        (backend(path="/dev/dax0.0"), 4001),
        (backend(path="/proc/self/fd/20"), 1002),
        (backend("shm"), 2002),
        (backend("ram", share=True), 6001),
    ],
)
def test_a_backend_is_located_by_path_and_inode(wanted: Backend, inode: int) -> None:
    table = [descriptor(20, 1002, "/memfd:memory-backend-memfd (deleted)")]
    found = memory.locate(wanted, parse_maps(MAPS), table, None)
    assert found is not None
    assert found.inode == inode


@pytest.mark.parametrize(
    "wanted",
    [
        backend("memfd"),  # two memfds of one size
        backend("ram", share=False),  # anonymous: any would do, none is told
        backend(path="/dev/shm/ram"),  # only begins like another
        backend(path="/dev/shm/ram0", size=128 * MIB),  # nothing is that large
        backend(path="/proc/self/fd/21"),  # that descriptor is closed
        backend(path="/dev/shm/ram0", offset=4096),
        backend(path="/usr/bin/qemu-system-x86_64"),  # mapped, but not to write
    ],
)
def test_what_is_not_certain_is_not_located(wanted: Backend) -> None:
    assert memory.locate(wanted, parse_maps(MAPS), [], None) is None


def test_the_address_decides_between_two_of_a_kind() -> None:
    for address, inode in ((0x7F0000000000, 1001), (0x7F0010000000, 1002)):
        found = memory.locate(backend("memfd"), parse_maps(MAPS), [], address)
        assert found is not None
        assert found.inode == inode
    assert memory.locate(backend("memfd"), parse_maps(MAPS), [], 0x1000) is None


def test_the_descriptor_is_writable_and_of_the_same_device() -> None:
    entry = parse_maps(MAPS)[2]
    other = os.makedev(8, 1)
    device = os.makedev(0, 0x1B)
    table = [
        descriptor(5, 2001, device=other, target="/other"),
        descriptor(6, 2001, device=device, flags=os.O_RDONLY, target="/dev/shm/ram0"),
        descriptor(9, 2001, device=device, target="/dev/shm/ram0"),
        descriptor(7, 2001, device=device, target="/dev/shm/ram0"),
    ]
    found = memory.descriptor_of(entry, table)
    assert found is not None
    assert found.number == 7
    # on overlayfs and btrfs the device numbers of stat and maps differ
    by_name = memory.descriptor_of(entry, [descriptor(8, 2001, device=other, target="/dev/shm/ram0")])
    assert by_name is not None
    assert memory.descriptor_of(entry, table[:2]) is None


@pytest.mark.parametrize(
    ("line", "kind", "opened", "dax", "backing"),
    [
        (0, "memfd", None, False, Backing.MEMFD),
        (2, "file", None, False, Backing.TMPFS),
        (4, "file", None, False, Backing.DISK_FILE),
        (5, "file", Opened(mode=stat.S_IFCHR, rdev=1, block_size=4096), True, Backing.DEVDAX),
        (5, "file", Opened(mode=stat.S_IFCHR, rdev=1, block_size=4096), False, Backing.UNKNOWN),
        (5, "file", Opened(mode=stat.S_IFREG, rdev=0, block_size=4096), False, Backing.UNKNOWN),
        (6, "file", Opened(mode=stat.S_IFREG, rdev=0, block_size=2 * MIB), False, Backing.HUGETLB),
        (7, "ram", None, False, Backing.ANONYMOUS),
        (8, "ram", None, False, Backing.ANONYMOUS),
    ],
)
def test_what_the_pages_are(line: int, kind: str, opened: Opened | None, dax: bool, backing: Backing) -> None:
    """A regular file named /dev/dax0.0 is what a QEMU makes where the device is gone: it is not persistent memory."""
    block = memory.ram_block(
        backend(kind),
        parse_maps(MAPS)[line],
        None,
        opened,
        mounts=parse_mountinfo(MOUNTINFO),
        guest_memfd=False,
        in_argv=True,
        dax=dax,
    )
    assert block.backing is backing
    assert block.page_size == (2 * MIB if line == 6 else 4096)


def test_a_file_system_on_persistent_memory() -> None:
    mounts = parse_mountinfo(MOUNTINFO)
    assert (mounts[-1].device, mounts[-1].type) == ((259, 1), "ext4")
    assert mounts[-1].options == frozenset({"rw", "dax=always"})
    entry = replace(parse_maps(MAPS)[4], device=(259, 1))
    block = memory.ram_block(
        backend(), entry, None, None, mounts=mounts, guest_memfd=False, in_argv=True, dax=False
    )
    assert block.backing is Backing.FSDAX
    unmounted = replace(entry, device=(7, 7))
    block = memory.ram_block(
        backend(), unmounted, None, None, mounts=mounts, guest_memfd=False, in_argv=True, dax=False
    )
    assert block.backing is Backing.UNKNOWN


def test_the_mapping_is_believed_and_not_the_property() -> None:
    private = parse_maps(MAPS)[4]
    block = memory.ram_block(
        backend(share=True), private, None, None, mounts=(), guest_memfd=False, in_argv=True, dax=False
    )
    assert not block.shared


def test_confidential_guests() -> None:
    block = memory.ram_block(
        backend("ram", share=False), None, None, None, mounts=(), guest_memfd=True, in_argv=True, dax=False
    )
    assert (block.backing, block.shared) == (Backing.GUEST_MEMFD, False)


def test_parse_backend() -> None:
    values = {"size": 64 * MIB, "share": True, "mem-path": "/x", "host-nodes": [0, 1], "policy": "bind"}
    found = memory.parse_backend("ram0", "memory-backend-file", "/objects/ram0", values)
    assert (found.size, found.share, found.path) == (64 * MIB, True, "/x")
    assert (found.host_nodes, found.policy) == ((0, 1), "bind")
    for wrong in ({}, {"size": "64M"}, {"size": True}, {"size": 1, "share": "on"}, {"size": 1, "host-nodes": 5}):
        with pytest.raises((KeyError, TypeError)):
            memory.parse_backend("ram0", "memory-backend-file", "/objects/ram0", wrong)
