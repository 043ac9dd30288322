"""The guest's RAM: which memory backends there are, where each is mapped, and what its pages really are.

QMP says what was asked for (`Backend`), /proc what came of it: the mapping, and the descriptor that is this memory.
The two are joined by the host address that QEMU itself gives for a block where it does (`info ramblock`, QEMU >= 8.1),
else by path and inode. Where several mappings could be a block's and no answer tells them apart, none is taken: the
wrong RAM handed on would be worse than an update refused.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from cpr.linux.dax import is_device_dax
from cpr.linux.mounts import parse_mountinfo
from cpr.model import Backing, RamBlock
from cpr.qemu.answers import flag, number, numbers, text
from cpr.qemu.ram_addresses import addresses_by_probing, host_addresses

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from cpr.linux.fds import OpenDescriptor
    from cpr.linux.mounts import Mount
    from cpr.linux.proc import Mapping as MapsEntry
    from cpr.qemu.answers import Answers

PREFIX = "memory-backend-"
PROPERTIES = ("size", "share", "mem-path", "offset", "prealloc", "policy", "host-nodes", "discard-data", "hugetlb")
GUEST_MEMFD = "anon_inode:[kvm-gmem]"
DESCRIPTOR_PATH = re.compile(r"/(?:proc/self|dev)/fd/(\d+)")
SHARED_ANONYMOUS = "/dev/zero"
"""MAP_SHARED|MAP_ANONYMOUS is an unlinked tmpfs file of this name to the kernel (mm/shmem.c shmem_zero_setup)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A memory backend as QMP describes it; sizes and offsets in bytes."""

    id: str
    qom_type: str
    qom_path: str
    size: int
    share: bool
    path: str = ""
    offset: int = 0
    prealloc: bool = False
    policy: str = "default"
    host_nodes: tuple[int, ...] = ()
    discard_data: bool = False
    hugetlb: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What stat(2) says of a descriptor of the guest."""

    mode: int
    rdev: int
    block_size: int
    """st_blksize: on hugetlbfs (memfd included) the size of its pages."""


def backends(answers: Answers) -> tuple[Backend, ...]:
    """Every memory backend there is now, hot-plugged and default ones included."""
    found = []
    for name, kind in answers.children("/objects"):
        if kind.startswith(PREFIX):
            path = f"/objects/{name}"
            values = answers.properties(path, PROPERTIES)
            found.append(answers.sane("qom-get", partial(parse_backend, name, kind, path, values)))
    return tuple(found)


def parse_backend(name: str, kind: str, path: str, values: Mapping[str, Any]) -> Backend:
    return Backend(
        id=name,
        qom_type=kind,
        qom_path=path,
        size=number(values["size"]),
        share=flag(values.get("share", False)),
        path=text(values.get("mem-path") or ""),
        offset=number(values.get("offset", 0)),
        prealloc=flag(values.get("prealloc", False)),
        policy=text(values.get("policy", "default")),
        host_nodes=numbers(values.get("host-nodes", [])),
        discard_data=flag(values.get("discard-data", False)),
        hugetlb=flag(values.get("hugetlb", False)),
    )


# -- joining both sides


def locate(
    backend: Backend, maps: Sequence[MapsEntry], table: Collection[OpenDescriptor], address: int | None
) -> MapsEntry | None:
    """The mapping that is this backend's; None where there is none, or where more than one inode could be it."""
    if address is not None:
        return next((m for m in maps if m.start <= address < m.end), None)
    if backend.qom_type == f"{PREFIX}ram" and not backend.share:
        return None  # private anonymous memory: which mapping it is makes no difference
    named = [m for m in maps if _could_be(backend, m, table)]
    large = [m for m in named if _extent(m, maps) >= backend.size]
    identities = {(m.device, m.inode, m.offset) for m in large}
    return large[0] if len(identities) == 1 else None


def _extent(first: MapsEntry, maps: Sequence[MapsEntry]) -> int:
    """Length of the unbroken mapping of one file that begins at `first` (mprotect and NUMA policies split it)."""
    end, offset = first.end, first.offset + (first.end - first.start)
    for entry in maps:
        if entry.start == end and entry.offset == offset and entry.inode == first.inode:
            end, offset = entry.end, offset + (entry.end - entry.start)
    return end - first.start


def _could_be(backend: Backend, entry: MapsEntry, table: Collection[OpenDescriptor]) -> bool:
    if not entry.inode or not entry.perms.startswith("rw"):
        return False
    kind = backend.qom_type.removeprefix(PREFIX)
    if kind == "memfd":
        return entry.path == "/memfd:memory-backend-memfd" and entry.offset == 0
    if kind == "ram":
        return entry.path in (f"/memfd:{backend.id}", SHARED_ANONYMOUS) and entry.offset == 0
    if kind == "shm":
        return re.search(r"/qemu-\d+-shm-\d+$", entry.path) is not None and entry.offset == 0
    if entry.offset != backend.offset:
        return False
    by_number = DESCRIPTOR_PATH.fullmatch(backend.path)
    if by_number:
        return any(d.number == int(by_number[1]) and d.inode == entry.inode for d in table)
    if entry.path.startswith(os.path.join(backend.path, "qemu_back_mem.")):
        return f"qemu_back_mem.{backend.id.replace('/', '_')}." in entry.path  # mem-path is a directory
    return _same_path(entry.path, backend.path) or any(
        d.inode == entry.inode and _same_path(d.target.removesuffix(" (deleted)"), backend.path) for d in table
    )


def _same_path(resolved: str, given: str) -> bool:
    """A relative or linked mem-path stands resolved in maps."""
    return resolved in (given, os.path.realpath(given)) or (
        not given.startswith("/") and resolved.endswith("/" + os.path.normpath(given).removeprefix("./"))
    )


def descriptor_of(entry: MapsEntry, table: Collection[OpenDescriptor]) -> OpenDescriptor | None:
    """A descriptor of the mapped file that can be mapped writable again."""
    same = [d for d in table if d.inode == entry.inode and d.mode and (stat.S_ISREG(d.mode) or stat.S_ISCHR(d.mode))]
    by_device = [d for d in same if (os.major(d.device), os.minor(d.device)) == entry.device]
    by_name = [d for d in same if d.target.removesuffix(" (deleted)") == entry.path]
    writable = [d for d in by_device or by_name if d.flags & os.O_ACCMODE == os.O_RDWR]
    return min(writable, key=lambda d: d.number, default=None)


def ram_block(
    backend: Backend,
    entry: MapsEntry | None,
    descriptor: OpenDescriptor | None,
    opened: Opened | None,
    *,
    mounts: Sequence[Mount],
    guest_memfd: bool,
    in_argv: bool,
    dax: bool,
) -> RamBlock:
    """`opened` is what stat says of `descriptor`, `dax` whether its character device is device DAX."""
    shared = entry.perms.endswith("s") if entry is not None else backend.share and not guest_memfd
    backing = _backing(backend, entry, opened, mounts, dax)
    device = inode = 0
    if entry is not None and entry.inode:
        device = descriptor.device if descriptor is not None else os.makedev(*entry.device)
        inode = entry.inode
    return RamBlock(
        id=backend.id,
        size=backend.size,
        qom_type=backend.qom_type,
        backing=Backing.GUEST_MEMFD if guest_memfd else backing,
        shared=shared,
        named_file=backend.qom_type == f"{PREFIX}file",
        path=backend.path or (entry.path if entry is not None else ""),
        fd=descriptor.number if descriptor is not None else None,
        device=device,
        inode=inode,
        offset=entry.offset if entry is not None else backend.offset,
        page_size=opened.block_size if opened is not None and opened.block_size >= 1 << 20 else 4096,
        discard_data=backend.discard_data,
        prealloc=backend.prealloc,
        policy=backend.policy,
        host_nodes=backend.host_nodes,
        qom_path=backend.qom_path,
        in_argv=in_argv,
    )


def _backing(
    backend: Backend, entry: MapsEntry | None, opened: Opened | None, mounts: Sequence[Mount], dax: bool
) -> Backing:
    if entry is None:
        private = backend.qom_type == f"{PREFIX}ram" and not backend.share
        return Backing.ANONYMOUS if private else Backing.UNKNOWN
    if not entry.inode or (entry.path == SHARED_ANONYMOUS and entry.deleted):
        return Backing.ANONYMOUS
    if entry.path.startswith("/memfd:"):
        return Backing.MEMFD
    if opened is not None and stat.S_ISCHR(opened.mode):
        return Backing.DEVDAX if dax else Backing.UNKNOWN
    if entry.path.startswith("/dev/dax"):
        return Backing.DEVDAX if opened is None else Backing.UNKNOWN
    mount = next((m for m in mounts if m.device == entry.device), None)
    if mount is None:
        return Backing.UNKNOWN
    if mount.type in ("tmpfs", "devtmpfs", "ramfs"):
        return Backing.TMPFS
    if mount.type == "hugetlbfs":
        return Backing.HUGETLB
    return Backing.FSDAX if mount.options & {"dax", "dax=always"} else Backing.DISK_FILE


def ram_blocks(
    answers: Answers,
    maps: Sequence[MapsEntry],
    table: Collection[OpenDescriptor],
    *,
    pid: int,
    mountinfo: str,
    argv_ids: Collection[str] | None,
) -> tuple[RamBlock, ...]:
    """Every block of guest RAM. `argv_ids` are the backends that argv names (None: it could not be read)."""
    wanted = backends(answers)
    names = {b.id: (b.id, b.qom_path) for b in wanted}
    addresses = host_addresses(answers, names)
    located = {b.id: locate(b, maps, table, addresses.get(b.id)) for b in wanted}
    unsure = [b for b in wanted if located[b.id] is None and (b.share or b.qom_type != f"{PREFIX}ram")]
    if unsure and maps:
        addresses = addresses_by_probing(answers, {b.id: names[b.id] for b in unsure})
        located.update({b.id: locate(b, maps, table, addresses[b.id]) for b in unsure if b.id in addresses})
    default = default_backend(answers)
    mounts = parse_mountinfo(mountinfo)
    confidential = any(d.target == GUEST_MEMFD for d in table)
    blocks = []
    for backend in wanted:
        entry = located[backend.id]
        descriptor = descriptor_of(entry, table) if entry is not None and entry.inode else None
        opened = _opened(pid, descriptor.number) if descriptor is not None else None
        in_argv = argv_ids is None or backend.id in argv_ids or backend.id == default
        blocks.append(
            ram_block(
                backend,
                entry,
                descriptor,
                opened,
                mounts=mounts,
                guest_memfd=confidential,
                in_argv=in_argv,
                dax=opened is not None and stat.S_ISCHR(opened.mode) and is_device_dax(opened.rdev),
            )
        )
    return tuple(blocks)


def default_backend(answers: Answers) -> str:
    """Id of the backend that the machine's own RAM is; made by QEMU itself where argv names none (`-m` alone)."""
    return answers.qom_get("/machine", "memory-backend", text, "").rpartition("/")[2]


def _opened(pid: int, descriptor: int) -> Opened | None:
    try:
        status = os.stat(f"/proc/{pid}/fd/{descriptor}")
    except OSError:
        return None
    return Opened(mode=status.st_mode, rdev=status.st_rdev, block_size=status.st_blksize)

