"""The way of the device state from the old QEMU to the new one.

A socket pair, one end given to each by descriptor. A guest whose only QMP socket is TCP takes no descriptors: it
connects to a port of ours on the loopback, and what it has connected is given to the new QEMU.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING

from cpr.errors import CommandFailed, StepFailed
from cpr.linux import proc
from cpr.qemu import clients

if TYPE_CHECKING:
    from cpr.model import Guest
    from cpr.run import Run

NAME = "cpr-stream"
ACCEPT_SECONDS = 5.0


def prepare(run: Run, guest: Guest) -> None:
    """Everything that can be done before the state is sent."""
    assert guest.monitor is not None
    if not guest.monitor.path:
        listener = socket.create_server(("127.0.0.1", 0))
        run.closing.callback(listener.close)
        run.extra["stream"] = listener
        return
    here, there = socket.socketpair()
    with here, there:
        run.monitor.send_fd(NAME, here.fileno())
        run.successor.send_fd(NAME, there.fileno())
    run.successor.execute("migrate-incoming", uri=f"fd:{NAME}")


def begin(run: Run) -> None:
    """Have the old QEMU send its state, and the new one take it."""
    listener: socket.socket | None = run.extra.get("stream")
    if listener is None:
        run.monitor.execute("migrate", uri=f"fd:{NAME}")
        return
    run.monitor.execute("migrate", uri=f"tcp:127.0.0.1:{listener.getsockname()[1]}")
    with connection_of_old(run, listener) as connection:
        run.successor.send_fd(NAME, connection.fileno())
    run.successor.execute("migrate-incoming", uri=f"fd:{NAME}")


def connection_of_old(run: Run, listener: socket.socket) -> socket.socket:
    """The connection that the old QEMU makes; others, anybody's on this host, are hung up on."""
    assert run.old is not None
    deadline = time.monotonic() + ACCEPT_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        with contextlib.suppress(TimeoutError):
            connection, peer = listener.accept()
            theirs = clients.socket_numbers(run.old.pid)
            if any(tcp.local == peer and tcp.inode in theirs for tcp in proc.read_net_tcp(run.old.pid)):
                return connection
            connection.close()
    raise StepFailed("move the device state", f"the old QEMU did not connect within {ACCEPT_SECONDS:g} s")


def undo(run: Run) -> None:
    """Take back the old QEMU's end, which it has not used."""
    if run.extra.get("stream") is None:
        with contextlib.suppress(CommandFailed):
            run.monitor.execute("closefd", fdname=NAME)
