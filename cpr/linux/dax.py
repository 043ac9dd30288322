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
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cpr.linux import procfile, syscalls
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

EXT4_UUID = 1024 + 0x68
"""s_uuid of struct ext4_super_block, which begins at 1024 (fs/ext4/ext4.h)."""
XFS_UUID = 32
"""sb_uuid of struct xfs_dsb (fs/xfs/libxfs/xfs_format.h)."""

_PROCESS_LINK = re.compile(r"/proc/(\d+|self)/(?:fd|map_files)/[^/]+")
_DELETED = " (deleted)"
_DEEPEST = 8
"""Block devices above each other that are followed."""


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
    )


def storage_of(path: str) -> Storage:
    """What `path` is now: a path, or a link of /proc/PID/fd or /proc/PID/map_files, also of a deleted file.

    Raises:
        OSError: it is not there, or may not be reached (map_files: CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE).
    """
    link = _PROCESS_LINK.fullmatch(path)
    pid = int(link[1]) if link and link[1] != "self" else os.getpid()
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
    size = _number(place, "size") or 0
    align = _number(place, "align") or 0
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
    claimed = _text(claim, "namespace") or parts[index + 2]
    kind = re.match("[a-z]+", parts[index + 2])
    mode = {"dax": "devdax", "pfn": "fsdax", "btt": "sector", "namespace": "raw"}.get(kind[0] if kind else "", "")
    return PmemRegion(
        provider=_text(bus, "provider"),
        start=_number(region, "resource"),
        size=_number(region, "size") or 0,
        namespace_uuid=_text(claim, "uuid") or _text(f"{region}/{claimed}", "uuid"),
        mode=mode,
        align=_number(claim, "align") or 0,
        bus=parts[index],
        region=parts[index + 1],
        namespace=claimed,
    )


def _text(directory: str, name: str) -> str:
    try:
        with open(os.path.join(directory, name)) as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(directory: str, name: str) -> int | None:
    """Decimal or 0x; `resource` of a region is written 0x, and is 0 or missing to those who may not know."""
    try:
        value = int(_text(directory, name), 0)
    except ValueError:
        return None
    return None if name == "resource" and value in (0, (1 << 64) - 1) else value


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
    places, volatile = bottom(number, root=root)
    pmem = region_of(places[0]) if len(places) == 1 else None
    if len(places) > 1 and any(region_of(place) for place in places):
        volatile = volatile or "its file system lies on several devices, persistent memory among them"
    by_mount = mount is not None and bool(mount.options & {"dax", "dax=always"})
    mapped = facts.dax if facts.dax is not None else by_mount
    known = replace(
        known,
        filesystem=mount.type if mount is not None else "",
        disks=tuple(os.path.basename(place) for place in places),
        pmem=pmem,
        volatile=volatile,
        fs_uuid=filesystem_uuid(number, mount.type if mount is not None else "", root=root),
    )
    if mount is None and not places:
        return known
    return replace(known, kind=Backing.FSDAX if mapped else Backing.DISK_FILE)


def _block_device(known: Storage, root: str) -> Storage:
    places, volatile = bottom(known.device, root=root)
    return replace(
        known,
        kind=Backing.DISK_FILE if places else Backing.UNKNOWN,
        disks=tuple(os.path.basename(place) for place in places),
        pmem=region_of(places[0]) if len(places) == 1 else None,
        volatile=volatile,
    )


def _device_number(node: str, root: str) -> tuple[int, int] | None:
    text = _text(os.path.join(root, "sys/class/block", os.path.basename(os.path.realpath(node))), "dev")
    major, _, minor = text.partition(":")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def bottom(number: tuple[int, int], *, root: str = "/", depth: int = _DEEPEST) -> tuple[tuple[str, ...], str]:
    """(directories of sysfs of the disks below a block device, why one of them is RAM); nothing where it is none.

    Follows partitions, device mapper, md (`slaves`) and loop devices (`loop/backing_file`).
    """
    link = os.path.join(root, "sys/dev/block/{}:{}".format(*number))
    if not os.path.exists(link) or depth == 0:
        return (), ""
    place = os.path.realpath(link)
    name = os.path.basename(place)
    if os.path.exists(os.path.join(place, "partition")):
        place = os.path.dirname(place)
    if re.fullmatch(r"ram\d+|zram\d+", os.path.basename(place)):
        return (place,), f"its file system lies on the RAM disk {name}"
    file = _text(os.path.join(place, "loop"), "backing_file")
    if file:
        return _loop(place, file)
    try:
        slaves = sorted(os.listdir(os.path.join(place, "slaves")))
    except OSError:
        slaves = []
    found: list[str] = []
    for slave in slaves:
        major, _, minor = _text(os.path.join(place, "slaves", slave), "dev").partition(":")
        if major.isdigit() and minor.isdigit():
            below, why = bottom((int(major), int(minor)), root=root, depth=depth - 1)
            if why:
                return below, why
            found += below
    return (tuple(dict.fromkeys(found)) or (place,)), ""


def _loop(place: str, file: str) -> tuple[tuple[str, ...], str]:
    name = os.path.basename(place)
    try:
        below = storage_of(file)
    except OSError:
        return (place,), f"what the loop device {name} lies on ({file}) cannot be told"
    if below.volatile or below.kind not in (Backing.DISK_FILE, Backing.FSDAX):
        return (place,), f"the loop device {name} lies on {file}, which is RAM of this kernel"
    return (place,), ""


def filesystem_uuid(number: tuple[int, int], type: str, *, root: str = "/") -> str:
    """UUID of an ext or xfs file system from its superblock (as root), else from /dev/disk/by-uuid; "" if unknown."""
    place = os.path.realpath(os.path.join(root, "sys/dev/block/{}:{}".format(*number)))
    offset = XFS_UUID if type == "xfs" else EXT4_UUID if type.startswith("ext") else None
    name = os.path.basename(place)
    if offset is not None:
        try:
            with open(os.path.join(root, "dev", name), "rb") as device:
                device.seek(offset)
                data = device.read(16)
            if len(data) == 16:
                return str(uuid.UUID(bytes=data))
        except OSError:
            pass
    directory = os.path.join(root, "dev/disk/by-uuid")
    try:
        links = sorted(os.listdir(directory))
    except OSError:
        return ""
    return next((n for n in links if os.path.basename(os.path.realpath(os.path.join(directory, n))) == name), "")
