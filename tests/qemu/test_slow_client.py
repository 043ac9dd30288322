"""A console client that is connected and does not read: nothing that waits for it is lost, and nothing gets stuck."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from typing import TYPE_CHECKING

import pytest

from tests.lab import counting
from tests.lab.counting import CountingLog
from tests.qemu.conftest import BOTH_ENGINES, Command
from tests.qemu.faults.fault import PATIENCE, Fault
from tests.qemu.faults.moments import Script
from tests.qemu.faults.subject import killed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab
    from tests.qemu.faults.fault import Stage


@BOTH_ENGINES
def test_a_client_that_does_not_read_gets_everything_later(
    lab: Lab, cpr: Command, builds: Callable[[str], QemuBuild]
) -> None:
    with slow(lab, builds("7.2")) as client:
        result = cpr.update("slow", builds("11.1.a"))
        assert result.guest["status"] == "updated", result
        gets_everything(client)


@pytest.mark.parametrize("hangs_up", [False, pytest.param(True, marks=pytest.mark.full)])
def test_one_that_is_full_again_when_the_guest_is_stopped(
    lab: Lab, stage: Stage, builds: Callable[[str], QemuBuild], hangs_up: bool
) -> None:
    """A byte that waits in the serial port is written as soon as the new QEMU has the state: to whoever is there."""
    cpr, at = Command(lab, "reexec"), Script("reexec").at
    with slow(lab, builds("7.2")) as client:
        moments = [Fault(at=at("MakeRoom", "done"), do="wait"), Fault(at=at("LoadState", "done"), do="wait")]
        words = ("update", "--restart", "slow", "--qemu", builds("11.1.a").binary, "-y", "--json", "--engine", "reexec")
        process = cpr.start(*words, "--max-downtime", 20, **stage.environment(moments))
        try:
            announced = stage.wait()
            full(client)
            announced.go()
            loaded = stage.wait()
            if hangs_up:
                client.close()
            loaded.go()
            out, _ = process.communicate(timeout=PATIENCE)
        finally:
            if process.poll() is None:
                killed(process)
        (outcome,) = json.loads(out)["guests"]
        assert (outcome["status"], outcome["error"]) == ("updated", None)
        if not hangs_up:
            gets_everything(client)


@contextlib.contextmanager
def slow(lab: Lab, build: QemuBuild) -> Iterator[socket.socket]:
    """A client of a guest that counts, for which QEMU can write no more."""
    disk = counting.disk(lab.directory / "disk", hz=1000)
    path = lab.directory / "console"
    lab.start(
        [
            *build.command,
            *["-name", "slow", "-M", "q35,memory-backend=ram0", "-accel", "tcg", "-m", "64M"],
            *["-nodefaults", "-display", "none"],
            *["-object", "memory-backend-memfd,id=ram0,size=64M,share=on"],
            *f"-chardev socket,id=console,path={path},server=on,wait=on -serial chardev:console".split(),
            *f"-qmp unix:{lab.directory}/qmp,server=on,wait=off".split(),
            *counting.arguments(disk),
        ]
    )
    with socket.socket(socket.AF_UNIX) as client:
        connect(client, str(path))
        full(client)
        yield client


def gets_everything(client: socket.socket) -> None:
    log = CountingLog()
    client.settimeout(10)
    deadline = time.monotonic() + 60
    while len(log.ticks) < 3000 and time.monotonic() < deadline:
        log.feed(client.recv(65536))
    assert len(log.ticks) >= 3000
    assert log.problems() == []


def connect(client: socket.socket, path: str) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            client.connect(path)
            return
        except (FileNotFoundError, ConnectionRefusedError):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def full(client: socket.socket) -> None:
    """Wait until QEMU can write no more: what waits to be read does not grow."""
    import array
    import fcntl
    import termios

    waiting = array.array("i", [0])
    before, deadline = -1, time.monotonic() + 30
    while time.monotonic() < deadline:
        select.select([client], [], [], 1)
        fcntl.ioctl(client, termios.FIONREAD, waiting)
        if waiting[0] == before and before > 100:
            return
        before = waiting[0]
        time.sleep(0.3)
    raise AssertionError(f"{before} bytes and still growing")
