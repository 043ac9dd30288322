"""Everybody is connected at once, in mid-stream, while QEMU is replaced in place again and again: not a byte is lost.

A console client, a manager with QMP commands of 3 KB in flight, an HMP client, the guest agent's client, a port whose
stream is logged to a file, a pty, and a VNC viewer that comes while nobody accepts it.
"""

from __future__ import annotations

import contextlib
import os
import tty
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.lab import linux
from tests.lab.linux import LinuxLog
from tests.qemu.conftest import Command, qemus_of
from tests.qemu.managers import PROMPT, Flood, Person
from tests.qemu.parties import Qmp, Wire, backend_for, connected, listens, standard, unique
from tests.qemu.rounds import rounds
from tests.qemu.streams import Asker, Echo, Lines, Viewer, all_went_on, content
from tests.qemu.surveying import until
from tests.qemu.test_connections import server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab, Orphan

    Builds = Callable[[str], QemuBuild]

ROUTE = ("11.1.a", "7.2", "11.1.b", "10.0")
SOCKET_WINDOW, PTY_WINDOW = 16384, 1024
"""Bytes under way. A pty holds 4 KB, and QEMU throws away what does not fit (char_pty_chr_write)."""


@pytest.fixture
def cpr(lab: Lab) -> Command:
    return Command(lab, "reexec")


@dataclass
class Host:
    """A Linux guest with an end of everything."""

    lab: Lab
    process: Orphan
    name: str
    console: Wire
    log: LinuxLog

    def path(self, name: str) -> Path:
        return self.lab.directory / name

    @property
    def logged(self) -> bytes:
        return self.path("log").read_bytes()


@contextlib.contextmanager
def host(lab: Lab, build: QemuBuild) -> Iterator[Host]:
    name, place = unique(lab), lab.directory
    words = [
        *standard(name, "192M", backend_for(build, place / "ram"), place / "console", place / "qmp"),
        *("-cpu", "max", *linux.obtain(agent=True).arguments(), *linux.agent_arguments(place / "agent")),
        *("-device", "virtio-serial-pci,id=more"),
        *("-chardev", f"{server('echo', place / 'echo')},logfile={place / 'log'}"),
        *("-device", "virtserialport,bus=more.0,chardev=echo,name=cpr.echo.socket"),
        *("-chardev", "pty,id=pty", "-device", "virtserialport,bus=more.0,chardev=pty,name=cpr.echo.pty"),
        *("-chardev", server("hmp", place / "hmp"), "-mon", "chardev=hmp,mode=readline"),
        *("-qmp", f"unix:{place / 'second'},server=on,wait=off", "-vnc", f"unix:{place / 'vnc'}", "-vga", "std"),
    ]
    process = lab.start([*build.command, *words], name=name)
    until(lambda: not process.alive or listens(place / "console", process.pid))
    log = LinuxLog()
    with Wire(place / "console", log) as wire:
        log.wait(lambda: log.ticks, 120, "it does not tick")
        yield Host(lab, process, name, wire, log)


@contextlib.contextmanager
def pty_of(guest: Host) -> Iterator[int]:
    """Its other end, raw."""
    with Qmp(guest.path("qmp")) as monitor:
        (name,) = (c["filename"] for c in monitor.execute("query-chardev") if c["label"] == "pty")
    slave = os.open(name.removeprefix("pty:"), os.O_RDWR | os.O_NOCTTY)
    try:
        tty.setraw(slave)
        yield slave
    finally:
        os.close(slave)


def assert_keeps_people(cpr: Command, guest: Host, target: QemuBuild) -> None:
    """`cpr check` says that who is connected to the human monitor stays so, if nothing is typed in the moment."""
    with contextlib.closing(Person(guest.path("hmp"))):
        found = cpr("check", guest.name, "--qemu", target.binary, "--engine", "reexec", "--json").guest["findings"]
    of_hmp = [f["severity"] for f in found if f["check"] == "monitor-client" and f["subject"] == "hmp"]
    assert of_hmp == ["note"], found


def asks_version(person: Any, build: QemuBuild) -> None:
    assert build.version.encode() in person.types(b"info version\n", PROMPT)


@pytest.mark.parametrize("times", [pytest.param(2, marks=pytest.mark.full), rounds(50)])
@pytest.mark.timeout(1800)
def test_everybody_at_once(lab: Lab, cpr: Command, builds: Builds, times: int) -> None:
    with contextlib.ExitStack() as stack:
        guest = stack.enter_context(host(lab, builds("7.2")))
        pid = guest.process.pid
        assert_keeps_people(cpr, guest, builds(ROUTE[0]))
        person = stack.enter_context(contextlib.closing(Person(guest.path("hmp"))))
        manager = stack.enter_context(Flood(guest.path("second")))
        agent = stack.enter_context(Asker(guest.path("agent")))
        port = stack.enter_context(connected(guest.path("echo")))
        socket_echo = Echo(port.fileno(), SOCKET_WINDOW)
        pty_echo = Echo(stack.enter_context(pty_of(guest)), PTY_WINDOW)
        lines = Lines(guest.console, guest.log)
        viewer = Viewer(guest.path("vnc"), pid)
        parties = (agent, socket_echo, pty_echo, lines, viewer)
        with contextlib.ExitStack() as streams:
            for party in (socket_echo, pty_echo, lines, viewer):
                streams.enter_context(party)
            for number in range(times):
                build = builds(ROUTE[number % len(ROUTE)])
                result = cpr.update(guest.name, build)
                assert (result.code, result.guest["pid_after"]) == (0, pid), str(result)
                assert "may be lost" not in str(result.guest["notes"])
                so_far = [*(p.progress for p in parties[:-1]), number, manager.answered]
                until(lambda: all_went_on(so_far, [p.progress for p in parties] + [manager.answered]), 30)  # noqa: B023
                assert [p.error for p in (*parties, manager)] == [None] * 6
                asks_version(person, build)
        assert [p.error for p in parties] == [None] * 5
        manager.check()
        lines.check()
        assert socket_echo.received == socket_echo.sent > 0
        assert pty_echo.received == pty_echo.sent > 0
        assert guest.logged == content(0, socket_echo.received)
        assert [greeting[:4] for _, greeting in viewer.served] == [b"RFB "] * times
        assert sum(waited for waited, _ in viewer.served) >= times / 2, "the viewer was too late to wait"
        assert not guest.console.ended
        assert qemus_of(lab) == [pid]
    assert agent.error is None
    manager.check()
    assert guest.log.sound, guest.log.problems()
