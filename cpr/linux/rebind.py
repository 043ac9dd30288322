"""A program that opens a listener anew gets the one that is there already: no queue is lost, and nobody is refused.

    socket(AF_INET, ...)            a new one
    bind(it, 0.0.0.0:5700)    ──►   dup3(the listener, it): it has the address, and those who wait
    listen(it, ...)                 changes the length of the queue
    getsockname(it)                 says what the program expects

Where the process still has the listener, a second one cannot be bound to its address; where it has not, those who wait
were refused. The program sees that `bind` has done what it should.

Out of scope: UNIX sockets, whose path a program removes before it binds.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING

from cpr.linux import ptrace, stub

if TYPE_CHECKING:
    from collections.abc import Mapping

Address = tuple[int, str, int]
"""Family (AF_INET or AF_INET6), numerical host, port."""

_BIND = "bind"


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


class Rebinding:
    """What is still to be bound in a traced thread; `at_syscall` at each of its stops at a system call."""

    def __init__(self, pid: int, bound: Mapping[Address, int]) -> None:
        self._pid = pid
        arch = stub.architecture()
        self._bound = dict(bound) if arch is not None else {}
        self._arch = arch
        self._changed = False
        """The thread is in a call of ours instead of its own."""

    @property
    def left(self) -> bool:
        """Whether its calls are of interest yet."""
        return bool(self._bound) or self._changed

    def at_syscall(self) -> None:
        """It stands before or behind a call. Raises OSError (ESRCH where it is gone)."""
        arch = self._arch
        assert arch is not None
        values = ptrace.registers(self._pid)
        if self._changed:
            self._changed = False
            if stub.signed(getattr(values, arch.result)) >= 0:
                setattr(values, arch.result, 0)
                ptrace.set_registers(self._pid, values)
            return
        before = stub.signed(getattr(values, arch.result)) == -errno.ENOSYS
        if not before or getattr(values, arch.origin) != arch.numbers[_BIND]:
            return
        number, where, size = (getattr(values, name) for name in arch.arguments[:3])
        address = self._read(where, size)
        source = self._bound.pop(address, None) if address is not None else None
        if source is None:
            return
        for name, word in zip(arch.arguments, (source, number, os.O_CLOEXEC), strict=False):
            setattr(values, name, word)
        setattr(values, arch.origin, arch.numbers["dup3"])
        ptrace.set_registers(self._pid, values)
        self._changed = True

    def _read(self, address: int, size: int) -> Address | None:
        try:
            with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as memory:
                memory.seek(address)
                return parse_address(memory.read(min(size, 128)))
        except (OSError, OverflowError):
            return None
