"""RAM of a guest that is started after a boot (afresh.py): opened again where it lies, or made anew. Pure.

Made anew is what ended with the kernel, or its process, and is filled from the state: QEMU makes it as the command line
says, or maps a memory file that it is given, where it was given one before.

Out of scope: which RAM is gone (persistence.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cpr.model import Backing, NotHadAgain
from cpr.qemu import cmdline as cl
from cpr.qemu.memory import DESCRIPTOR_PATH

if TYPE_CHECKING:
    from collections.abc import Collection

    from cpr.model import Guest, RamBlock

NAMED = (Backing.TMPFS, Backing.HUGETLB, Backing.DISK_FILE, Backing.FSDAX, Backing.DEVDAX)
"""RAM that has a name by which it can be opened again."""
OF_KERNEL = (Backing.TMPFS, Backing.HUGETLB)
"""Of these the kernel's own RAM; their directories are gone with it."""
SMALL_PAGE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class NewMemory:
    """A memory file to be passed as descriptor `number`. `page`: 0, or the size of huge pages; all in bytes."""

    id: str
    number: int
    size: int
    page: int = 0


@dataclass(slots=True)
class RamFindings:
    """What comes to light; `said`: options whose descriptors need not be spoken of any more."""

    missing: list[NotHadAgain] = field(default_factory=list)
    said: set[int] = field(default_factory=set)
    memory: list[NewMemory] = field(default_factory=list)


def with_ram(
    line: cl.CommandLine, guest: Guest, anew: Collection[str], first: int, found: RamFindings
) -> cl.CommandLine:
    """`anew`: ids of blocks that are made anew; `first`: descriptor number of the first memory file for them."""
    known = {b.id: b for b in guest.ram}
    for backend in cl.memory_backends(line):
        block = known.get(backend.id)
        if block is None or not block.shared or not block.named_file:
            continue  # its pages end with the process: there is nothing to open again
        if block.id in anew and not DESCRIPTOR_PATH.fullmatch(block.path):
            continue  # its own words say where it is made
        if block.id in anew and is_memory_file(block):
            found.said.add(backend.index)
            number = first + len(found.memory)
            page = block.page_size if block.page_size > SMALL_PAGE else 0
            found.memory.append(NewMemory(id=block.id, number=number, size=block.offset + block.size, page=page))
            line = cl.with_memory_backend_fd(line, block.id, number)
            continue
        path = ram_path(block)
        if path:
            line = cl.with_memory_backend_file(line, block.id, path)
            continue
        found.said.add(backend.index)
        found.missing.append(
            NotHadAgain(
                block.id,
                f"this RAM ({block.backing}) has no name by which it could be opened again",
                "give it a file of its own at its next start: -object memory-backend-file,share=on,mem-path=...",
            )
        )
    return line


def is_memory_file(block: RamBlock) -> bool:
    """RAM that QEMU was given as a descriptor, and that has no name (any more)."""
    gone = block.storage is not None and bool(block.storage.volatile)
    return DESCRIPTOR_PATH.fullmatch(block.path) is not None and (gone or not ram_path(block))


def ram_path(block: RamBlock) -> str:
    """Where a RAM block is opened again, as the guest's process names it; "" where it has no name."""
    if block.storage is not None:
        named = block.storage.kind in NAMED and block.storage.path.startswith("/")
        return block.storage.path if named else ""
    known = block.backing in NAMED and block.path.startswith("/") and not DESCRIPTOR_PATH.fullmatch(block.path)
    return block.path if known else ""


def files_made(guest: Guest, anew: Collection[str]) -> list[str]:
    """Paths of the kernel's RAM at which QEMU makes a file, in directories that may be gone."""
    ram = [b.storage for b in guest.ram if b.id in anew and b.storage is not None]
    return [storage.path for storage in ram if storage.kind in OF_KERNEL]
