"""The first commands of a QMP session, sent in one go: done one after the other before QEMU has time for others.

A QEMU greets some ten milliseconds before its main loop begins. What is sent right then is what the main loop does
first; a client library that awaits the answer to each command leaves it milliseconds to accept other clients.

Out of scope: the rest of the session, which is `qmp.Monitor`'s.
"""

from __future__ import annotations

import json
import select
import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SLICE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command; `descriptor` goes with it by SCM_RIGHTS."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    descriptor: int | None = None

    def line(self) -> bytes:
        return json.dumps({"execute": self.name, "arguments": self.arguments}).encode() + b"\n"


NEGOTIATION = Command(name="qmp_capabilities")


def speak(
    sock: socket.socket, commands: Sequence[Command], *, timeout: float, attend: Callable[[], None] | None = None
) -> list[dict[str, Any]]:
    """Await the greeting, send the negotiation and all commands, and return the commands' replies in order.

    Events that come meanwhile are passed over, also before the greeting: QEMU sends them to the client that it is just
    accepting. What `attend` raises, called now and then, ends the wait.

    Raises:
        TimeoutError. EOFError: QEMU hung up. ValueError, TypeError: nonsense, or the negotiation is refused. OSError.
    """
    lines = _Lines(sock, time.monotonic() + timeout, attend)
    while "event" in (greeting := lines.next()):
        continue
    if "QMP" not in greeting:
        raise ValueError("no greeting")
    sock.setblocking(True)
    for command in (NEGOTIATION, *commands):
        if command.descriptor is None:
            sock.sendall(command.line())
        else:
            socket.send_fds(sock, [command.line()], [command.descriptor])
    replies: list[dict[str, Any]] = []
    while len(replies) <= len(commands) or lines.rest:
        message = lines.next()
        if "event" not in message:
            replies.append(message)
    if "return" not in replies[0]:
        raise ValueError(f"negotiation: {replies[0]}")
    return replies[1:]


class _Lines:
    """JSON objects, a line each."""

    def __init__(self, sock: socket.socket, deadline: float, attend: Callable[[], None] | None) -> None:
        self._sock = sock
        self._deadline = deadline
        self._attend = attend
        self.rest = b""

    def next(self) -> dict[str, Any]:
        while b"\n" not in self.rest:
            if not select.select([self._sock], [], [], SLICE)[0]:
                if self._attend is not None:
                    self._attend()
                if time.monotonic() > self._deadline:
                    raise TimeoutError("no answer")
                continue
            data = self._sock.recv(65536)
            if not data:
                raise EOFError("QEMU hung up")
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise TypeError(f"no object: {line[:80]!r}")
        return message
