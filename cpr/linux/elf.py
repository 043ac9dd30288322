"""What an ELF program says of itself: for which machine, by which loader, which build.

Only the program headers are read: a stripped program has no more. A file may claim anything, so every offset and size
is bounded.

Out of scope: symbols, sections and what the program does.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from cpr.linux.fds import Fd

ET_EXEC = 2
ET_DYN = 3
PT_INTERP = 3
PT_NOTE = 4
NT_GNU_BUILD_ID = 3
PN_XNUM = 0xFFFF

EM_NAMES = {
    2: "SPARC", 3: "386", 8: "MIPS", 20: "PPC", 21: "PPC64", 22: "S390", 40: "ARM", 43: "SPARCV9", 62: "X86_64",
    183: "AARCH64", 243: "RISCV", 258: "LOONGARCH",
}  # fmt: skip
"""Machines that QEMU runs on (include/uapi/linux/elf-em.h)."""

_MAX_HEADERS = 512
_MAX_INTERPRETER = 4096
_MAX_NOTES = 1 << 20


class NotElf(ValueError):
    """The file is no ELF program, or cut short; the message says what it is instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ElfFacts:
    """`machine` is e_machine (EM_X86_64 is 62), `type` e_type (ET_EXEC 2, ET_DYN 3), `bits` 32 or 64."""

    bits: int
    little_endian: bool
    machine: int
    type: int
    interpreter: str | None
    """The dynamic loader; None of a static program."""
    build_id: str | None
    """NT_GNU_BUILD_ID as hex."""

    @property
    def machine_name(self) -> str:
        """E.g. 'X86_64'; the number where we have no name."""
        return EM_NAMES.get(self.machine, str(self.machine))

    @property
    def program(self) -> bool:
        """Whether the kernel would run it: neither an object file nor a core."""
        return self.type in (ET_EXEC, ET_DYN)


def elf_facts(file: str | int | Fd) -> ElfFacts:
    """Read them from a path or an open descriptor, whose offset is left alone.

    Raises:
        NotElf; OSError where it cannot be read (IsADirectoryError for a directory).
    """
    if isinstance(file, str):
        with Fd(os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)) as opened:
            return _facts(opened.number)
    return _facts(file.number if isinstance(file, Fd) else file)


def host_machine() -> int:
    """e_machine of this host's own programs, by the program that we are."""
    return elf_facts("/proc/self/exe").machine


def _facts(fd: int) -> ElfFacts:
    ident = os.pread(fd, 64, 0)
    if not ident.startswith(b"\x7fELF"):
        raise NotElf(_what_it_is(ident))
    if len(ident) < 20 or ident[4] not in (1, 2) or ident[5] not in (1, 2):
        raise NotElf("an ELF file that is cut short or damaged")
    wide, little = ident[4] == 2, ident[5] == 1
    order = "<" if little else ">"
    layout = struct.Struct(order + ("HHIQQQIHHH" if wide else "HHIIIIIHHH"))
    if len(ident) < 16 + layout.size:
        raise NotElf("an ELF file that is cut short")
    kind, machine, _, _, offset, _, _, _, entry_size, count = layout.unpack_from(ident, 16)
    interpreter, build_id = None, None
    for header_kind, start, size in _headers(fd, order, wide, offset, entry_size, count):
        if header_kind == PT_INTERP and interpreter is None:
            data = _segment(fd, start, size, _MAX_INTERPRETER)
            interpreter = os.fsdecode(data.split(b"\0")[0])
        elif header_kind == PT_NOTE and build_id is None:
            build_id = _build_id(_segment(fd, start, size, _MAX_NOTES), order)
    return ElfFacts(
        bits=64 if wide else 32,
        little_endian=little,
        machine=machine,
        type=kind,
        interpreter=interpreter,
        build_id=build_id,
    )


def _headers(
    fd: int, order: str, wide: bool, offset: int, entry_size: int, count: int
) -> list[tuple[int, int, int]]:
    """(type, file offset, size in the file) of the program headers."""
    layout = struct.Struct(order + ("IIQQQQQQ" if wide else "IIIIIIII"))
    if count == 0 or offset == 0:
        return []
    if entry_size != layout.size or count > _MAX_HEADERS:
        raise NotElf("an ELF file with damaged program headers")
    data = _segment(fd, offset, layout.size * count, layout.size * count)
    rows = layout.iter_unpack(data)
    return [(r[0], r[2], r[5]) if wide else (r[0], r[1], r[4]) for r in rows]


def _segment(fd: int, offset: int, size: int, at_most: int) -> bytes:
    size = min(size, at_most)
    try:
        data = os.pread(fd, size, offset)
    except (OverflowError, OSError):
        data = b""
    if len(data) < size:
        raise NotElf("an ELF file that is cut short")
    return data


def _build_id(notes: bytes, order: str) -> str | None:
    head = struct.Struct(order + "III")
    offset = 0
    while offset + head.size <= len(notes):
        name_size, size, kind = head.unpack_from(notes, offset)
        name = offset + head.size
        content = name + ((name_size + 3) & ~3)
        if kind == NT_GNU_BUILD_ID and notes[name : name + name_size] == b"GNU\0":
            return notes[content : content + size].hex() or None
        offset = content + ((size + 3) & ~3)
    return None


def _what_it_is(start: bytes) -> str:
    if not start:
        return "an empty file"
    if start.startswith(b"#!"):
        interpreter = start[2:].split(b"\n")[0].decode(errors="replace").strip()
        return f"a script for {interpreter}, not an ELF program"
    if b"\0" not in start and all(b >= 32 or b in b"\t\r\n\f\v\x1b" for b in start):
        return "a text file, not an ELF program"
    return "not an ELF program"
