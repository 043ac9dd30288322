"""Starting QEMUs as their users do, and ending them for certain.

A `Lab` is a context manager: a directory for sockets and logs, and the programs started in it.  They are
orphans in sessions of their own, as daemons are, so that no test is their waiting parent.  On the way out
everything is killed that was started in the lab, that a test has `adopt`ed, or that still carries the lab's
mark in its environment, which is how a QEMU's successors are found.

Out of scope: talking to QEMU (QMP), what a test asserts.
"""

import contextlib
import functools
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Generic, TypedDict, Unpack

from tests.lab import LabError, counting, linux
from tests.lab.console import Console, Log
from tests.lab.counting import CountingLog
from tests.lab.linux import LinuxLog
from tests.lab.qemu import QemuBuild

# Says which lab a process belongs to. Not CPR_...: an update leaves those out of the new QEMU's environment.
MARK = "QEMU_LAB"

# A background job of a shell that exits is an orphan at once; `setsid` then execs without a further fork,
# so that $! is the program's pid.
START = 'setsid "$@" </dev/null >>"$CPR_LAB_LOG" 2>&1 & echo $!'


class Boot(TypedDict, total=False):
    """How a guest is started.

    machine: q35 if not given.  accel: tcg.  backend: the RAM's -object without id and size, a shared memfd if
    not given, None for what QEMU does by itself.  seconds: how long it may take until the guest counts.
    """

    machine: str
    accel: str
    backend: str | None
    seconds: float


class Orphan:
    """A process that somebody else is the parent of, held by a pidfd so that its pid cannot mislead us."""

    def __init__(self, pid: int) -> None:
        """Raises ProcessLookupError if there is none."""
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)

    @property
    def alive(self) -> bool:
        """It runs.  (A zombie does not, whoever should have reaped it.)"""
        return not self.wait(0)

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Send a signal; nothing happens if it is gone."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signum)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within `seconds`."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def close(self) -> None:
        """Let go of the process without touching it."""
        os.close(self._pidfd)

    def __repr__(self) -> str:
        return f"Orphan({self.pid})"


class Guest(Generic[Log]):
    """A guest in its QEMU: the process, where its QMP socket is, its console and what it said there."""

    def __init__(self, process: Orphan, qmp: Path, console: Console[Log]) -> None:
        self.process = process
        self.qmp = qmp
        self.console = console
        self.log = console.log

    @property
    def pid(self) -> int:
        """The QEMU that was started; not that of a successor."""
        return self.process.pid


class Lab:
    """A directory and the programs started in it.  `directory` is short enough for UNIX sockets."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="cpr-lab-", dir="/tmp"))  # sockets: 107 bytes at most
        self.environment = {MARK: str(self.directory)}
        self._orphans: list[Orphan] = []
        self._consoles = contextlib.ExitStack()

    def start(
        self,
        command: Sequence[str | Path],
        *,
        name: str = "program",
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Orphan:
        """Start `command` as an orphan in its own session; its output goes to `name`.log in the directory.

        Raises LabError if it ends at once.
        """
        log = self.directory / f"{name}.log"
        shell = subprocess.run(
            ["/bin/sh", "-c", START, "sh", *map(str, command)],
            env={**os.environ, **(environment or {}), **self.environment, "CPR_LAB_LOG": str(log)},
            cwd=self.directory,
            pass_fds=pass_fds,
            stdout=subprocess.PIPE,
            check=True,
        )
        try:
            orphan = self.adopt(int(shell.stdout))
        except ProcessLookupError:
            raise LabError(f"{command[0]} ended at once: {said(log)}") from None
        if orphan.wait(0.02):
            raise LabError(f"{command[0]} ended at once: {said(log)}")
        return orphan

    def counting(
        self,
        build: QemuBuild,
        *extra: str,
        name: str = "guest",
        memory: str = "128M",
        hz: int = 100,
        pace: int | None = counting.IDLE_PACE,
        **how: Unpack[Boot],
    ) -> Guest[CountingLog]:
        """Start the counting guest and return when it counts.

        hz, pace: see `counting.disk`.  extra: further words for the command line.  Raises LabError.
        """
        disk = counting.disk(self.directory / f"{name}.disk", hz=hz, pace=pace)
        log = CountingLog()
        command = [*counting.arguments(disk), *extra]
        return self._boot(build, name, memory, command, log, lambda: log.ticks, how)

    def linux(
        self,
        build: QemuBuild,
        *extra: str,
        name: str = "guest",
        memory: str = "256M",
        words: Sequence[str] = (),
        agent: bool = False,
        **how: Unpack[Boot],
    ) -> Guest[LinuxLog]:
        """Start the Linux guest and return when it ticks.

        words: for the kernel's command line.  agent: start qemu-ga in it, to be reached at `name`.agent in
        the directory.  extra: further words for the command line.  Raises LabError.
        """
        guest = linux.obtain(agent=agent)
        log = LinuxLog()
        devices = linux.agent_arguments(self.directory / f"{name}.agent") if agent else []
        command = ["-cpu", "max", *guest.arguments(*words), *devices, *extra]
        return self._boot(build, name, memory, command, log, lambda: log.ticks, how)

    def _boot(
        self,
        build: QemuBuild,
        name: str,
        memory: str,
        words: Sequence[str],
        log: Log,
        ready: Callable[[], object],
        how: Boot,
    ) -> Guest[Log]:
        qmp, path = (self.directory / f"{name}.{kind}" for kind in ("qmp", "console"))
        backend = how.get("backend", "memory-backend-memfd,share=on")
        ram = f",memory-backend=ram0 -object {backend},id=ram0,size={memory}" if backend else ""
        command = [
            *build.command,
            *f"-name {name} -nodefaults -display none -accel {how.get('accel', 'tcg')} -m {memory}".split(),
            *f"-machine {how.get('machine', 'q35')}{ram}".split(),
            *f"-chardev socket,id=console,path={path},server=on,wait=off -serial chardev:console".split(),
            *f"-qmp unix:{qmp},server=on,wait=off".split(),
            *words,
        ]
        process = self.start(command, name=name)
        console = Console(log)
        self._consoles.callback(console.close)
        seconds = how.get("seconds", 60)
        end = time.monotonic() + seconds
        while process.alive and time.monotonic() < end and not ready():
            if not console.reading and path.exists():
                with contextlib.suppress(ConnectionRefusedError):  # bound, but not yet listening
                    console.connect(path, 0)
            with contextlib.suppress(TimeoutError):
                log.wait(ready, 0.1 if console.reading else 0.002)
        if not ready():
            reason = f"did not count within {seconds} s" if process.alive else "ended"
            raise LabError(f"{build} {reason}: {said(self.directory / f'{name}.log')}")
        return Guest(process, qmp, console)

    def adopt(self, pid: int) -> Orphan:
        """Have the process `pid` ended with the lab.  Raises ProcessLookupError."""
        orphan = Orphan(pid)
        self._orphans.append(orphan)
        return orphan

    def close(self) -> None:
        """Kill everything, wait until it is gone, remove the directory."""
        self._consoles.close()
        end = time.monotonic() + 10
        while orphans := [orphan for orphan in self._orphans if orphan.alive]:
            for orphan in orphans:
                orphan.kill()
            for orphan in orphans:
                orphan.wait(max(0.0, end - time.monotonic()))
            if time.monotonic() > end:
                break
            self._adopt_marked()  # what the killed ones may have started meanwhile
        else:
            if self._adopt_marked():
                self.close()
                return
        for orphan in self._orphans:
            orphan.close()
        self._orphans.clear()
        shutil.rmtree(self.directory, ignore_errors=True)
        if orphans:
            raise LabError(f"still running after SIGKILL: {orphans}")

    def _adopt_marked(self) -> int:
        known = {orphan.pid for orphan in self._orphans if orphan.alive}
        adopted = 0
        for pid in marked(str(self.directory)):
            if pid not in known:
                with contextlib.suppress(ProcessLookupError):
                    adopted += self.adopt(pid).alive
        return adopted

    def __enter__(self) -> "Lab":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def marked(directory: str) -> Iterator[int]:
    """The processes whose environment says that they belong to the lab at `directory`."""
    mark = f"{MARK}={directory}".encode()
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                if mark in Path("/proc", entry, "environ").read_bytes().split(b"\0"):
                    yield int(entry)


def said(log: Path) -> str:
    """The last words in a program's log."""
    try:
        return log.read_text(errors="replace")[-600:].strip() or "it said nothing"
    except FileNotFoundError:
        return "it said nothing"


@functools.cache
def kvm_works(build: QemuBuild) -> bool:
    """Whether guests run under KVM here.  /dev/kvm alone proves nothing: a guest must count."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    with Lab() as lab:
        try:
            lab.counting(build, accel="kvm", name="kvm-probe", seconds=3)
        except LabError:
            return False
        return True
