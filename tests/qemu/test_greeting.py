"""What a monitor owes to the client before comes to the next one: events before the greeting, and replies anywhere."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from cpr.engines import mend
from cpr.qemu import first_words, qmp
from tests.kernel.support import in_call
from tests.qemu.managers import Client
from tests.qemu.parties import Qmp
from tests.qemu.surveying import start, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab

EARLY = 3
"""Clients who are to get an event first; some three of a hundred do."""
CLIENTS = 5000
"""Given up after so many."""


@pytest.fixture(params=[pytest.param("7.2", marks=pytest.mark.full), "11.1.a"])
def door(request: pytest.FixtureRequest, lab: Lab, builds: Callable[[str], QemuBuild]) -> Iterator[Path]:
    """A monitor of a QEMU that has events all the time."""
    path = lab.directory / "door"
    guest = start(lab, builds(request.param), "-S", "-qmp", f"unix:{path},server=on,wait=off")
    ended = threading.Event()

    def stir() -> None:
        monitor = Qmp(lab.directory / "guest.qmp")
        while not ended.is_set():
            for command in ("cont", "stop"):
                monitor.execute(command)

    thread = threading.Thread(target=stir)
    thread.start()
    yield path
    ended.set()
    thread.join()
    assert guest.alive


def connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(str(path))
    return sock


Session = Callable[[socket.socket], None]


def by_library(sock: socket.socket) -> None:
    with qmp.negotiate(sock, "door") as monitor:
        assert monitor.execute("query-name") == {"name": "guest"}


def by_first_words(sock: socket.socket) -> None:
    (name,) = first_words.speak(sock, [first_words.Command(name="query-name")], timeout=5)
    assert name == {"return": {"name": "guest"}}


def by_hand(sock: socket.socket) -> None:
    assert "QMP" in mend.open_session(sock, "door", timeout=5)


@pytest.mark.parametrize("session", [by_library, by_first_words, by_hand])
def test_an_event_before_the_greeting(door: Path, session: Session) -> None:
    early = 0
    for _ in range(CLIENTS):
        with connected(door) as sock:
            early += sock.recv(4096, socket.MSG_PEEK).startswith(b'{"timestamp"')
            session(sock)
        if early == EARLY:
            return
    assert early, "no event came first, nothing was tested"


DUMP = 1 << 20


@pytest.mark.parametrize("key", [pytest.param("7.2", marks=pytest.mark.full), "11.1.a"])
@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("session", [by_library, by_hand])
def test_a_reply_to_a_command_of_the_client_before(
    lab: Lab, builds: Callable[[str], QemuBuild], key: str, fails: bool, ids: bool, session: Session
) -> None:
    """He had a command under way when he hung up; what he would have heard of it, the next one hears."""
    guest = start(lab, builds(key), "-S", "-m", "64")
    door, dump = lab.directory / "guest.qmp", lab.directory / "dump"
    os.mkfifo(dump)
    command = {"execute": "pmemsave", "arguments": {"val": 0, "size": DUMP, "filename": str(dump)}}
    with contextlib.closing(Client(door)) as client:
        client.send(command | ({"id": "cpr"} if ids else {}))
        until(lambda: in_call(guest.pid, "openat"))

    def read() -> None:
        with dump.open("rb") as file:
            file.read(1 if fails else DUMP)

    with connected(door) as sock:
        later = threading.Timer(0.2, read)
        later.start()
        session(sock)
        later.join()
    assert guest.alive
