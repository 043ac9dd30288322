"""The little code by which a thread of another process makes system calls for us, and where it can stand.

    syscall                      the thread's registers are set so that it runs this, and stops when it is done
    rt_sigprocmask, registers    from here on only if we died: everything as it was, and back to where it was

It stands in the room behind the text of a program or library: bytes between the end of the segment and the end of its
last page, which are zero, belong to nothing and are executable already. So no byte of code is ever overwritten, the
first call is as safe as all others, no memory has to be made executable (SELinux's execmem), and the stack is not
touched. The page becomes a private copy of the process, as with a debugger's breakpoint. The stub of a tracer that was
killed stays; the next one knows it again and takes its place.

What differs by architecture is in one table.

Out of scope: stopping threads and setting registers (ptrace.py, tracee.py).
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpr.linux import procfile
from cpr.linux.maps import read_maps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from cpr.linux import maps

PAGE = os.sysconf("SC_PAGE_SIZE")
ALIGNMENT = 64
SIZE = 256
"""Bytes that a stub may have."""
WITNESS = 64
"""Bytes of code before the room that must be what they were when it was found."""

PT_LOAD = 1
PF_X = 1
SIG_SETMASK = 2

ERESTARTSYS = 512
ERESTARTNOINTR = 513
ERESTARTNOHAND = 514
ERESTART_RESTARTBLOCK = 516
RESTARTS = frozenset({ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK})
"""What the kernel has as the result of an interrupted call before it decides how it goes on (include/linux/errno.h)."""

_ITS_OWN = ("execve", "execveat", "rt_sigprocmask")
_WORD = 2**64
_NEVER_UNMAPPED = re.compile(r"/(libc[.-][^/]*so[^/]*|ld-[^/]*so[^/]*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How a kind of machine makes system calls, in the names of its struct user_regs_struct."""

    machine: str
    """uname -m."""
    elf_machine: int
    instruction: bytes
    """The system call instruction: the kernel steps back by its length to restart a call."""
    pc: str
    stack: str
    number: str
    result: str
    origin: str
    """The number of the call that a thread is in; negative where it is in none. Set to -1, nothing is restarted."""
    arguments: tuple[str, ...]
    registers: tuple[str, ...]
    """Those that a stub restores."""
    numbers: Mapping[str, int]
    endless: Mapping[str, str]
    """Calls that say EINTR when they are only stopped, and the register of their timeout: negative is for ever."""
    code: Callable[[Mapping[str, int], int], bytes]
    """The stub that restores these registers and this signal mask."""


_X86_64_REGISTERS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
"""In the order of their numbers in instructions."""


def _x86_64_code(registers: Mapping[str, int], mask: int) -> bytes:
    loads = b"".join(
        struct.pack("<BBQ", 0x48 | i >> 3, 0xB8 | i & 7, registers[name])  # movabs: no flag changes
        for i, name in enumerate(_X86_64_REGISTERS)
        if name != "rsp"
    )
    jump = struct.pack("<2sIQ", b"\xff\x25", 0, registers["rip"])  # jmp *0(%rip)
    behind = struct.pack("<BIBI2sI2s", 0xBA, 0, 0xB8, 14, b"\x41\xba", 8, b"\x0f\x05")  # edx, eax, r10d; syscall
    mask_at = len(behind) + len(loads) + len(jump)
    set_mask = struct.pack("<BI3si", 0xBF, SIG_SETMASK, b"\x48\x8d\x35", mask_at) + behind  # edi; lea mask(%rip), %rsi
    return b"\x0f\x05" + set_mask + loads + jump + struct.pack("<Q", mask)


X86_64 = Architecture(
    machine="x86_64",
    elf_machine=62,
    instruction=b"\x0f\x05",
    pc="rip",
    stack="rsp",
    number="rax",
    result="rax",
    origin="orig_rax",
    arguments=("rdi", "rsi", "rdx", "r10", "r8", "r9"),
    registers=_X86_64_REGISTERS,
    numbers={
        "read": 0, "write": 1, "close": 3, "mmap": 9, "mprotect": 10, "munmap": 11, "rt_sigprocmask": 14, "ioctl": 16,
        "dup": 32, "getpid": 39, "socket": 41, "sendmsg": 46, "recvmsg": 47, "bind": 49, "socketpair": 53, "execve": 59,
        "wait4": 61, "fcntl": 72, "prctl": 157, "gettid": 186, "restart_syscall": 219, "epoll_wait": 232,
        "openat": 257, "epoll_pwait": 281, "accept4": 288, "dup3": 292, "kcmp": 312, "memfd_create": 319,
        "userfaultfd": 323,
        "execveat": 322, "pidfd_open": 434, "pidfd_getfd": 438,
    },
    endless={"epoll_wait": "r10", "epoll_pwait": "r10"},
    code=_x86_64_code,
)  # fmt: skip


ARCHITECTURES = {a.machine: a for a in (X86_64,)}


def is_stub(data: bytes) -> bool:
    """Whether it is a stub of this host's architecture, or a part of one; whatever it restores."""
    arch = architecture()
    if arch is None:
        return False
    names = {arch.pc, *arch.registers}
    low, high = (arch.code(dict.fromkeys(names, word), word).ljust(SIZE, b"\0") for word in (0, _WORD - 1))
    return all(found in (0, a) or a != b for found, a, b in zip(data, low, high, strict=True))


def architecture() -> Architecture | None:
    """That of this host, where we know it."""
    return ARCHITECTURES.get(os.uname().machine)


def signed(word: int) -> int:
    """A register's value as a number that may be negative."""
    return word - _WORD if word >= _WORD // 2 else word


def unsigned(number: int) -> int:
    return number % _WORD


def awaits_restart(arch: Architecture, registers: Mapping[str, int]) -> bool:
    """Whether the thread was interrupted in a system call that the kernel is going to restart."""
    return signed(registers[arch.origin]) >= 0 and -signed(registers[arch.result]) in RESTARTS


def waits_endlessly(arch: Architecture, registers: Mapping[str, int]) -> bool:
    """Whether it was in a call without timeout that says EINTR because we stopped it (signal(7): epoll_wait)."""
    if signed(registers[arch.result]) != -4 or signed(registers[arch.origin]) < 0:
        return False
    return any(
        registers[arch.origin] == arch.numbers[name] and registers[timeout] & 0x80000000
        for name, timeout in arch.endless.items()
    )


def restarted(arch: Architecture, registers: Mapping[str, int]) -> dict[str, int]:
    """The registers with which the thread goes on by itself, as the kernel sets them where no signal is handled."""
    values = dict(registers)
    if awaits_restart(arch, registers):
        block = -signed(registers[arch.result]) == ERESTART_RESTARTBLOCK
        values[arch.number] = arch.numbers["restart_syscall"] if block else registers[arch.origin]
        values[arch.pc] = registers[arch.pc] - len(arch.instruction)
    return values


def may_execute(pid: int, thread: int) -> bool:
    """Whether a thread that was let go in the stub may still execute a program: not if it waits in another call.

    One that has ended may have become the first thread, as whoever executes a program does. Who is not permitted to
    ask does not know (proc_pid_syscall).
    """
    arch = architecture()
    try:
        word = procfile.read_text(pid, f"task/{thread}/syscall").split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return thread == pid or may_execute(pid, pid)
    except PermissionError:
        return True
    return arch is None or not word.isdecimal() or int(word) in {arch.numbers[name] for name in _ITS_OWN}


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Unused executable bytes of a process, at `address`; `before` is the code that ends there."""

    address: int
    size: int
    before: bytes
    path: str

    def holds(self, memory: int) -> bytes | None:
        """What stands in it, by /proc/PID/mem opened as `memory`: nothing (zeros), or the stub of a tracer that was
        killed. None: the room is not there any more, or somebody else uses it."""
        try:
            data = os.pread(memory, WITNESS + self.size, self.address - WITNESS)
        except OSError:
            return None
        before, inside = data[:WITNESS], data[WITNESS:]
        if before != self.before or len(inside) != self.size:
            return None
        return inside if not any(inside) or is_stub(inside) else None

    def covers(self, pc: int) -> bool:
        return self.address <= pc < self.address + self.size


def find_room(pid: int) -> Room | None:
    """Room for a stub, before all in what is never unmapped: libc, the loader, the program itself. None: there is none.

    Takes milliseconds in a process with many mappings: do it before the process is stopped.

    Raises:
        ProcessLookupError, PermissionError.
    """
    mappings = read_maps(pid)
    try:
        program = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
    except FileNotFoundError:  # it has ended, and nobody has reaped it yet
        raise procfile.gone(pid) from None
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        code = [m for m in mappings if m.perms == "r-xp" and m.inode]
        code.sort(key=lambda m: m.path != program and not _NEVER_UNMAPPED.search(m.path))
        for mapping in code:
            room = _room_in(mapping, mappings, memory)
            if room is not None and room.holds(memory) is not None:
                return room
    finally:
        os.close(memory)
    return None


def _room_in(mapping: maps.Mapping, mappings: Iterable[maps.Mapping], memory: int) -> Room | None:
    file = mapping.device, mapping.inode
    heads = [m for m in mappings if m.offset == 0 and m.start <= mapping.start and (m.device, m.inode) == file]
    if not heads:
        return None
    head = heads[-1]
    try:
        headers = _program_headers(os.pread(memory, min(head.size, PAGE), head.start))
    except OSError:
        return None
    for kind, flags, offset, file_size, memory_size in headers:
        first = offset & -PAGE
        if kind != PT_LOAD or not flags & PF_X or first != mapping.offset or file_size != memory_size:
            continue
        end = mapping.start + offset - first + file_size
        address = (end + ALIGNMENT - 1) & -ALIGNMENT
        if mapping.start + WITNESS <= address and mapping.end - PAGE < end and address + SIZE <= mapping.end:
            before = os.pread(memory, WITNESS, address - WITNESS)
            return Room(address=address, size=SIZE, before=before, path=mapping.path)
    return None


def _program_headers(data: bytes) -> list[tuple[int, int, int, int, int]]:
    """(type, flags, offset, size in the file, size in memory) of the program headers of a 64-bit ELF file."""
    if len(data) < 64 or not data.startswith(b"\x7fELF\x02\x01"):
        return []
    offset, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
    layout = struct.Struct("<IIQQQQQQ")
    if size != layout.size or offset + size * count > len(data):
        return []
    rows = (layout.unpack_from(data, offset + size * i) for i in range(count))
    return [(row[0], row[1], row[2], row[5], row[6]) for row in rows]
