"""Clients in the queue of a listening socket: ours are taken out of it, nobody else's."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from cpr.linux.fds import Fd
from cpr.qemu import clients
from tests.qemu.surveying import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=["unix", "tcp"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    if request.param == "unix":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(tmp_path / "socket"))
            sock.listen(4)
            yield sock
    else:
        with socket.create_server(("127.0.0.1", 0), backlog=4) as sock:
            yield sock


def client(listener: socket.socket) -> socket.socket:
    sock = socket.socket(listener.family, socket.SOCK_STREAM)
    sock.connect(listener.getsockname())
    return sock


def withdraw(listener: socket.socket, ours: socket.socket | None = None) -> bool:
    with Fd(os.dup(listener.fileno())) as fd:
        return clients.withdraw(fd, os.getpid(), ours)


def nobody_waits(listener: socket.socket) -> bool:
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()
    return True


def test_ours_is_taken_out(listener: socket.socket) -> None:
    with client(listener) as ours:
        assert withdraw(listener, ours)
        assert not withdraw(listener, ours)
        assert ours.recv(1) == b""
    assert nobody_waits(listener)


def test_one_that_has_hung_up_is_taken_out(listener: socket.socket) -> None:
    client(listener).close()
    until(lambda: withdraw(listener))  # of TCP it takes a moment until the other side has heard of it
    assert nobody_waits(listener)


def test_somebody_else_keeps_the_place(listener: socket.socket) -> None:
    with client(listener) as first, client(listener) as ours:
        assert not withdraw(listener, ours)
        assert not withdraw(listener)
        accepted, _ = listener.accept()
        with accepted:
            first.sendall(b"x")
            assert accepted.recv(1) == b"x"
        assert withdraw(listener, ours)
    assert nobody_waits(listener)


def test_a_listener_goes_on_as_it_did(listener: socket.socket) -> None:
    with client(listener) as ours:
        assert withdraw(listener, ours)
    assert os.get_blocking(listener.fileno())


def test_a_descriptor_that_was_given_is_found_under_a_number_that_was_another_ones() -> None:
    """A viewer hung up just then, and its number was free."""
    other, memory = os.open(os.devnull, os.O_RDONLY), os.memfd_create("given")
    try:
        before = clients.descriptor_targets(os.getpid())
        assert clients.given(os.getpid(), before, memory) == []
        os.dup2(memory, other)
        assert clients.given(os.getpid(), before, memory) == [other]
        more = os.dup(memory)
        assert sorted(clients.given(os.getpid(), before, memory)) == sorted([other, more])
        os.close(more)
    finally:
        os.close(other)
        os.close(memory)
