"""A guest's state on its way to several QEMUs at once, and the state of devices without a migration.

    Tee          passes on what a migrating QEMU sends, and holds that QEMU until it is told that the load failed
    device_state what a paused QEMU says of its devices, as a stream that another loads

Out of scope: who loads it, and what follows.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING

from cpr.errors import CommandFailed
from cpr.linux.fds import Fd, descriptor_table
from cpr.qemu.state_end import Ending

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cpr.qemu.qmp import Monitor
    from cpr.qemu.state_end import Mark

CHUNK = 1 << 20
WAITING = 64 << 20
"""Bytes that may wait for the slowest; then the sender waits."""
SHUT_FAILED = struct.pack(">HHI", 1, 4, 1)
"""MIG_RP_MSG_SHUT with an error (migration/migration.h): the one who loads has failed."""

NAME = "cpr-rehearsal"
MEMFD = f"/memfd:{NAME}"
HEADER = struct.Struct(">4sI")
CONFIGURATION = 0x07
"""QEMU_VM_CONFIGURATION (migration/savevm.h): the section that names the machine type."""
DESCRIPTION = struct.pack(">BI", 0x06, 0)
"""QEMU_VM_VMDESCRIPTION: words about the format, here none. Who loads waits for them, or for the end of the file."""


class Tee:
    """Sends what comes from `source` on to every one of `sinks`, in a thread of its own; owns all of them.

    A sink that hangs up is left out. What sinks say (the return path) is thrown away: the sender, which was told to
    wait for the return path, stands still until `fail`, or until our end of `source` is closed by whatever end of ours.
    Then to it the migration has failed, and it goes on by itself.
    """

    def __init__(self, source: socket.socket, sinks: Sequence[socket.socket]) -> None:
        self._source = source
        self._ending = Ending(lambda _: False)
        self._sinks = {sink.fileno(): sink for sink in sinks}
        self._waiting = {number: bytearray() for number in self._sinks}
        for sock in (source, *sinks):
            sock.setblocking(False)
        self._thread = threading.Thread(target=self._pass_on, name="state", daemon=True)
        self._thread.start()

    @property
    def mark(self) -> Mark | None:
        """Of the end of what has come so far."""
        return self._ending.mark

    def fail(self) -> None:
        """Tell the sender that its state was not taken, and hang up. Safe to repeat."""
        with contextlib.suppress(OSError):
            self._source.send(SHUT_FAILED)
        with contextlib.suppress(OSError):
            self._source.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for sock in (self._source, *self._sinks.values()):
            sock.close()

    def _pass_on(self) -> None:
        poll, source, ended = select.poll(), self._source.fileno(), False
        while not ended:
            poll.register(source, select.POLLIN if self._room() else 0)
            for number in self._sinks:
                more = number in self._waiting and self._waiting[number]
                poll.register(number, select.POLLIN | select.POLLOUT if more else select.POLLIN)
            for number, events in poll.poll():
                if number == source:
                    ended = not self._receive()
                else:
                    self._serve(number, events)
                    if number not in self._waiting:
                        poll.unregister(number)
                        self._sinks.pop(number).close()

    def _room(self) -> bool:
        return all(len(waiting) < WAITING for waiting in self._waiting.values())

    def _receive(self) -> bool:
        """False: nothing more will come."""
        try:
            data = self._source.recv(CHUNK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._ending.feed(data)
        for waiting in self._waiting.values():
            waiting += data
        for number in list(self._waiting):
            self._send(number)
        return bool(data)

    def _serve(self, number: int, events: int) -> None:
        if events & select.POLLOUT and number in self._waiting:  # it may have hung up on what was just received
            self._send(number)
        if number in self._waiting and events & (select.POLLIN | select.POLLHUP | select.POLLERR):
            with contextlib.suppress(BlockingIOError):
                try:
                    gone = not self._sinks[number].recv(CHUNK)
                except ConnectionError:
                    gone = True
                if gone:
                    del self._waiting[number]

    def _send(self, number: int) -> None:
        waiting = self._waiting[number]
        with contextlib.suppress(BlockingIOError):
            try:
                while waiting:
                    del waiting[: self._sinks[number].send(memoryview(waiting)[:CHUNK].tobytes())]
            except OSError as error:
                if isinstance(error, BlockingIOError):
                    raise
                del self._waiting[number]


def device_state(monitor: Monitor, pid: int, machine: str) -> bytes:
    """The state of a paused QEMU's devices, as `migrate-incoming` takes it; RAM is not in it.

    Nothing is changed by it: no migration ends, no image is given up, and the guest stays paused. The command is meant
    for Xen and works with every accelerator; what its stream lacks is the sections that name the `machine`, a concrete
    machine type, and the format (migration/savevm.c, qemu_save_device_state). `pid` is that QEMU's.

    Raises:
        CommandFailed, MonitorError.
    """
    with Fd(os.memfd_create(NAME, os.MFD_CLOEXEC)) as state:
        # by name: a set of descriptors (add-fd) would not go before the guest runs (monitor/fds.c, 7.2)
        monitor.send_fd(NAME, state.number)
        try:
            inode = os.fstat(state.number).st_ino
            number = next(d.number for d in descriptor_table(pid) if d.inode == inode and d.target.startswith(MEMFD))
            monitor.execute("xen-save-devices-state", filename=f"/proc/self/fd/{number}", live=False)
        finally:
            with contextlib.suppress(CommandFailed):
                monitor.execute("closefd", fdname=NAME)
        stream = os.pread(state.number, os.fstat(state.number).st_size, 0)
    name = machine.encode()
    configuration = struct.pack(">BI", CONFIGURATION, len(name)) + name
    return stream[: HEADER.size] + configuration + stream[HEADER.size :] + DESCRIPTION
