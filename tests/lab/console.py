"""What a guest says on its console, as it comes: split into lines, each with its time of arrival.

A `ConsoleLog` understands the lines (each guest has its own kind); a `Console` carries bytes to it from a
socket or a file, in a thread, for as long as the test wants.

Out of scope: judging what was said (the tests do), terminals.
"""

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar


class ConsoleLog:
    """Consumes console output; subclasses override `line`.

    `text` keeps everything for a failed test's report.  All times are of time.monotonic, in seconds.
    """

    def __init__(self) -> None:
        self.text = bytearray()
        self.changed = threading.Condition()
        self._rest = b""

    def feed(self, data: bytes, when: float | None = None) -> None:
        """Take `data` that arrived at `when` (now, if not said)."""
        when = time.monotonic() if when is None else when
        with self.changed:
            self.text += data
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self.line(line.decode("ascii", "replace").rstrip("\r"), when)
            self.changed.notify_all()

    def line(self, text: str, when: float) -> None:
        """Understand one whole line."""

    def wait(self, happened: Callable[[], object], seconds: float = 10, what: str = "") -> None:
        """Return once `happened()` is true, tried after all that arrives; TimeoutError after `seconds`."""
        with self.changed:
            if not self.changed.wait_for(lambda: bool(happened()), seconds):
                tail = bytes(self.text[-300:]).decode("ascii", "replace")
                what = what or "nothing of the kind"
                raise TimeoutError(f"{what} within {seconds} s; console: ...{tail!r}")


Log = TypeVar("Log", bound=ConsoleLog)


def largest_gap(times: list[float], since: float = 0, until: float | None = None) -> float:
    """The longest time between two neighbours in `times`, as far as they lie in the window; 0 without any.

    A gap belongs to the window if any of it does; one that is still open at `until` counts.
    """
    ends = [*times, until] if until is not None else times
    return max((end - start for start, end in itertools.pairwise(ends) if end >= since), default=0.0)


class Console(Generic[Log]):
    """Carries a guest's output from somewhere into `log` until closed.  A context manager."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self._closing = threading.Event()
        self._peer: socket.socket | None = None
        self.hangups = 0
        """How often a QEMU has hung up."""
        self._threads: list[threading.Thread] = []

    def connect(self, path: Path | str, seconds: float = 10) -> "Console[Log]":
        """Read the UNIX socket at `path`, which a QEMU serves; come back when it hangs up."""
        self._peer = _connected(path, seconds)
        self._start(lambda: self._read_and_reconnect(path))
        return self

    def listen(self, path: Path | str) -> "Console[Log]":
        """Serve a UNIX socket at `path` that QEMUs connect to, one after the other or several at a time."""
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        server.bind(str(path))
        server.listen(8)
        server.settimeout(0.1)
        self._start(lambda: self._accept(server))
        return self

    def follow(self, path: Path | str) -> "Console[Log]":
        """Read the file at `path` as it grows, from its beginning; it need not exist yet."""
        self._start(lambda: self._follow(Path(path)))
        return self

    @property
    def reading(self) -> bool:
        """It has been told where to read."""
        return bool(self._threads)

    def send(self, data: bytes) -> None:
        """Type `data` (not for `follow`)."""
        if self._peer is None:
            raise ConnectionError("no guest's console is connected")
        self._peer.sendall(data)

    def close(self) -> None:
        """Stop reading.  What has arrived stays in the log."""
        self._closing.set()
        for thread in self._threads:
            thread.join(5)

    def __enter__(self) -> "Console[Log]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name="console", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _read(self, peer: socket.socket) -> None:
        self._peer = peer
        peer.settimeout(0.1)
        with peer:
            while not self._closing.is_set():
                try:
                    data = peer.recv(65536)
                except TimeoutError:
                    continue
                except OSError:
                    return
                if not data:
                    return
                self.log.feed(data)
                if len(data) < 64:
                    time.sleep(0.0005)  # a UART's bytes come one by one; take them by the handful

    def _read_and_reconnect(self, path: Path | str) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(OSError):
                self._read(self._peer or _connected(path, 0))
                self.hangups += not self._closing.is_set()
            self._peer = None
            self._closing.wait(0.002)

    def _accept(self, server: socket.socket) -> None:
        with server:
            while not self._closing.is_set():
                with contextlib.suppress(TimeoutError):
                    peer = server.accept()[0]
                    self._start(lambda peer=peer: self._read(peer))  # type: ignore[misc]

    def _follow(self, path: Path) -> None:
        while not path.exists():
            if self._closing.wait(0.002):
                return
        with path.open("rb", buffering=0) as file:
            while not self._closing.is_set():
                if data := file.read(65536):
                    self.log.feed(data)
                self._closing.wait(0.001)


def _connected(path: Path | str, seconds: float) -> socket.socket:
    end = time.monotonic() + seconds
    while True:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            peer.connect(str(path))
        except OSError:
            peer.close()
            if time.monotonic() >= end:
                raise
            time.sleep(0.002)
        else:
            return peer
