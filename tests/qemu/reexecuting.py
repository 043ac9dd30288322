"""A QEMU replaced in its own process, by itself."""

from __future__ import annotations

import contextlib
import fcntl
from dataclasses import replace
from typing import TYPE_CHECKING

from cpr.engines import graft
from cpr.linux import proc
from cpr.linux.tracee import Call
from cpr.linux.tracer import Attach, Batch, Detach, Exec, Tracer
from tests.qemu.parties import connected
from tests.qemu.surveying import until

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from cpr.engines.graft import Kept
    from tests.qemu.managers import Held


@contextlib.contextmanager
def reexecuted(guest: Held, kept: Kept) -> Iterator[tuple[Held, socket.socket]]:
    """The same program anew in the same process, and a connection to it. `number` is its accepted end."""
    pid = guest.process.pid
    environ = tuple(f"{name}={value}" for name, value in proc.read_environ(pid))
    guest.tracer.run(
        Attach(),
        Batch((Call("fcntl", (kept.number, fcntl.F_SETFD, 0)),)),
        Exec(f"/proc/{pid}/exe", proc.read_argv(pid), environ),
        Detach(),
    )
    found: list[socket.socket] = []

    def connects() -> bool:
        with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
            found.append(connected(guest.address))
        return bool(found)

    until(connects)
    with found[0] as sock, Tracer.start(guest.process) as tracer:
        until(lambda: graft.accepted_of(guest.process, sock))
        number = graft.accepted_of(guest.process, sock)
        assert number is not None
        yield replace(guest, tracer=tracer, number=number), sock
