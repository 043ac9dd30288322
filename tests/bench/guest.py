"""The guest that is moved: its command lines, its start, and the proof that it is well afterwards.

The counting guest writes to a socket chardev with a log file, which both QEMUs append to. So the whole count is on
disk in the order it was said, whether or not a client is connected, and nobody needs to read while the clock runs.

Each QEMU has sockets of its own (`Seat`), except under `cpr update`, which hands them over. Out of scope: moving.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from cpr.model import MonitorAddress
from cpr.qemu.qmp import Monitor, connect, negotiate
from tests.bench import WayFailed
from tests.lab import counting
from tests.lab.console import Console
from tests.lab.counting import CountingLog
from tests.lab.start import said

if TYPE_CHECKING:
    from pathlib import Path

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab, Orphan

LOADS = ("idle", "dirty")
HZ = 100
GREETING_SECONDS = 20.0
"""From a connected monitor to its greeting; a QEMU that loads much before its main loop runs takes a while."""
TICKS_AFTER = 10
"""How many lines the guest must count on before it is looked at more closely."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is moved and where to. size: bytes of RAM. load: one of LOADS. accel: QEMU's word for it."""

    old: QemuBuild
    new: QemuBuild
    size: int
    load: str
    accel: str = "tcg"

    def __str__(self) -> str:
        return f"{self.old.version} -> {self.new.version}, {size_name(self.size)}, {self.load}"

    @property
    def machine(self) -> str:
        """The machine type an old QEMU means by q35; the new one must be told, it means a newer one."""
        return "pc-q35-" + ".".join(self.old.version.split(".")[:2])

    @property
    def patience(self) -> float:
        """How many seconds a guest of this size may take to fill or to check its RAM once."""
        return 30 + 15 * self.size / 2**30


def size_name(size: int) -> str:
    """Bytes in the largest binary unit that fits."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size and size % 2**shift == 0:
            return f"{size >> shift} {unit}"
    return f"{size} bytes"


class Memory:
    """Memfds for guests' RAM, one a size, used again by guest after guest: getting 8 GiB anew takes half a minute.

    A context manager. What a guest leaves in one is no help to the next, which fills it before it is moved.
    """

    def __init__(self) -> None:
        self._files: dict[int, int] = {}

    def get(self, size: int) -> int:
        """The memfd of `size` bytes; it stays ours."""
        if size not in self._files:
            self._files[size] = new_memory(size)
        return self._files[size]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._files.values():
            os.close(fd)


def new_memory(size: int) -> int:
    """A memfd with `size` bytes of zeros; the caller closes it."""
    fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


@dataclass(frozen=True)
class Seat:
    """Where one of the guest's QEMUs has its sockets."""

    directory: Path
    name: str

    @property
    def qmp(self) -> Path:
        return self.directory / f"{self.name}.qmp"

    @property
    def console(self) -> Path:
        return self.directory / f"{self.name}.console"


class Bell:
    """A socket of ours that a new QEMU dials for its monitor, so that nobody has to look when it is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(path))
        self._server.listen(1)

    @property
    def words(self) -> list[str]:
        """QEMU's options for a monitor that dials."""
        return [*f"-chardev socket,id=bell,path={self.path} -mon chardev=bell,mode=control".split()]

    def answer(self, process: Orphan) -> Monitor:
        """The monitor of `process`, once it has dialled. Raises WayFailed if it ends before, TimeoutError."""
        deadline = time.monotonic() + GREETING_SECONDS
        self._server.settimeout(0.25)
        while True:
            try:
                peer = self._server.accept()[0]
                break
            except TimeoutError:
                if not process.alive:
                    raise WayFailed("the new QEMU ended before it opened its monitor") from None
                if time.monotonic() > deadline:
                    raise
        return negotiate(peer, str(self.path), timeout=GREETING_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()


class BenchGuest:
    """A counting guest of a case, in a lab of its own.

    native: its QEMU gets what QEMU's own CPR modes ask for, RAM from a shared memfd backend and aux-ram-share;
    otherwise its RAM is `memory`, inherited as /proc/self/fd/N, which every QEMU takes for a file of that name.
    """

    def __init__(self, lab: Lab, case: Case, memory: int, *, native: bool) -> None:
        self.lab = lab
        self.case = case
        self.memory = memory
        self.native = native
        self.old = Seat(lab.directory, "old")
        self.new = Seat(lab.directory, "new")
        self.log_file = lab.directory / "console.log"
        self.disk = counting.disk(
            lab.directory / "disk", hz=HZ, pace=counting.IDLE_PACE if case.load == "idle" else None
        )
        self.process: Orphan
        self.client: Client | None = None

    def words(self, build: QemuBuild, seat: Seat, memory: int) -> list[str]:
        """The command line of one of its QEMUs, but for the monitor and -incoming."""
        backend = f"memory-backend-file,mem-path=/proc/self/fd/{memory}"
        aux = ""
        if self.native:
            backend, aux = "memory-backend-memfd", ",aux-ram-share=on"
        console = f"path={seat.console},server=on,wait=off,logfile={self.log_file},logappend=on"
        return [
            *build.command,
            *f"-name bench -nodefaults -display none -accel {self.case.accel} -m {self.case.size >> 20}M".split(),
            *f"-machine {self.case.machine},memory-backend=ram0{aux}".split(),
            *f"-object {backend},id=ram0,size={self.case.size},share=on".split(),
            *f"-chardev socket,id=console,{console} -serial chardev:console".split(),
            *counting.arguments(self.disk),
        ]

    def start_qemu(self, build: QemuBuild, seat: Seat, *extra: str, memory: int | None = None) -> Orphan:
        """Start one of its QEMUs with further words; its RAM is the guest's, or another `memory`."""
        memory = self.memory if memory is None else memory
        command = [*self.words(build, seat, memory), *extra]
        return self.lab.start(command, name=seat.name, pass_fds=[memory])

    def boot(self) -> None:
        """Start it in the old QEMU and return when it counts and all of its RAM is in use. Raises WayFailed."""
        monitor = f"-qmp unix:{self.old.qmp},server=on,wait=off".split()
        self.process = self.start_qemu(self.case.old, self.old, *monitor)
        log = CountingLog()
        with Console(log).follow(self.log_file):
            deadline = time.monotonic() + self.case.patience
            while not (log.round >= 1 and len(log.ticks) >= TICKS_AFTER):
                with contextlib.suppress(TimeoutError):
                    log.wait(lambda: log.round >= 1 and len(log.ticks) >= TICKS_AFTER, 0.5)
                if not self.process.alive or time.monotonic() > deadline:
                    raise WayFailed(f"the guest did not start: {said(self.lab.directory / 'old.log')}")
        check(log)

    def connect_client(self) -> None:
        """Have a client at its console."""
        self.client = Client(self.old.console)

    def monitor(self) -> Monitor:
        """The monitor of the old QEMU."""
        return connect(MonitorAddress(label="bench", path=str(self.old.qmp)))

    def prove_well(self, console: Path) -> None:
        """See it go on counting, and then check all of its RAM. console: where its new QEMU listens.

        Raises:
            WayFailed: it is not well, or does not say that it is; the text is its own complaint.
        """
        log = CountingLog()
        try:
            with Console(log).follow(self.log_file):
                log.wait(lambda: log.ticks, 5)
                log.wait_ticks(TICKS_AFTER, 15)
                with contextlib.ExitStack() as stack:
                    client = self.client
                    if client is None or client.hung_up:
                        client = stack.enter_context(contextlib.closing(Client(console)))
                    client.send(b"D")
                    log.wait(lambda: log.echoed, 10, "it does not hear its console")
                    log.wait_rounds(2, self.case.patience)
        except (TimeoutError, OSError) as error:
            raise WayFailed(f"the guest: {error}") from None
        check(log)
        if log.starts != 1:
            raise WayFailed("the beginning of the guest's count is missing")

    def count(self) -> int:
        """The last whole line of the count so far."""
        log = CountingLog()
        log.feed(self.log_file.read_bytes())
        return log.number

    def close(self) -> None:
        """Hang up; the lab ends the QEMUs."""
        if self.client is not None:
            self.client.close()


class Client:
    """Somebody connected to a console, who reads: a UART's bytes come one by one and fill a socket after 300 of them.

    (A guest whose output is stuck in a full socket stays stuck in a new QEMU that has no client when it loads.)
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError if nobody listens at `path`."""
        self.log = CountingLog()
        self.hung_up = False
        self._peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._peer.connect(str(path))
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            try:
                data = self._peer.recv(65536)
            except OSError:
                data = b""
            if not data:
                self.hung_up = True
                return
            self.log.feed(data)
            time.sleep(0.002)  # take them by the handful

    def send(self, data: bytes) -> None:
        """Type."""
        self._peer.sendall(data)

    def check(self, *, beyond: int) -> None:
        """It was sent every line, and the count beyond a number. Raises WayFailed."""
        check(self.log)
        if self.log.number <= beyond:
            raise WayFailed(f"the console's client was sent nothing after line {beyond}")

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._peer.close()


def check(log: CountingLog) -> None:
    """Raises WayFailed unless the count is whole and no page was found bad."""
    if not log.sound:
        problems = log.problems() or [f"{log.bad_in_rounds} bad stamps"]
        raise WayFailed(f"the guest is broken: {'; '.join(problems[:3])}")


def ram_identity(pid: int) -> tuple[str, int]:
    """Device and inode of the file that most of a process's shared memory is."""
    sizes: dict[tuple[str, int], int] = {}
    with open(f"/proc/{pid}/maps") as file:
        for line in file:
            span, mode, _, device, inode, *_ = line.split()
            start, end = (int(part, 16) for part in span.split("-"))
            if mode[3] == "s" and inode != "0":
                key = device, int(inode)
                sizes[key] = sizes.get(key, 0) + end - start
    return max(sizes, key=lambda key: sizes[key], default=("", 0))
