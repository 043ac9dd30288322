"""A console on a real terminal: raw while the guest runs, and as it was found when the last of its QEMUs has ended."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import subprocess
import sys
import termios
import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.lab import counting
from tests.qemu.conftest import Command
from tests.qemu.parties import Qmp, backend_for, unique
from tests.qemu.surveying import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab

    Builds = Callable[[str], QemuBuild]

IN_ITS_SESSION = (
    "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """A pty, one end of which is a QEMU's terminal; what comes out of it is read."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        modes = termios.tcgetattr(self.slave)
        modes[0] |= termios.IXANY  # not what it begins with
        termios.tcsetattr(self.slave, termios.TCSANOW, modes)
        self.said = bytearray()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self.master, 65536):
                self.said += data

    def state(self) -> tuple[Any, ...]:
        modes = termios.tcgetattr(self.slave)
        return modes[:6], modes[6], fcntl.fcntl(self.slave, fcntl.F_GETFL) & os.O_NONBLOCK


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    it = Terminal()
    yield it
    os.close(it.slave)
    os.close(it.master)


@pytest.fixture
def cpr(lab: Lab) -> Command:
    return Command(lab, "reexec")


@contextlib.contextmanager
def on(terminal: Terminal, lab: Lab, build: QemuBuild, *console: str) -> Iterator[subprocess.Popen[bytes]]:
    disk = counting.disk(lab.directory / "disk", hz=100, pace=40)
    ram = f"{backend_for(build, lab.directory / 'ram')},id=ram0,size=32M"
    words = [
        *f"-name {unique(lab)} -nodefaults -display none -accel tcg -m 32M -machine q35,memory-backend=ram0".split(),
        *("-object", ram, "-qmp", f"unix:{lab.directory / 'qmp'},server=on,wait=off", *console),
        *counting.arguments(disk),
    ]
    ends = dict.fromkeys(("stdin", "stdout", "stderr"), terminal.slave)
    command = [sys.executable, "-c", IN_ITS_SESSION, *build.command, *words]
    with subprocess.Popen(command, **ends, env={**os.environ, **lab.environment}) as process:  # type: ignore[call-overload]
        lab.adopt(process.pid)
        try:
            until(lambda: b"c 5 " in terminal.said)
            yield process
        finally:
            process.kill()


def goes_on(terminal: Terminal) -> None:
    there = len(terminal.said)
    until(lambda: len(terminal.said) > there + 100)


@pytest.mark.parametrize(
    "console",
    [
        ("-serial", "stdio"),
        pytest.param(("-serial", "mon:stdio"), marks=pytest.mark.full),
        pytest.param(("-chardev", "stdio,id=c0,signal=off", "-serial", "chardev:c0"), marks=pytest.mark.full),
    ],
    ids=lambda words: words[-1],
)
@pytest.mark.parametrize("route", ["7.2 11.1.a", pytest.param("7.2 10.0 11.1.a 7.2", marks=pytest.mark.full)])
def test_the_modes_are_put_back_at_the_end(
    lab: Lab, cpr: Command, builds: Builds, terminal: Terminal, console: tuple[str, ...], route: str
) -> None:
    first, *rest = route.split()
    before = terminal.state()
    with on(terminal, lab, builds(first), *console) as process:
        raw = terminal.state()
        assert raw[1:] != before[1:] or raw[0] != before[0]
        for key in rest:
            result = cpr.update(unique(lab), builds(key))
            assert (result.code, result.guest["pid_after"]) == (0, process.pid), str(result)
            assert not [note for note in result.guest["notes"] if "terminal" in note]
            assert terminal.state() == raw
            goes_on(terminal)
        with Qmp(lab.directory / "qmp") as monitor, contextlib.suppress(EOFError):
            monitor.execute("quit")
        assert process.wait(20) == 0
    assert terminal.state() == before
