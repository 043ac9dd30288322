"""The way of a state to several readers, without QEMUs."""

from __future__ import annotations

import os
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from cpr.qemu import state_stream
from cpr.qemu.state_stream import SHUT_FAILED, Tee, device_state

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 5_000_000


class Way:
    """A sender, a tee, and readers with deadlines."""

    def __init__(self, readers: int) -> None:
        self.sender, source = socket.socketpair()
        pairs = [socket.socketpair() for _ in range(readers)]
        self.readers = [reader for reader, _ in pairs]
        self.tee = Tee(source, [sink for _, sink in pairs])
        for sock in (self.sender, *self.readers):
            sock.settimeout(10)

    def close(self) -> None:
        self.tee.fail()
        for sock in (self.sender, *self.readers):
            sock.close()


@pytest.fixture
def way() -> Iterator[Way]:
    it = Way(2)
    yield it
    it.close()


def read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (part := sock.recv(1 << 16)):
        data += part
    return data


def test_every_reader_gets_all_of_it_at_its_own_pace(way: Way) -> None:
    data = os.urandom(SIZE)
    sending = threading.Thread(target=way.sender.sendall, args=(data,))
    sending.start()
    got = [read(reader, SIZE) for reader in way.readers]  # the second only when the first has all
    sending.join()
    assert got == [data, data]


def test_the_sender_hears_that_it_failed_and_then_nothing(way: Way) -> None:
    way.tee.fail()
    assert read(way.sender, 100) == SHUT_FAILED
    assert way.sender.recv(1) == b""
    way.tee.fail()


def test_a_reader_that_hangs_up_does_not_keep_the_other_waiting(way: Way) -> None:
    way.readers[0].close()
    sending = threading.Thread(target=way.sender.sendall, args=(bytes(SIZE),))
    sending.start()
    assert read(way.readers[1], SIZE) == bytes(SIZE)
    sending.join()


def test_a_reader_that_has_hung_up_before_the_first_bytes(way: Way) -> None:
    """It is found out in the sending, while its socket is still waited for."""
    way.readers[0].close()
    for part in (b"first", b"then more" * 1000):
        way.sender.sendall(part)
        received = b""
        while len(received) < len(part):
            received += way.readers[1].recv(1 << 16)
        assert received == part


def test_what_readers_say_is_not_passed_on(way: Way) -> None:
    way.readers[0].sendall(bytes(SIZE))
    way.sender.sendall(b"on it goes")
    assert read(way.readers[1], 10) == b"on it goes"
    way.tee.fail()
    assert read(way.sender, 100) == SHUT_FAILED


def test_the_sender_waits_for_a_reader_that_does_not_read(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_stream, "WAITING", 1 << 20)
    way.sender.settimeout(0.5)
    with pytest.raises(TimeoutError):
        way.sender.sendall(bytes(8 * SIZE))


class Told:
    """A monitor whose QEMU, which is we, writes a stream."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.given = -1

    def send_fd(self, name: str, number: int) -> None:
        self.given = os.dup(number)

    def execute(self, command: str, **arguments: Any) -> None:
        self.commands.append(command)
        if command == "xen-save-devices-state":
            assert arguments["live"] is False
            with open(arguments["filename"], "wb") as file:
                file.write(b"QEVM\0\0\0\3" + b"devices")
        else:
            os.close(self.given)


def test_the_machine_type_is_added_to_the_state_of_the_devices() -> None:
    told = Told()
    stream = device_state(told, os.getpid(), "pc-q35-7.2")  # type: ignore[arg-type]
    assert stream == b"QEVM\0\0\0\3" + b"\7\0\0\0\x0apc-q35-7.2" + b"devices" + b"\6\0\0\0\0"
    assert told.commands == ["xen-save-devices-state", "closefd"]
