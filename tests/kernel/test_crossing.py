"""The way of a state through us, with sockets of this process for the two QEMUs."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from cpr.engines.crossing import Crossing, narrow
from cpr.qemu.state_end import WORDLESS

if TYPE_CHECKING:
    from collections.abc import Iterator

STATE = os.urandom(300_000)
WORDS = b'{"page_size": 4096, "devices": [' + b" " * 40_000 + b"]}"


class Way:
    """Both QEMUs' ends of it. `stopped` has what the new one had got when the old one was stopped."""

    def __init__(self) -> None:
        self.old, source = socket.socketpair()
        self.new, sink = socket.socketpair()
        self.also_ours = source.dup()
        narrow(self.old)
        self.stopped: list[bytes] = []
        self.crossing = Crossing(source, sink, self._stop)
        self.got = b""
        self.sent: list[BaseException | None] = []
        for sock in (self.old, self.new):
            sock.settimeout(10)

    def _stop(self) -> None:
        self.stopped.append(self.got)
        time.sleep(0.05)

    def send(self, data: bytes) -> threading.Thread:
        def work() -> None:
            try:
                self.old.sendall(data)
                self.sent.append(None)
            except OSError as error:
                self.sent.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    def receive(self, size: int) -> bytes:
        while len(self.got) < size and (part := self.new.recv(1 << 16)):
            self.got += part
        return self.got

    def close(self) -> None:
        self.also_ours.close()
        self.crossing.hang_up()
        self.old.close()
        self.new.close()


@pytest.fixture
def way() -> Iterator[Way]:
    it = Way()
    yield it
    it.close()


def mark(words: bytes) -> bytes:
    return b"\0\6" + len(words).to_bytes(4, "big") + words


def test_the_old_one_stands_still_in_its_words_and_the_new_one_has_all(way: Way) -> None:
    sending = way.send(STATE + mark(WORDS))
    assert way.receive(len(STATE) + len(WORDLESS)) == STATE + WORDLESS
    assert way.crossing.complete
    assert len(way.stopped) == 1
    assert len(way.stopped[0]) < len(STATE + WORDLESS), "the new one had all before the old one was stopped"
    sending.join(0.2)
    assert sending.is_alive(), "the old one could write all its words"
    assert way.sent == []
    way.crossing.hang_up()
    sending.join(10)
    assert isinstance(way.sent[0], BrokenPipeError | ConnectionResetError)


def test_the_old_one_stands_still_for_good_where_it_has_our_end_too(way: Way) -> None:
    """Whatever becomes of us or of the new one."""
    sending = way.send(STATE + mark(WORDS))
    way.receive(len(STATE) + len(WORDLESS))
    with way.also_ours:
        way.new.close()
        way.crossing.close()
        sending.join(0.2)
        assert sending.is_alive()
        way.also_ours.shutdown(socket.SHUT_RDWR)
        sending.join(10)
        assert isinstance(way.sent[0], BrokenPipeError | ConnectionResetError)


def test_the_new_one_sees_the_end_of_what_only_looks_like_a_state(way: Way) -> None:
    way.send(STATE + mark(WORDS))
    assert way.receive(len(STATE) * 2) == STATE + WORDLESS
    assert way.new.recv(1) == b""


def test_a_state_without_words_comes_through_and_nobody_is_stopped(way: Way) -> None:
    way.send(STATE + b"\0")
    assert way.receive(len(STATE) + 1) == STATE + b"\0"
    assert way.stopped == []
    assert not way.crossing.complete


def test_answers_come_back(way: Way) -> None:
    way.new.sendall(b"PONG")
    assert way.old.recv(10) == b"PONG"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_new_one_that_hangs_up_does_not_let_the_old_one_go_on(way: Way, when: str) -> None:
    """It may not be dead."""
    sending = way.send(STATE + mark(WORDS)) if when == "after" else None
    if sending is not None:
        way.receive(len(STATE) + len(WORDLESS))
    way.new.close()
    if sending is None:
        sending = way.send(STATE)
    sending.join(0.2)
    assert sending.is_alive()
    assert way.sent == []


def test_an_old_one_that_hangs_up_leaves_the_new_one_with_an_end(way: Way) -> None:
    way.old.shutdown(socket.SHUT_RDWR)
    assert way.new.recv(1) == b""


def test_a_new_one_that_does_not_read_holds_nobody_up_at_the_end(way: Way) -> None:
    sending = way.send(STATE * 10)
    time.sleep(0.1)
    began = time.monotonic()
    way.crossing.hang_up()
    sending.join(5)
    assert time.monotonic() - began < 1
    assert not sending.is_alive()
