"""What a path or a descriptor really is: device DAX, a file mapped by DAX, on a disk, or in RAM; and on what it lies.

    storage_of("/dev/dax0.0")                  storage_of("/proc/4242/map_files/7f00-7f80")
    storage_of("/proc/4242/fd/20")             storage_of("/mnt/pmem/ram0")

The order matters: a character device is told before statfs(2) is asked, since devtmpfs has the magic number of tmpfs.

sysfs, as drivers/nvdimm and drivers/dax make it:

    /sys/dev/char/MAJ:MIN  -> .../ndbus0/region0/dax0.1/dax0.0     subsystem dax: device DAX
    /sys/dev/block/MAJ:MIN -> .../ndbus0/region0/pfn0.1/block/pmem0 (or namespace0.0/block/pmem0, btt0.1/block/pmem0s)
    .../ndbus0/provider, .../region0/{resource,size}, .../region0/dax0.1/{uuid,align,namespace,mode}

`root` is where sys, proc and dev are looked up, for trees recorded elsewhere. What cannot be read is left empty, and a
kind that cannot be told is Backing.UNKNOWN: judging is done elsewhere (persistence.py).

Out of scope: making namespaces, mounting.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cpr.linux import procfile, syscalls
from cpr.linux.blockdev import bottom, filesystem_uuid, read_number, read_text, uuid_text
from cpr.linux.mounts import parse_mountinfo
from cpr.model import Backing, PmemRegion, Storage

if TYPE_CHECKING:
    from cpr.linux.mounts import Mount

TMPFS_MAGIC = 0x01021994
RAMFS_MAGIC = 0x858458F6
HUGETLBFS_MAGIC = 0x958458F6
OVERLAYFS_SUPER_MAGIC = 0x794C7630
ANON_INODE_FS_MAGIC = 0x09041934
GUEST_MEMFD_MAGIC = 0x474D454D
"""include/uapi/linux/magic.h; guest_memfd is an anon_inode before it had one of its own (6.18)."""

_PROCESS_LINK = re.compile(r"/proc/(?:\d+|self)/(?:fd|map_files)/[^/]+")
_DELETED = " (deleted)"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """What system calls say of a path: enough, with sysfs, to tell what it is."""

    target: str
    """Where the link of /proc leads, or the path, resolved."""
    mode: int
    device: tuple[int, int]
    rdev: tuple[int, int]
    inode: int
    size: int
    magic: int
    """f_type of statfs(2)."""
    dax: bool | None
    """STATX_ATTR_DAX: mapped without page cache now, whatever the mount says; None: this kernel does not tell."""
    mount: int | None
    """Mount id."""
    fs_uuid: str = ""
    """Of its file system, as the kernel tells it (6.9)."""


def file_facts(path: str) -> FileFacts:
    """Ask the kernel. Links are followed. OSError: it is not there, or may not be reached."""
    status = os.stat(path)
    try:
        attributes, supported, mount = syscalls.statx_extra(path)
    except OSError:
        attributes = supported = 0
        mount = None
    return FileFacts(
        target=os.readlink(path) if _PROCESS_LINK.fullmatch(path) else os.path.realpath(path),
        mode=status.st_mode,
        device=(os.major(status.st_dev), os.minor(status.st_dev)),
        rdev=(os.major(status.st_rdev), os.minor(status.st_rdev)),
        inode=status.st_ino,
        size=status.st_size,
        magic=syscalls.statfs_type(path),
        dax=bool(attributes & syscalls.STATX_ATTR_DAX) if supported & syscalls.STATX_ATTR_DAX else None,
        mount=mount,
        fs_uuid=_told_uuid(path) if stat.S_ISREG(status.st_mode) else "",
    )


def _told_uuid(path: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return uuid_text(syscalls.fs_uuid(fd))
    except OSError:
        return ""
    finally:
        os.close(fd)


def storage_of(path: str) -> Storage:
    """What `path` is now: a path, also below /proc/PID/root, or a link of /proc/PID/fd or map_files, also if deleted.

    Raises:
        OSError: it is not there, or may not be reached (map_files: CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE).
    """
    of_process = re.match(r"/proc/(\d+)/", path)
    pid = int(of_process[1]) if of_process else os.getpid()
    return classify(file_facts(path), parse_mountinfo(procfile.mountinfo(pid)))


def classify(facts: FileFacts, mounts: tuple[Mount, ...], *, root: str = "/") -> Storage:
    """The storage from facts, the mounts of the process they come from, and sysfs below `root`."""
    path = facts.target.removesuffix(_DELETED)
    known = Storage(
        kind=Backing.UNKNOWN, path=path, device=facts.device, inode=facts.inode, size=facts.size
    )
    if stat.S_ISCHR(facts.mode):
        return _character_device(replace(known, device=facts.rdev, inode=0), root)
    if stat.S_ISBLK(facts.mode):
        return _block_device(replace(known, device=facts.rdev, inode=0), root)
    if facts.magic in (ANON_INODE_FS_MAGIC, GUEST_MEMFD_MAGIC):
        kind = Backing.GUEST_MEMFD if "kvm-gmem" in facts.target or facts.magic == GUEST_MEMFD_MAGIC else known.kind
        return replace(known, kind=kind)
    if not stat.S_ISREG(facts.mode) and not stat.S_ISDIR(facts.mode):
        return known
    if facts.target.startswith("/memfd:"):
        return replace(known, kind=Backing.MEMFD, filesystem="hugetlbfs" if facts.magic == HUGETLBFS_MAGIC else "tmpfs")
    if facts.target == "/dev/zero" + _DELETED:
        return replace(known, kind=Backing.ANONYMOUS)  # MAP_SHARED|MAP_ANONYMOUS: mm/shmem.c shmem_zero_setup
    if facts.magic == HUGETLBFS_MAGIC:
        return replace(known, kind=Backing.HUGETLB, filesystem="hugetlbfs")
    if facts.magic in (TMPFS_MAGIC, RAMFS_MAGIC):
        return replace(known, kind=Backing.TMPFS, filesystem="tmpfs" if facts.magic == TMPFS_MAGIC else "ramfs")
    mount = _mount(facts, mounts)
    if facts.magic == OVERLAYFS_SUPER_MAGIC:
        return _overlay(known, mount)
    return _on_disk(known, facts, mount, root)


def _mount(facts: FileFacts, mounts: tuple[Mount, ...]) -> Mount | None:
    by_id = next((m for m in mounts if facts.mount is not None and m.id == facts.mount), None)
    return by_id or next((m for m in mounts if m.device == facts.device), None)


# -- device DAX and regions


def is_device_dax(rdev: int, *, root: str = "/") -> bool:
    """Whether a character device is device DAX: its place in sysfs says so, its name does not."""
    place = os.path.realpath(os.path.join(root, f"sys/dev/char/{os.major(rdev)}:{os.minor(rdev)}/subsystem"))
    return os.path.basename(place) == "dax"


def _character_device(known: Storage, root: str) -> Storage:
    if not is_device_dax(os.makedev(*known.device), root=root):
        return known
    place = os.path.realpath(os.path.join(root, "sys/dev/char/{}:{}".format(*known.device)))
    size = read_number(place, "size") or 0
    align = read_number(place, "align") or 0
    region = region_of(place)
    if region is not None:
        region = replace(region, mode="devdax", align=region.align or align)
    return replace(known, kind=Backing.DEVDAX, size=size, pmem=region)


def region_of(place: str) -> PmemRegion | None:
    """The nvdimm region above a resolved directory of sysfs; None where there is none."""
    parts = place.split("/")
    index = next((i for i, p in enumerate(parts) if re.fullmatch(r"ndbus\d+", p)), None)
    if index is None or len(parts) < index + 3:
        return None
    bus, region = "/".join(parts[: index + 1]), "/".join(parts[: index + 2])
    claim = f"{region}/{parts[index + 2]}"  # dax0.1, pfn0.1, btt0.1, or the namespace itself
    claimed = read_text(claim, "namespace") or parts[index + 2]
    kind = re.match("[a-z]+", parts[index + 2])
    mode = {"dax": "devdax", "pfn": "fsdax", "btt": "sector", "namespace": "raw"}.get(kind[0] if kind else "", "")
    return PmemRegion(
        provider=read_text(bus, "provider"),
        start=read_number(region, "resource"),
        size=read_number(region, "size") or 0,
        namespace_uuid=read_text(claim, "uuid") or read_text(f"{region}/{claimed}", "uuid"),
        mode=mode,
        align=read_number(claim, "align") or 0,
        bus=parts[index],
        region=parts[index + 1],
        namespace=claimed,
    )


# -- files


def _overlay(known: Storage, mount: Mount | None) -> Storage:
    """A file that is written to lies in the upper directory."""
    options = mount.options if mount is not None else frozenset[str]()
    upper = next((o.partition("=")[2] for o in sorted(options) if o.startswith("upperdir=")), "")
    below = None
    if upper and os.path.isabs(upper):
        try:
            below = storage_of(upper)
        except OSError:
            below = None
    if below is None:
        return replace(known, filesystem="overlay")
    if below.kind is Backing.TMPFS:
        why = f"its overlay is written to {upper}, which is RAM of this kernel"
        return replace(known, kind=Backing.TMPFS, filesystem="overlay", volatile=why)
    return replace(
        known,
        kind=Backing.DISK_FILE if below.kind is Backing.FSDAX else below.kind,
        filesystem="overlay",
        disks=below.disks,
        pmem=below.pmem,
        fs_uuid=below.fs_uuid,
        volatile=below.volatile,
    )


def _on_disk(known: Storage, facts: FileFacts, mount: Mount | None, root: str) -> Storage:
    number = known.device
    if number[0] == 0 and mount is not None and mount.source.startswith("/dev/"):
        number = _device_number(mount.source, root) or number  # btrfs, whose st_dev is no device's
    type = mount.type if mount is not None else ""
    by_mount = mount is not None and bool(mount.options & {"dax", "dax=always"})
    mapped = facts.dax if facts.dax is not None else by_mount
    found = replace(
        _below(known, number, root),
        filesystem=type,
        fs_uuid=facts.fs_uuid or filesystem_uuid(number, type, root=root),
    )
    if mount is None and not found.disks:
        return found
    return replace(found, kind=Backing.FSDAX if mapped else Backing.DISK_FILE)


def _block_device(known: Storage, root: str) -> Storage:
    below = _below(known, known.device, root)
    return replace(below, kind=Backing.DISK_FILE if below.disks else Backing.UNKNOWN)


def _below(known: Storage, number: tuple[int, int], root: str) -> Storage:
    """With the disks below a block device, the region that they are, and why they are RAM."""
    found = bottom(number, root=root)
    regions = [region_of(place) for place in found.places]
    volatile = found.volatile or next(filter(None, (_loop_volatile(*loop) for loop in found.loops)), "")
    if len(regions) > 1 and any(regions):
        volatile = volatile or "it lies on several devices, persistent memory among them"
    return replace(
        known,
        disks=tuple(os.path.basename(place) for place in found.places),
        pmem=regions[0] if len(regions) == 1 else None,
        volatile=volatile,
    )


def _loop_volatile(name: str, file: str) -> str:
    try:
        below = storage_of(file)
    except OSError:
        return f"what the loop device {name} lies on ({file}) cannot be told"
    if below.volatile or below.pmem or below.kind is not Backing.DISK_FILE:
        return f"the loop device {name} lies on {file}, which is no file on a disk"
    return ""


def _device_number(node: str, root: str) -> tuple[int, int] | None:
    text = read_text(os.path.join(root, "sys/class/block", os.path.basename(os.path.realpath(node))), "dev")
    major, _, minor = text.partition(":")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
