"""A manifest as a value, to be changed by the tests that need one."""

from __future__ import annotations

import os
from dataclasses import replace

from cpr.linux.traits import Likeness, likeness_of
from cpr.model import Backing, MonitorAddress, PmemRegion, Storage
from cpr.reboot.files import Disk, StateFile
from cpr.reboot.manifest import Manifest, SavedGuest, SavedRam, VfioDevice
from cpr.reboot.stamp import Stamp, places
from tests.unit import values

MIB = 1 << 20
STORAGE = Storage(
    kind=Backing.DEVDAX,
    path="/dev/dax0.0",
    device=(252, 0),
    size=766 * MIB,
    pmem=PmemRegion(provider="e820", start=1 << 30, size=768 * MIB, namespace_uuid="u", mode="devdax"),
)
IDENTITY = {"kind": "devdax", "start": 1 << 30}
STAMP = Stamp(size=8192, offset=0, identity=IDENTITY, places=places(8192), digests=("a", "b"))


def likeness() -> Likeness:
    """Ours, with a word that is no UTF-8, as the kernel may hand it to us."""
    own = likeness_of(os.getpid())
    return replace(own, argv=(*own.argv, "odd\udcff"), environ=(("A", "b\n\udc80"), ("A", "twice")))


def guest(pid: int = 4242, name: str = "web1") -> SavedGuest:
    return SavedGuest(
        name=name,
        uuid="3fa85f64-5717-4562-b3fc-2c963f66afa6",
        pid=pid,
        likeness=likeness(),
        own_namespaces=("net",),
        machine="pc-q35-7.2",
        runstate="running",
        ram=(SavedRam(id="ram0", size=8192, path="/dev/dax0.0", storage=STORAGE, stamp=STAMP),),
        state=StateFile(path="/var/lib/cpr/web1.state", size=300_000, sha256="0" * 64),
        disks=(Disk(path="/vm/disk", inode=7, size=MIB, mtime_ns=1_700_000_000_000_000_001),),
        binary_before=values.binary(),
        pinned_binary="/var/lib/cpr/qemu-7.2.22",
        binary_after=values.binary("11.1.3"),
        options=("-cpu max",),
        vfio=(VfioDevice(address="0000:03:00.0", driver="vfio-pci"),),
        monitor=MonitorAddress(label="mon0", path="/run/web1.qmp"),
        agent="/run/web1.qga",
        unit="vm.service",
    )


def manifest(*guests: SavedGuest) -> Manifest:
    return Manifest(
        run="20261120T101500-3f2a",
        boot_id="b",
        release_before="6.12.8",
        release="7.2.1",
        command_line="ro memmap=768M!1G",
        time=1_700_000_000.25,
        guests=guests or (guest(), guest(4343, "db1")),
    )
