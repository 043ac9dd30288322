"""Clients of a QMP monitor that must not notice that it is borrowed from them."""

from __future__ import annotations

import array
import json
import select
import socket
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from cpr.engines import graft
from cpr.engines.relay import Relay
from cpr.linux import fds, streams
from cpr.linux.process import Process, open_process
from cpr.linux.tracer import Tracer
from cpr.qemu import clients
from tests.qemu.parties import Party, Wire, connected, descriptors
from tests.qemu.surveying import start, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab
    from tests.qemu.parties import Address


class Client:
    """A session whose bytes a test writes and reads itself."""

    def __init__(self, address: Address, *, oob: bool = False) -> None:
        self.sock = connected(address, 20)
        self._rest = b""
        self.events: list[dict[str, Any]] = []
        assert "QMP" in self.message()
        self.send({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"] if oob else []}})
        assert self.message() == {"return": {}}

    def send(self, message: object, *descriptors: int) -> None:
        self.write(json.dumps(message).encode(), *descriptors)

    def write(self, data: bytes, *descriptors: int) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        sent = self.sock.sendmsg([data], rights)
        self.sock.sendall(data[sent:])

    def line(self) -> bytes:
        while b"\n" not in self._rest:
            data = self.sock.recv(65536)
            if not data:
                raise EOFError("QEMU hung up")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        assert line.endswith(b"\r"), line
        return line

    def message(self) -> dict[str, Any]:
        """The next reply or greeting."""
        while True:
            message: dict[str, Any] = json.loads(self.line())
            if "event" not in message:
                return message
            self.events.append(message)

    def ask(self, command: str, *descriptors: int, **arguments: object) -> Any:
        """What it returns, or the error."""
        self.send({"execute": command, "arguments": arguments, "id": "mine"}, *descriptors)
        reply = self.message()
        assert reply["id"] == "mine", reply
        return reply.get("return", reply.get("error"))

    def saw(self) -> list[str]:
        """Names of the events so far, those that are there to be read included."""
        while select.select([self.sock], [], [], 0)[0] or self._rest:
            message = json.loads(self.line())
            assert "event" in message, message
            self.events.append(message)
        return [event["event"] for event in self.events]

    def close(self) -> None:
        self.sock.close()


C = TypeVar("C", "Client", "Flood", "Wire", "Person")

PADDING = "x" * 3000
WINDOW = 4


class Flood(Party):
    """Commands of 3 KB without a pause, `WINDOW` of them under way; each is to be answered once, in order."""

    def __init__(self, address: Address) -> None:
        super().__init__()
        self._client = Client(address)
        self.sock = self._client.sock
        self.events: list[str] = []
        self.answered = 0
        self.wrong: list[bytes] = []
        self.longest = 0.0
        """Seconds between two replies."""

    def work(self) -> None:
        sent: deque[str] = deque()
        last = time.monotonic()
        while not self.closing or sent:
            while len(sent) < WINDOW and not self.closing:
                sent.append(f"{self.answered + len(sent)} {PADDING}")
                self._client.send({"execute": "query-name", "id": sent[-1]})
            line = self._client.line()
            message = json.loads(line)
            if "event" in message:
                self.events.append(message["event"])
                continue
            now = time.monotonic()
            self.longest, last = max(self.longest, now - last), now
            if message.get("id") != sent.popleft() or "return" not in message:
                self.wrong.append(line)
            self.answered += 1

    def close(self) -> None:
        super().close()
        self._client.close()

    def check(self) -> None:
        assert self.error is None, self.error
        assert self.wrong == []


@dataclass(frozen=True, slots=True)
class Held:
    """A guest whose monitor a client holds, and what it takes to borrow it."""

    process: Process
    tracer: Tracer
    address: Address
    number: int

    def sockets(self) -> list[tuple[int, str]]:
        """What sockets the guest's process has open."""
        return [(n, target) for n, target in descriptors(self.process.pid).items() if target.startswith("socket:")]

    def unread(self) -> int:
        """Bytes that QEMU has not read from the client."""
        with fds.take_fd(self.process.pidfd, self.number) as fd, clients.socket_of(fd) as sock:
            return streams.unread(sock)

    def borrow(self, seconds: float = 10.0, **how: Any) -> Relay:
        return Relay.borrow(self.process, self.tracer, self.number, until=time.monotonic() + seconds, **how)


@contextmanager
def held(
    lab: Lab, build: QemuBuild, client: Callable[[Any], C], *words: str, address: Address | None = None
) -> Iterator[tuple[Held, C]]:
    """Start a guest, paused, whose monitor at `address` (its QMP socket, if not given) a client holds."""
    orphan = start(lab, build, "-S", *words)
    address = address or lab.directory / "guest.qmp"
    with open_process(orphan.pid) as process, Tracer.start(process) as tracer:
        made = client(address)
        sock = made.peer if isinstance(made, Wire) else made.sock
        try:
            until(lambda: graft.accepted_of(process, sock))
            number = graft.accepted_of(process, sock)
            assert number is not None
            yield Held(process, tracer, address, number), made
        finally:
            sock.close()


class Person(Wire):
    """Somebody at a human monitor."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self.__enter__()
        self.sees(PROMPT)

    def sees(self, end: bytes, after: int = 0) -> bytes:
        """What came after the first so many bytes, when it ends so."""
        until(lambda: self.received[after:].endswith(end))
        return self.received[after:]

    def types(self, data: bytes, end: bytes) -> bytes:
        """What it sees then, when it ends so."""
        already = len(self.received)
        self.send(data)
        return self.sees(end, already)


PROMPT = b"\n(qemu) "
