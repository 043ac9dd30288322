"""Whether this kernel keeps private memory over an exec: MADV_DOEXEC.

Oracle's kernels have it as advice 201; upstream never took it. The numbers of the first proposal, 22 and 23, are
MADV_POPULATE_READ and MADV_POPULATE_WRITE upstream (5.14), which answer 0 as well and touch memory: they are never
tried. Nor does a 0 from any other number prove anything: it is believed after a child has marked a page, has executed a
program, and that program has shown the mark.

In the patches a program only gets such memory if it has a note in its ELF file (type 0x07c1feed, "preserved-mem-ok";
"madvise MADV_DOEXEC", July 2020), so the program that shows it is one of our own making, of a few instructions. On an
architecture for which we have none the answer is False.

Out of scope: using it.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

MADV_DOEXEC = 201
NEVER_TRIED = frozenset({22, 23})
"""MADV_POPULATE_READ, MADV_POPULATE_WRITE."""

SECONDS = 10.0
"""Longest that the proof may take; afterwards the answer is no."""

MARK_BYTES = 16
_AT = 0x10_0000_0000
"""Where the program is mapped: away from where the kernel puts mappings of its own choice."""
_EM_X86_64 = 62
_NOTE = struct.pack("<III20s", 17, 0, 0x07C1FEED, b"preserved-mem-ok")

_CHILD = """
import sys
sys.path[:0] = {path!r}
from cpr.linux import madvise
madvise.mark_and_exec({mark!r}, {advice})
"""


@functools.cache
def keeps_memory_over_exec() -> bool:
    """Whether MADV_DOEXEC is there and works. One system call on a kernel without it; asked once a process."""
    return works()


def works(
    advice: int = MADV_DOEXEC,
    *,
    answers: Callable[[int], bool] | None = None,
    proof: Callable[[int], bool] | None = None,
) -> bool:
    """As `keeps_memory_over_exec`; `answers` and `proof` stand for `answers_zero` and `survives_exec`.

    Raises:
        ValueError: `advice` is one that means something else today.
    """
    if advice in NEVER_TRIED:
        raise ValueError(f"advice {advice} populates memory")
    return (answers or answers_zero)(advice) and (proof or survives_exec)(advice)


def answers_zero(advice: int) -> bool:
    """madvise(2) of a page of our own, private and anonymous."""
    with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        try:
            page.madvise(advice)
        except OSError:
            return False
    return True


def survives_exec(advice: int) -> bool:
    """Whether a page that a child has marked and advised is still there when it has executed another program."""
    if os.uname().machine != "x86_64":
        return False
    mark = os.urandom(MARK_BYTES)
    code = _CHILD.format(path=[p for p in sys.path if p], mark=mark, advice=int(advice))
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return child.stdout == mark


def mark_and_exec(mark: bytes, advice: int) -> None:
    """In the child: mark a page, advise it, and become the program that shows what is there. Does not return.

    Raises:
        OSError: the kernel does not know the advice, or the program could not be executed.
    """
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page[: len(mark)] = mark
    page.madvise(advice)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    with os.fdopen(os.memfd_create("shower", os.MFD_CLOEXEC), "wb") as file:
        file.write(shower(address))
        file.flush()
        program = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
    os.execve(program, ["shower"], {})  # not while it is open for writing: ETXTBSY


def shower(address: int) -> bytes:
    """An ELF program for x86-64 that has the note, writes `MARK_BYTES` bytes from `address` to its standard output, and
    ends. Where nothing is mapped there write(2) says EFAULT, and nothing comes out."""
    code = (
        *(b"\xb8", struct.pack("<I", 1)),  # mov eax, 1: write
        *(b"\xbf", struct.pack("<I", 1)),  # mov edi, 1
        *(b"\x48\xbe", struct.pack("<Q", address)),  # movabs rsi, address
        *(b"\xba", struct.pack("<I", MARK_BYTES)),  # mov edx, MARK_BYTES
        b"\x0f\x05",  # syscall
        *(b"\xb8", struct.pack("<I", 60)),  # mov eax, 60: exit
        b"\x31\xff",  # xor edi, edi
        b"\x0f\x05",  # syscall
    )
    note = 64 + 3 * 56
    begin = note + len(_NOTE)
    size = begin + len(b"".join(code))
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 2, _EM_X86_64, 1, _AT + begin, 64, 0, 0, 64, 56, 3, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, _AT, _AT, size, size, 0x1000)
    notes = struct.pack("<IIQQQQQQ", 4, 4, note, _AT + note, _AT + note, len(_NOTE), len(_NOTE), 4)
    stack = struct.pack("<IIQQQQQQ", 0x6474E551, 6, 0, 0, 0, 0, 0, 16)  # PT_GNU_STACK: not executable
    return b"".join([ident, header, load, notes, stack, _NOTE, *code])
