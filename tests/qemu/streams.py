"""Parties in mid-stream: each byte that comes is compared as it comes, and both directions are busy all the time."""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from cpr.linux import net, sockdiag
from tests.qemu.parties import Party, connected

if TYPE_CHECKING:
    from pathlib import Path

    from tests.lab.linux import LinuxLog
    from tests.qemu.parties import Wire

LINE = 8
PATIENCE = 30.0


def content(start: int, size: int) -> bytes:
    """So many bytes from there of a stream without end, in which no line comes twice."""
    first, last = start // LINE, (start + size) // LINE + 1
    lines = b"".join(b"%07d\n" % (number % 10**7) for number in range(first, last))
    return lines[start - first * LINE :][:size]


def all_went_on(before: list[int], now: list[int]) -> bool:
    """Each of them has made progress."""
    return all(later > earlier for earlier, later in zip(before, now, strict=True))


class Echo(Party):
    """A stream to somebody who sends everything back. `fd` is a socket or a terminal; at most `window` bytes are under
    way."""

    def __init__(self, fd: int, window: int, pause: float = 0.002) -> None:
        super().__init__()
        os.set_blocking(fd, False)
        self.fd = fd
        self.window = window
        self.pause = pause
        self.sent = self.received = 0

    def work(self) -> None:
        end = 0.0
        while self.received < self.sent or not self.closing:
            if self.closing:
                end = end or time.monotonic() + PATIENCE
                assert time.monotonic() < end, f"{self.sent - self.received} bytes of {self.sent} never came back"
            room = 0 if self.closing else self.window - (self.sent - self.received)
            readable, writable, _ = select.select([self.fd], [self.fd] if room > 0 else [], [], 0.05)
            if writable:
                self.sent += os.write(self.fd, content(self.sent, room))
            if readable:
                data = os.read(self.fd, 65536)
                wanted = content(self.received, len(data))
                assert data, f"hung up after {self.received} bytes"
                assert data == wanted, f"at {self.received}: {data[:80]!r}, not {wanted[:80]!r}"
                self.received += len(data)
            time.sleep(self.pause)

    @property
    def progress(self) -> int:
        return self.received


class Asker(Party):
    """Asks the guest agent without a pause, `WINDOW` questions under way; each is answered once, in order."""

    WINDOW = 4

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.sock = connected(path, PATIENCE)
        self.progress = 0

    def work(self) -> None:
        asked: deque[int] = deque()
        with self.sock.makefile("rb") as lines:
            while asked or not self.closing:
                while len(asked) < self.WINDOW and not self.closing:
                    asked.append(self.progress + len(asked))
                    question: dict[str, Any] = {"execute": "guest-sync", "arguments": {"id": asked[-1]}}
                    self.sock.sendall(json.dumps(question).encode() + b"\n")
                line = lines.readline()
                assert json.loads(line) == {"return": asked.popleft()}, line
                self.progress += 1

    def close(self) -> None:
        super().close()
        self.sock.close()


class Lines(Party):
    """Types a line into a Linux guest's console every `interval` seconds; each is echoed once, in order."""

    def __init__(self, wire: Wire, log: LinuxLog, interval: float = 0.02) -> None:
        super().__init__()
        self.wire = wire
        self.log = log
        self.interval = interval
        self.typed: list[str] = []

    def work(self) -> None:
        while not self._closing.wait(self.interval):
            self.wire.send(b"%d\n" % len(self.typed))
            self.typed.append(str(len(self.typed)))

    def check(self) -> None:
        self.log.wait(lambda: len(self.log.echoed) >= len(self.typed), PATIENCE, "not every line is echoed")
        assert self.log.echoed == self.typed

    @property
    def progress(self) -> int:
        return len(self.log.echoed)


class Viewer(Party):
    """Connects to a VNC listener whenever the process runs another program than before: nobody accepts yet. `served`
    says of each time whether it waited in the queue, and how it was greeted."""

    def __init__(self, path: Path, pid: int) -> None:
        super().__init__()
        self.path = path
        self.pid = pid
        (self.listener,) = [s.inode for s in net.read_net_unix(pid) if s.listening and s.path == str(path)]
        self.served: list[tuple[bool, bytes]] = []
        self._program = self._runs()

    def _runs(self) -> int:
        return os.stat(f"/proc/{self.pid}/exe").st_ino

    def work(self) -> None:
        while not self._closing.wait(0.001):
            if (now := self._runs()) == self._program:
                continue
            self._program = now
            with connected(self.path, PATIENCE) as viewer:
                waited = os.fstat(viewer.fileno()).st_ino in sockdiag.unix_socket(self.listener).waiting
                self.served.append((waited, viewer.recv(12, socket.MSG_WAITALL)))

    @property
    def progress(self) -> int:
        return len(self.served)
