"""Whether memory is still there under the next kernel, and why: decided from what it is and that kernel's command line.

kexec keeps no memory of its own accord: the next kernel takes all RAM that it is not told to leave alone.

Pure; what a path is reads `linux/dax.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpr import kernelargs
from cpr.model import Backing

if TYPE_CHECKING:
    from cpr.model import PmemRegion, Storage

E820 = "e820"
"""drivers/nvdimm/e820.c: legacy persistent memory, here from `memmap=nn!ss`."""
OUTLASTS = ("ACPI.NFIT", "virtio-pmem")
"""Providers whose regions are hardware to the kernel: drivers/acpi/nfit/core.c, drivers/nvdimm/nd_virtio.c."""
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "virtiofs", "gfs2", "ocfs2", "lustre")


@dataclass(frozen=True, slots=True, kw_only=True)
class Persistence:
    """`kept`: the bytes are where they were. `reason` says why or why not, to follow "it is kept|lost:"."""

    kept: bool
    reason: str
    memmap: str = ""
    """The word that the next command line lacks, where that is all that is wrong."""
    slow: bool = False
    """Kept, but read from a disk page by page when the guest runs again; and it has to be synced before the jump."""


_LOST = {
    Backing.ANONYMOUS: "anonymous memory ends with its process",
    Backing.MEMFD: "a memfd is RAM of this kernel and ends with the last process that has it open",
    Backing.TMPFS: "files on {filesystem} are RAM of this kernel",
    Backing.HUGETLB: "huge pages are RAM of this kernel",
    Backing.GUEST_MEMFD: "guest_memfd (confidential computing) ends with its process",
}


def persistence(storage: Storage, command_line: str) -> Persistence:
    """What becomes of it when a kernel with this command line is booted by kexec."""
    if storage.volatile:
        return Persistence(kept=False, reason=storage.volatile)
    words = _LOST.get(storage.kind)
    if words is not None:
        return Persistence(kept=False, reason=words.format(filesystem=storage.filesystem or "tmpfs"))
    if storage.kind not in (Backing.DEVDAX, Backing.FSDAX, Backing.DISK_FILE):
        return Persistence(kept=False, reason="what it is could not be told")
    if storage.pmem is not None:
        of_region = region_persistence(storage.pmem, command_line)
        if storage.kind is Backing.DISK_FILE and of_region.kept:
            return Persistence(kept=True, reason=f"{of_region.reason}; it is not mapped by DAX", slow=True)
        return of_region
    if storage.kind is not Backing.DISK_FILE:
        return Persistence(kept=False, reason="its DAX device belongs to no nvdimm region that could be found")
    if storage.filesystem in NETWORK:
        return Persistence(kept=True, reason=f"a file on {storage.filesystem}", slow=True)
    if not storage.disks:
        return Persistence(kept=False, reason=f"no disk was found below its file system ({storage.filesystem or '?'})")
    return Persistence(kept=True, reason=f"a file on a disk ({', '.join(storage.disks)})", slow=True)


def region_persistence(region: PmemRegion, command_line: str) -> Persistence:
    """As `persistence`, of a region of persistent memory.

    For `e820` the next kernel has to make the very same region: inside another one the namespace is not found, because
    its info block is looked for at the beginning of the region and has its size (drivers/nvdimm/pfn_devs.c
    nd_pfn_validate).
    """
    if region.provider in OUTLASTS:
        return Persistence(kept=True, reason=f"persistent memory described by {region.provider}")
    if region.provider != E820:
        return Persistence(kept=False, reason=f"nothing is known about persistent memory of {region.provider or '?'}")
    if region.start is None:
        return Persistence(kept=False, reason="where its region lies could not be read (root may)")
    word = kernelargs.memmap_word(region.start, region.size)
    ranges = kernelargs.persistent_ranges(command_line)
    if (region.start, region.size) in ranges:
        return Persistence(kept=True, reason=f"{word} is on the next kernel's command line")
    meeting = kernelargs.meeting(ranges, region.start, region.size)
    if not meeting:
        why = f"{word} is not on the next kernel's command line, which would use the memory for itself"
        return Persistence(kept=False, reason=why, memmap=word)
    there = ", ".join(kernelargs.memmap_word(s, n) for s, n in meeting)
    why = f"the next kernel's command line has {there} where {word} is needed: the device would not be found again"
    return Persistence(kept=False, reason=why, memmap=word)


def identity(storage: Storage) -> dict[str, str | int | None]:
    """What must be equal before and after a reboot for it to be the same memory; names and numbers of a boot are not.

    Device DAX is its region and namespace, a file its file system, inode and size (and the region, if it lies in one).
    """
    found: dict[str, str | int | None] = {"kind": str(storage.kind), "size": storage.size}
    if storage.kind is not Backing.DEVDAX:
        found |= {"fs_uuid": storage.fs_uuid, "inode": storage.inode}
    if storage.pmem is not None:
        region = storage.pmem
        found |= {"provider": region.provider, "start": region.start, "region_size": region.size}
        found |= {"namespace_uuid": region.namespace_uuid, "mode": region.mode}
    return found
