"""What lies below a block device, and the file system on it: sysfs and superblocks.

`root` is where sys and dev are looked up, for trees recorded elsewhere.

Out of scope: what that means for the memory of a guest (dax.py).
"""

from __future__ import annotations

import os
import re
import uuid
from dataclasses import dataclass

EXT4_UUID = 1024 + 0x68
"""s_uuid of struct ext4_super_block, which begins at 1024 (fs/ext4/ext4.h)."""
XFS_UUID = 32
"""sb_uuid of struct xfs_dsb (fs/xfs/libxfs/xfs_format.h)."""

_DEEPEST = 8
"""Block devices above each other that are followed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottom:
    """Below a block device: `places` are resolved directories of sysfs, of disks and not of their partitions."""

    places: tuple[str, ...] = ()
    volatile: str = ""
    """Why one of them is RAM, in words."""
    loops: tuple[tuple[str, str], ...] = ()
    """(name, file behind it) of the loop devices among them."""


def bottom(number: tuple[int, int], *, root: str = "/", depth: int = _DEEPEST) -> Bottom:
    """What lies below block device (major, minor); nothing where it is none.

    Follows partitions, device mapper and md (`slaves`); a loop device is a bottom (`loop/backing_file`).
    """
    link = os.path.join(root, "sys/dev/block/{}:{}".format(*number))
    if not os.path.exists(link):
        return Bottom()
    place = os.path.realpath(link)
    if os.path.exists(os.path.join(place, "partition")):
        place = os.path.dirname(place)
    name = os.path.basename(place)
    if re.fullmatch(r"ram\d+|zram\d+", name):
        return Bottom(places=(place,), volatile=f"it lies on the RAM disk {name}")
    file = read_text(os.path.join(place, "loop"), "backing_file")
    if file:
        return Bottom(places=(place,), loops=((name, file),))
    try:
        slaves = sorted(os.listdir(os.path.join(place, "slaves")))
    except OSError:
        slaves = []
    if slaves and depth == 0:
        return Bottom(places=(place,), volatile=f"it lies on more devices above each other than can be told ({name})")
    found = []
    for slave in slaves:
        major, _, minor = read_text(os.path.join(place, "slaves", slave), "dev").partition(":")
        if major.isdigit() and minor.isdigit():
            found.append(bottom((int(major), int(minor)), root=root, depth=depth - 1))
    if not found:
        return Bottom(places=(place,))
    return Bottom(
        places=tuple(dict.fromkeys(p for one in found for p in one.places)),
        volatile=next((one.volatile for one in found if one.volatile), ""),
        loops=tuple(loop for one in found for loop in one.loops),
    )


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
                return uuid_text(data)
        except OSError:
            pass
    directory = os.path.join(root, "dev/disk/by-uuid")
    try:
        links = sorted(os.listdir(directory))
    except OSError:
        return ""
    return next((n for n in links if os.path.basename(os.path.realpath(os.path.join(directory, n))) == name), "")


def uuid_text(data: bytes) -> str:
    """16 bytes as a UUID is written; "" for other lengths and for one that was never set."""
    return str(uuid.UUID(bytes=data)) if len(data) == 16 and any(data) else ""


def read_text(directory: str, name: str) -> str:
    """An attribute of sysfs, stripped; "" where it cannot be read."""
    try:
        with open(os.path.join(directory, name)) as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def read_number(directory: str, name: str) -> int | None:
    """Decimal or 0x; an address (`resource`) is 0 or all ones to those who may not know it: None."""
    try:
        value = int(read_text(directory, name), 0)
    except ValueError:
        return None
    return None if name == "resource" and value in (0, (1 << 64) - 1) else value
