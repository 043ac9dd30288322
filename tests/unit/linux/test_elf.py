"""ELF facts of real programs, of made ones, and of files that are none."""

from __future__ import annotations

import os
import struct
import sys
from typing import TYPE_CHECKING

import pytest

from cpr.linux.elf import ElfFacts, NotElf, elf_facts, host_machine
from cpr.linux.fds import Fd

if TYPE_CHECKING:
    from pathlib import Path


def elf(
    *,
    wide: bool = True,
    little: bool = True,
    machine: int = 183,
    headers: list[tuple[int, bytes]] | None = None,
) -> bytes:
    order = "<" if little else ">"
    headers = [(3, b"/lib/ld.so\0"), (4, note(order))] if headers is None else headers
    head, entry = (64, 56) if wide else (52, 32)
    offset = head + entry * len(headers)
    table, contents = b"", b""
    for kind, content in headers:
        if wide:
            table += struct.pack(order + "IIQQQQQQ", kind, 4, offset, 0, 0, len(content), len(content), 4)
        else:
            table += struct.pack(order + "IIIIIIII", kind, offset, 0, 0, len(content), len(content), 4, 4)
        contents += content
        offset += len(content)
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1 if little else 2, 1]) + bytes(9)
    layout = "HHIQQQIHHHHHH" if wide else "HHIIIIIHHHHHH"
    ident += struct.pack(order + layout, 3, machine, 1, 0, head, 0, 0, head, entry, len(headers), 0, 0, 0)
    return ident + table + contents


def note(order: str = "<") -> bytes:
    other = struct.pack(order + "III", 4, 8, 5) + b"GNU\0" + bytes(8)
    return other + struct.pack(order + "III", 4, 5, 3) + b"GNU\0" + b"\xde\xad\xbe\xef\x01\0\0\0"


def facts(data: bytes) -> ElfFacts:
    with Fd(os.memfd_create("elf")) as fd:
        os.write(fd.number, data)
        return elf_facts(fd)


def test_this_python() -> None:
    found = elf_facts(os.path.realpath(sys.executable))
    assert found.machine == host_machine()
    assert found.program
    assert found.bits == struct.calcsize("P") * 8


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("little", [True, False])
def test_made_programs(wide: bool, little: bool) -> None:
    found = facts(elf(wide=wide, little=little))
    assert found == ElfFacts(
        bits=64 if wide else 32, little_endian=little, machine=183, type=3, interpreter="/lib/ld.so",
        build_id="deadbeef01",
    )  # fmt: skip
    assert found.machine_name == "AARCH64"


def test_static_program_without_notes() -> None:
    found = facts(elf(headers=[]))
    assert (found.interpreter, found.build_id) == (None, None)
    assert facts(elf(machine=9999)).machine_name == "9999"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an empty file"),
        (b"#!/bin/sh -e\nexec qemu\n", "a script for /bin/sh -e"),
        (b"hello\n", "a text file"),
        (b"\x00\x01\x02", "not an ELF program"),
        (b"\x7fELF", "cut short"),
        (b"\x7fELF\x02\x01\x01" + bytes(30), "cut short"),
        (b"\x7fELF\x09\x01\x01" + bytes(60), "damaged"),
        (elf()[:100], "cut short"),
        (elf()[:-3], "cut short"),
    ],
)
def test_what_is_none(data: bytes, message: str) -> None:
    with pytest.raises(NotElf, match=message):
        facts(data)


def test_every_cut_and_hostile_numbers() -> None:
    """Whatever it claims, there is an answer or NotElf, at once."""
    whole = elf()
    for length in range(len(whole)):
        with pytest.raises(NotElf):
            facts(whole[:length])
    for position in range(4, len(whole)):
        for value in (0x00, 0x7F, 0xFF):
            try:
                facts(whole[:position] + bytes([value]) + whole[position + 1 :])
            except NotElf:
                pass


def test_directory_and_absent(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        elf_facts(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        elf_facts(str(tmp_path / "absent"))
