"""Foreign dynamic programs made ordinary ones of this machine.

A program of another suite, with its own C library beside it, is given that library's loader as its
interpreter, so that it starts like any other and /proc/PID/exe is the program and not the loader.

Out of scope: static programs, other architectures, finding the packages.
"""

import re
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path

from tests.lab import LabError, debian, tools

LOADER = "ld-linux-x86-64.so.2"
PT_NOTE = 4
NT_GNU_BUILD_ID = 3


def parse_loader_list(text: str) -> dict[str, Path]:
    """What ``ld.so --list`` says: soname -> file.  Raises LabError if one was not found."""
    found = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"\s*(\S+) => (.+?)(?: \(0x[0-9a-f]+\))?\s*", line):
            if match[2] == "not found":
                raise LabError(f"the packages lack the library {match[1]}")
            found[match[1]] = Path(match[2])
    return found


def copy_libraries(tree: Path, programs: Iterable[Path], into: Path) -> None:
    """Copy to `into` the loader and all libraries that `programs`, unpacked in `tree`, are linked with."""
    libraries = tree / "usr" / "lib" / "x86_64-linux-gnu"
    into.mkdir(parents=True, exist_ok=True)
    shutil.copy(libraries / LOADER, into / LOADER)
    # pthread_exit and pthread_cancel load libgcc_s by name when they are first used
    needed = {"libgcc_s.so.1": libraries / "libgcc_s.so.1"}
    for program in programs:
        loader = [str(libraries / LOADER), "--library-path", str(libraries), "--list", str(program)]
        needed |= parse_loader_list(debian.run(loader))
    for soname, file in needed.items():
        if soname != LOADER and not (into / soname).exists():
            shutil.copy(file, into / soname)


def make_runnable(program: Path, libraries: Path) -> None:
    """Have `program` started by the loader and use the libraries that will be in `libraries`.

    DT_RPATH (not DT_RUNPATH) because it also holds for what the libraries and dlopen'ed modules need.
    """
    interpreter = ("--set-interpreter", str(libraries / LOADER))
    rpath = ("--force-rpath", "--set-rpath", str(libraries))
    debian.run([*tools.command("patchelf"), *interpreter, *rpath, str(program)])


def build_id(program: Path) -> str:
    """The GNU build id of an ELF64 file, in hexadecimal; empty if it has none."""
    data = program.read_bytes()
    if data[:5] != b"\x7fELF\x02":
        raise ValueError(f"{program} is not an ELF64 file")
    (table,) = struct.unpack_from("<Q", data, 32)
    entry_size, count = struct.unpack_from("<HH", data, 54)
    for index in range(count):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", data, table + index * entry_size)
        end = offset + length
        while kind == PT_NOTE and offset + 12 <= end:
            name_size, size, note = struct.unpack_from("<III", data, offset)
            start = offset + 12 + (name_size + 3) // 4 * 4
            if note == NT_GNU_BUILD_ID and data[offset + 12 : offset + 16] == b"GNU\0":
                return data[start : start + size].hex()
            offset = start + (size + 3) // 4 * 4
    return ""
