"""The way of the device state from the old QEMU to the new one, directly or by a memory file of ours.

A socket pair, one end given to each by descriptor. A guest whose only QMP socket is TCP takes no descriptors: it
connects to a port of ours on the loopback, and what it has connected is given to the new QEMU.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import TYPE_CHECKING

from cpr.errors import CommandFailed, MonitorError, NewQemuDied, StepFailed
from cpr.linux import proc
from cpr.model import Runstate
from cpr.qemu import clients, migration
from cpr.run import resume_old

if TYPE_CHECKING:
    from cpr.model import Guest
    from cpr.qemu.qmp import Event, Monitor
    from cpr.run import Run

NAME = "cpr-stream"
ACCEPT_SECONDS = 5.0
SLICE = 0.05
"""Seconds between two looks at interrupts and deadlines."""
CHUNK = 1 << 18
"""Bytes at a time: about what a socket holds."""


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
    with _from_old(run, listener) as connection:
        run.successor.send_fd(NAME, connection.fileno())
    run.successor.execute("migrate-incoming", uri=f"fd:{NAME}")


def _from_old(run: Run, listener: socket.socket) -> socket.socket:
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


def save(run: Run, state: int, step: str) -> None:
    """Have the old QEMU send its state to us (`run.extra["stream"]`), and write it to the memory file `state`.

    Raises:
        StepFailed: it did not come to its end; QEMU lets the guest go on by itself then, mostly.
    """
    here: socket.socket = run.extra["stream"]
    run.blackout_began = time.monotonic()
    run.monitor.execute("migrate", uri=f"fd:{NAME}")
    here.settimeout(SLICE)
    while True:
        try:
            data = here.recv(CHUNK)
        except TimeoutError:
            run.check(step)
            if _failed(run):
                break
            continue
        if not data:
            break
        while data:
            data = data[os.write(state, data) :]
    # QEMU has closed its end; that it is content shows a moment later
    while (status := run.monitor.execute("query-migrate").get("status")) in ("active", "device", "setup"):
        run.check(step)
    if status != "completed":
        words = migration.failure(run.monitor) or f"the migration is {status}"
        raise StepFailed(step, f"the state could not be saved: {words}")


def _failed(run: Run) -> bool:
    past = run.monitor.events()[run.extra["seen_old"] :]
    return any(e.name == "MIGRATION" and e.data.get("status") == "failed" for e in past)


def feed(run: Run, monitor: Monitor, state: int, step: str) -> None:
    """Have a QEMU load the state in the memory file `state`, and wait until it has.

    Raises:
        NewQemuDied: it does not take it.
    """
    seen = monitor.event_count
    here, there = socket.socketpair()
    with here:
        with there:
            monitor.send_fd(NAME, there.fileno())
        monitor.execute("migrate-incoming", uri=f"fd:{NAME}")
        size, offset = os.fstat(state).st_size, 0
        here.settimeout(SLICE)
        with contextlib.suppress(ConnectionError):  # it has closed its end: its words follow
            while offset < size:
                try:
                    offset += here.send(os.pread(state, CHUNK, offset))
                except TimeoutError:
                    run.attend()
            here.shutdown(socket.SHUT_WR)

        def ended(event: Event) -> bool:
            return event.data.get("status") in ("completed", "failed", "cancelled")

        try:
            event = run.wait_event(monitor, {"MIGRATION"}, step, ended, after=seen)
        except MonitorError:
            event = None
    if event is None or event.data["status"] != "completed":
        words = run.words()
        raise NewQemuDied(step, "did not take the state", words or migration.failure(monitor))


def go_on_after_save(run: Run, guest: Guest) -> None:
    """Undo `save`: the guest goes on in the old QEMU."""
    if "seen_old" not in run.extra:
        return  # nothing was sent; whoever has stopped the guest meanwhile had a reason
    status = resume_old(run.monitor, guest.runstate)
    if guest.running and status != Runstate.RUNNING:
        raise StepFailed("undo", f"the old QEMU is {status} and does not go on", hint="cpr recover tries again")
    if run.stop_time is None:
        return
    resumed = [e for e in run.monitor.events()[run.extra["seen_old"] :] if e.name == "RESUME"]
    run.resume_time = resumed[-1].timestamp if resumed else None
