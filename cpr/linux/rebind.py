"""A program that opens a listener anew gets the one that was there: no queue is lost, and nobody is refused.

    socket(AF_INET, ...)         a new one
    bind(it, 0.0.0.0:5700)       instead:  recvmsg(from us)     the listener, which we have kept meanwhile
                                           dup3(the listener, it)
    listen(it, ...)              changes the length of the queue
    getsockname(it)              says what the program expects

The process itself has the listener no more when it executes the program, so that whoever dies then, the program can
bind the address: as soon as all are gone who keep the listener.

Out of scope: UNIX sockets, whose path a program removes before it binds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from typing import TYPE_CHECKING, Self

from cpr.linux import fds, ptrace, stub

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cpr.linux.process import Process
    from cpr.linux.tracee import Tracee

Address = tuple[int, str, int]
"""Family (AF_INET or AF_INET6), numerical host, port."""

CALL_SECONDS = 1.0
_SCRATCH = 1024
"""Bytes below the stack pointer from which on ours begin: beyond the red zone, and a caller of bind needs none."""
_MSG_CMSG_CLOEXEC = 0x40000000
_IOVEC, _MSGHDR, _CMSGHDR = struct.Struct("=QQ"), struct.Struct("=QI4xQQQQi4x"), struct.Struct("=Qiii4x")


def address_of(listener: socket.socket) -> Address | None:
    """Where it listens; None where that is no address of TCP over IP. Raises OSError."""
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    host, port, *_ = listener.getsockname()
    return listener.family, host, port


def parse_address(data: bytes) -> Address | None:
    """A struct sockaddr_in or sockaddr_in6; None where it is another one, or cut."""
    try:
        (family,) = struct.unpack_from("=H", data)
        if family == socket.AF_INET:
            port, host = struct.unpack_from("!2xH4s", data)
        elif family == socket.AF_INET6:
            port, host = struct.unpack_from("!2xH4x16s", data)
        else:
            return None
    except struct.error:
        return None
    return family, socket.inet_ntop(family, host), port


class Doors:
    """Listeners that we keep for a process, by address, and a socket by which it can be given them."""

    def __init__(self, ours: socket.socket, theirs: int) -> None:
        self.ours = ours
        self.theirs = theirs
        """Number in the process; it survives an exec."""
        self.kept: dict[Address, fds.Fd] = {}

    @classmethod
    def take(cls, tracee: Tracee, process: Process, numbers: Iterable[int]) -> Self:
        """Duplicate a stopped process's listeners; those at no address of ours are passed over. Raises OSError."""
        pair = tracee.scratch(8)
        tracee.call("socketpair", socket.AF_UNIX, socket.SOCK_STREAM, 0, pair)
        ours, theirs = struct.unpack("=ii", tracee.read(pair, 8))
        with fds.take_fd(process.pidfd, ours) as taken:
            doors = cls(socket.socket(fileno=os.dup(taken.number)), theirs)
        tracee.call("close", ours)
        for number in numbers:
            fd = fds.take_fd(process.pidfd, number)
            with socket.socket(fileno=os.dup(fd.number)) as listener:
                address = address_of(listener)
            if address is None:
                fd.close()
            else:
                doors.kept[address] = fd
        return doors

    def send(self, listener: fds.Fd) -> None:
        """Have it wait for the process. Raises OSError."""
        socket.send_fds(self.ours, [b"x"], [listener.number])

    def close(self) -> None:
        self.ours.close()
        while self.kept:
            self.kept.popitem()[1].close()


class Rebinding:
    """What is still to be bound in a traced thread; `at_syscall` at each of its stops at a system call."""

    def __init__(self, pid: int, doors: Doors | None) -> None:
        self._pid = pid
        arch = stub.architecture()
        self._doors = doors if arch is not None else None
        self._arch = arch

    @property
    def left(self) -> bool:
        """Whether its calls are of interest yet."""
        return self._doors is not None and bool(self._doors.kept)

    def at_syscall(self) -> None:
        """It stands before or behind a call. Raises OSError (ESRCH where it is gone), TimeoutError."""
        arch, doors = self._arch, self._doors
        assert arch is not None
        assert doors is not None
        values = ptrace.registers(self._pid)
        before = stub.signed(getattr(values, arch.result)) == -errno.ENOSYS
        if not before or getattr(values, arch.origin) != arch.numbers["bind"]:
            return
        number, where, size = (getattr(values, name) for name in arch.arguments[:3])
        address = parse_address(self._read(where, min(size, 128)))
        listener = doors.kept.pop(address, None) if address is not None else None
        if listener is None:
            return
        with listener:
            result = self._instead(values, doors, listener, number)
        setattr(values, arch.result, stub.unsigned(result))
        setattr(values, arch.origin, stub.unsigned(-1))
        ptrace.set_registers(self._pid, values)

    def _instead(self, before: ptrace.Registers, doors: Doors, listener: fds.Fd, number: int) -> int:
        """Put the listener under this number; what bind is to say. All signals wait meanwhile."""
        arch = self._arch
        assert arch is not None
        mask = ptrace.signal_mask(self._pid)
        ptrace.set_signal_mask(self._pid, ptrace.ALL_SIGNALS)
        try:
            values = ptrace.copy_registers(before)
            setattr(values, arch.origin, arch.numbers["getpid"])
            ptrace.set_registers(self._pid, values)
            self._to_syscall()
            doors.send(listener)
            base = (getattr(before, arch.stack) - _SCRATCH) & -16
            control = base + _IOVEC.size + 16
            head = control + _CMSGHDR.size
            data = _IOVEC.pack(base + _IOVEC.size, 1) + bytes(16 + _CMSGHDR.size)
            data += _MSGHDR.pack(0, 0, base, 1, control, _CMSGHDR.size, 0)
            ptrace.poke(self._pid, base, data)
            got = self._call(before, "recvmsg", doors.theirs, head, _MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
            if got != 1:
                return min(got, -errno.EADDRINUSE)
            *_, there = _CMSGHDR.unpack(self._read(control, _CMSGHDR.size))
            put = self._call(before, "dup3", there, number, os.O_CLOEXEC)
            self._call(before, "close", there)
            if not doors.kept:
                self._call(before, "close", doors.theirs)
            return min(put, 0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                ptrace.set_signal_mask(self._pid, mask)

    def _call(self, before: ptrace.Registers, name: str, *words: int) -> int:
        """Make another call where the thread made its own; its result, negative for an error."""
        arch = self._arch
        assert arch is not None
        values = ptrace.copy_registers(before)
        setattr(values, arch.pc, getattr(before, arch.pc) - len(arch.instruction))
        setattr(values, arch.number, arch.numbers[name])
        setattr(values, arch.origin, stub.unsigned(-1))
        for register, word in zip(arch.arguments, words, strict=False):
            setattr(values, register, stub.unsigned(word))
        ptrace.set_registers(self._pid, values)
        self._to_syscall()
        self._to_syscall()
        return stub.signed(getattr(ptrace.registers(self._pid), arch.result))

    def _to_syscall(self) -> None:
        """Run to the next beginning or end of a call. A SIGSTOP that comes between takes hold later."""
        until, number = time.monotonic() + CALL_SECONDS, 0
        while True:
            ptrace.resume_to_syscall(self._pid, number)
            stop = ptrace.wait(self._pid, until)
            if stop.at_syscall:
                return
            number = 0 if stop.event else stop.signal

    def _read(self, address: int, size: int) -> bytes:
        try:
            with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as memory:
                memory.seek(address)
                return memory.read(size)
        except (OSError, OverflowError):
            return b""
