"""The parties to an update that must not notice it: who is connected, who comes meanwhile, who only asks.

Each is a thread that keeps one promise of its own: a `Wire` never connects a second time, a `Knocker` writes down every
connection that was not had, a `Poller` every answer it got. Judging is the tests' matter.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cpr.linux import syscalls
from tests.lab import counting
from tests.lab.console import ConsoleLog
from tests.lab.counting import CountingLog
from tests.qemu.surveying import until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab, Orphan

Address = Path | tuple[str, int]

HARMLESS = bytes(b for b in range(256) if b not in b"DIQZ")
"""Bytes that do no more to the counting guest than come back."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def words_of(address: Address) -> str:
    """As a chardev of QEMU says it."""
    return f"path={address}" if isinstance(address, Path) else f"host={address[0]},port={address[1]}"


def connected(address: Address, seconds: float = 10.0, *, impatient: bool = False) -> socket.socket:
    """A connection. It blocks: where the queue is full it waits (an impatient one does not) and raises OSError after
    `seconds`."""
    family = socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # not settimeout: it makes a UNIX socket give up at once where the queue is full
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))
        sock.setblocking(not impatient or family != socket.AF_UNIX)
        sock.connect(str(address) if isinstance(address, Path) else address)
        sock.setblocking(True)
    except BaseException:
        sock.close()
        raise
    return sock


def connected_elsewhere(address: Address) -> socket.socket:
    """A connection that was made from a network namespace of its own."""
    made: list[socket.socket] = []

    def there() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        made.append(connected(address))

    thread = threading.Thread(target=there)
    thread.start()
    thread.join()
    return made[0]


class Party:
    """Somebody with a thread, from `with` to `close`."""

    def __init__(self) -> None:
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
        self.error: BaseException | None = None

    def work(self) -> None:
        """What the thread does, until `closing`."""
        raise NotImplementedError

    @property
    def closing(self) -> bool:
        return self._closing.is_set()

    def _run(self) -> None:
        try:
            self.work()
        except Exception as error:  # it is the test's to judge
            self.error = error

    def close(self) -> None:
        self._closing.set()
        self._thread.join(30)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Wire(Party):
    """One connection, never made again. `ended` says how it ended, if it did."""

    def __init__(
        self,
        address: Address,
        log: ConsoleLog | None = None,
        *,
        elsewhere: bool = False,
        peer: socket.socket | None = None,
    ) -> None:
        """peer: what has been connected to `address` already."""
        super().__init__()
        self.log = log if log is not None else ConsoleLog()
        self.ended = ""
        self.peer = peer or (connected_elsewhere(address) if elsewhere else connected(address))
        self.began = time.monotonic()

    def work(self) -> None:
        self.peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 50000))
        while not self.closing:
            try:
                data = self.peer.recv(65536)
            except BlockingIOError:
                continue
            except OSError as error:
                self.ended = str(error)
                return
            if not data:
                self.ended = "hung up"
                return
            self.log.feed(data)

    @property
    def received(self) -> bytes:
        return bytes(self.log.text)

    def send(self, data: bytes) -> None:
        self.peer.sendall(data)

    def close(self) -> None:
        super().close()
        self.peer.close()


class Typist(Party):
    """Types a harmless byte every `interval` seconds into a wire; `typed` has them all."""

    def __init__(self, wire: Wire, interval: float = 0.005) -> None:
        super().__init__()
        self.wire = wire
        self.interval = interval
        self.typed = bytearray()

    def work(self) -> None:
        while not self._closing.wait(self.interval):
            byte = HARMLESS[len(self.typed) % len(HARMLESS)]
            self.wire.send(bytes([byte]))
            self.typed.append(byte)


@dataclass(frozen=True, slots=True)
class Missed:
    """A connection that was not had."""

    when: float
    why: str


class Knocker(Party):
    """Connects, stays `stay` seconds, hangs up, and comes again `pause` seconds later. `missed` has the refusals."""

    def __init__(self, address: Address, *, pause: float = 0.002, stay: float = 0.0) -> None:
        super().__init__()
        self.address = address
        self.pause = pause
        self.stay = stay
        self.had = 0
        self.missed: list[Missed] = []
        self.longest = 0.0
        """Seconds that the longest connect took."""

    def work(self) -> None:
        while not self._closing.wait(self.pause):
            began = time.monotonic()
            try:
                with connected(self.address):
                    self.had += 1
                    self.longest = max(self.longest, time.monotonic() - began)
                    if self.stay:
                        self._closing.wait(self.stay)
            except OSError as error:
                self.missed.append(Missed(began, errno.errorcode.get(error.errno or 0, str(error))))


class Poller(Party):
    """Asks a QMP socket for `query-status` and hangs up, every `interval` seconds.

    impatient: its connect gives up at once where the queue is full, as that of a socket that does not block.
    """

    def __init__(self, address: Address, interval: float = 0.05, *, impatient: bool = False) -> None:
        super().__init__()
        self.address = address
        self.interval = interval
        self.impatient = impatient
        self.told: list[tuple[float, str]] = []
        """(when, runstate) of every answer."""
        self.versions: list[str] = []
        self.missed: list[Missed] = []
        self.longest = 0.0

    def work(self) -> None:
        while not self._closing.wait(self.interval):
            began = time.monotonic()
            try:
                with Qmp(self.address, impatient=self.impatient) as monitor:
                    status = monitor.execute("query-status")["status"]
                    self.told.append((time.monotonic(), status))
                    self.versions.append(monitor.version)
                    self.longest = max(self.longest, time.monotonic() - began)
            except (OSError, EOFError) as error:
                why = errno.errorcode.get(getattr(error, "errno", 0) or 0, repr(error))
                self.missed.append(Missed(began, why))

    @property
    def states(self) -> set[str]:
        return {state for _, state in self.told}


class Qmp:
    """A QMP session as simple as a script's: blocking, one command at a time."""

    def __init__(self, address: Address, seconds: float = 20.0, *, impatient: bool = False) -> None:
        self._sock = connected(address, seconds, impatient=impatient)
        self._file = self._sock.makefile("rb")
        self.events: list[dict[str, Any]] = []
        while "event" in (greeting := self._read()):  # QEMU sends one to whom it is just accepting
            self.events.append(greeting)
        version = greeting["QMP"]["version"]["qemu"]
        self.version = ".".join(str(version[k]) for k in ("major", "minor", "micro"))
        self.execute("qmp_capabilities")

    def _read(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise EOFError("QEMU hung up")
        value: dict[str, Any] = json.loads(line)
        return value

    def execute(self, command: str, **arguments: object) -> Any:
        """Underscores in argument names stand for hyphens."""
        named = {k.replace("_", "-"): v for k, v in arguments.items()}
        self._sock.sendall(json.dumps({"execute": command, "arguments": named}).encode())
        while True:
            message = self._read()
            if "error" in message:
                raise RuntimeError(f"{command}: {message['error']}")
            if "return" in message:
                return message["return"]
            self.events.append(message)

    def human(self, line: str) -> str:
        return str(self.execute("human-monitor-command", command_line=line))

    def close(self) -> None:
        self._file.close()
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Counted:
    """A counting guest whose console is a `Wire` of ours."""

    name: str
    process: Orphan
    wire: Wire
    log: CountingLog
    qmp: Path

    def check(self, *, rounds: int = 2) -> None:
        """All RAM as it is now was checked, nothing of the count is lost, and the console never hung up."""
        self.log.wait_rounds(rounds)
        assert self.log.sound, self.log.problems()
        assert not self.wire.ended, self.wire.ended


def unique(lab: Lab) -> str:
    """A guest's name that no other test has on this host."""
    return lab.directory.name


FILE = "memory-backend-file,share=on,mem-path={ram}"
MEMFD = "memory-backend-memfd,share=on"


def backend_for(build: QemuBuild, ram: Path) -> str:
    """Shared RAM that this QEMU's stream skips: a memfd only before 8.1."""
    return MEMFD if build.version.startswith("7.") else FILE.format(ram=ram)


@contextlib.contextmanager
def counted(
    lab: Lab,
    build: QemuBuild,
    *extra: str,
    console: Address | None = None,
    name: str = "",
    memory: str = "32M",
    backend: str | None = None,
    qmp: bool = True,
    words: Sequence[str] | None = None,
    prefix: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    bound: str = "",
    pidfile: Path | None = None,
    running: bool = True,
    elsewhere: bool = False,
    calls: bool = False,
) -> Any:
    """Start the counting guest with our wire for its console; `Counted`, once it counts (if it is `running`).

    `words` replaces the command line's options, `prefix` comes before the program (setpriv, unshare, ...). `bound` is
    the name of the console as QEMU was given it; `pidfile` says who the guest is where it becomes a daemon;
    `elsewhere`: our wire comes from another network namespace; `calls`: it is QEMU that connects to us.
    """
    name = name or unique(lab)
    address = console if console is not None else lab.directory / f"{name}.con"
    monitor = lab.directory / f"{name}.qmp"
    disk = counting.disk(lab.directory / f"{name}.disk", hz=100, pace=40)
    ram = backend or backend_for(build, lab.directory / f"{name}.ram")
    command = [
        *prefix,
        *build.command,
        *(words if words is not None else standard(name, memory, ram, address, monitor if qmp else None, calls=calls)),
        *(counting.arguments(disk) if words is None else ()),
        *extra,
    ]
    server = _called(address) if calls else None
    process = lab.start(command, name=name, environment=environment, pass_fds=pass_fds)
    if pidfile is not None:
        until(lambda: pidfile.exists() and pidfile.read_text().endswith("\n"))
        assert process.wait(20)
        process = lab.adopt(int(pidfile.read_text()))
    log = CountingLog()
    there = Path(bound) if bound else address
    until(lambda: not process.alive or listens(there, process.pid))
    assert process.alive, (lab.directory / f"{name}.log").read_text()
    peer = None
    if server is not None:
        with server:
            peer = server.accept()[0]
            peer.setblocking(True)
    with Wire(address, log, elsewhere=elsewhere, peer=peer) as wire:
        if running:
            log.wait(lambda: log.ticks, 30, "it does not count")
        yield Counted(name, process, wire, log, monitor)


def _called(address: Address) -> socket.socket:
    """A server that waits 20 s for whoever calls."""
    family = socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.bind(str(address) if isinstance(address, Path) else address)
    server.listen()
    server.settimeout(20)
    return server


def standard(
    name: str, memory: str, backend: str, console: Address, qmp: Path | None, *, calls: bool = False
) -> list[str]:
    """The options of an ordinary guest. calls: it connects to its console's client."""
    role = "" if calls else ",server=on,wait=off"
    return [
        *f"-name {name} -nodefaults -display none -accel tcg -m {memory}".split(),
        *f"-machine q35,memory-backend=ram0 -object {backend},id=ram0,size={memory}".split(),
        *("-chardev", f"socket,id=console,{words_of(console)}{role}", "-serial", "chardev:console"),
        *(("-qmp", f"unix:{qmp},server=on,wait=off") if qmp else ()),
    ]


def listens(address: Address, pid: int | None = None) -> bool:
    """Somebody (in the network namespace of `pid`) listens there; told without connecting."""
    proc = f"/proc/{pid or 'self'}/net"
    if isinstance(address, Path):
        with open(f"{proc}/unix") as file:
            return any(row.split()[-1:] == [str(address)] and row.split()[5] == "01" for row in file)
    with open(f"{proc}/tcp") as file:
        return any(row.split()[1].endswith(f":{address[1]:04X}") and row.split()[3] == "0A" for row in list(file)[1:])


def comm_of(pid: int) -> str:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm") as file:
        return file.read().strip()
    return ""


def descriptors(pid: int) -> dict[int, str]:
    """What a process has open."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found
