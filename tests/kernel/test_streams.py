"""Looking into sockets, and taking from them what was seen, with the descriptors at the byte that brought them."""

from __future__ import annotations

import array
import os
import socket
from typing import TYPE_CHECKING

import pytest

from cpr.engines.intake import LONG, Part
from cpr.linux import streams

if TYPE_CHECKING:
    from collections.abc import Iterator

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    here, there = socket.socketpair()
    with here, there:
        yield here, there


def opened() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def write(sock: socket.socket, data: bytes, *numbers: int) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", numbers))] if numbers else []
    assert sock.sendmsg([data], rights) == len(data)


def same(number: int, other: int) -> bool:
    return os.path.sameopenfile(number, other)


def test_looking_takes_nothing(pair: Pair) -> None:
    here, there = pair
    assert streams.look(there) == streams.Unread()
    write(here, b"one")
    write(here, b"two", 0)
    write(here, b"three")
    before = opened()
    for _ in range(2):
        assert streams.look(there) == streams.Unread(b"onetwo", carries=True)
        assert streams.unread(there) == 11
    assert opened() == before
    assert streams.unsent(here) > 0
    at, descriptors = streams.take_marked(there, 6)
    assert at == 3
    assert [same(number, 0) for number in descriptors] == [True]
    os.close(descriptors[0])
    assert streams.take(there, 100) == (b"three", [])
    assert streams.unsent(here) == 0
    here.close()
    with pytest.raises(EOFError):
        streams.look(there)
    with pytest.raises(EOFError):
        streams.take(there, 1)


def test_descriptors_beyond_what_is_taken_stay(pair: Pair) -> None:
    here, there = pair
    write(here, b"one")
    write(here, b"two", 0)
    assert streams.take_marked(there, 3) == (3, [])
    assert streams.look(there) == streams.Unread(b"two", carries=True)


def test_outgoing_waits_for_room_and_keeps_the_order(pair: Pair) -> None:
    here, there = pair
    outgoing = streams.Outgoing(here)
    data = os.urandom(1_000_000)
    before = len(opened())
    number = os.open("/", os.O_RDONLY)
    outgoing.put(data)
    outgoing.put(b"behind", [number])
    assert outgoing.flush()
    assert 0 < outgoing.size < len(data)
    assert not outgoing.flush()
    got, descriptors = b"", []
    while len(got) < len(data) + 6:
        part, more = streams.take(there, 65536)
        got += part
        descriptors += more
        outgoing.flush()
    assert got == data + b"behind"
    assert outgoing.size == 0
    assert len(opened()) == before + 1
    assert os.path.samestat(os.fstat(descriptors[0]), os.stat("/"))
    os.close(descriptors[0])


def test_outgoing_to_nobody(pair: Pair) -> None:
    here, there = pair
    before = opened()
    outgoing = streams.Outgoing(here)
    outgoing.put(b"x" * 1_000_000)
    outgoing.put(b"x", [os.dup(0)])
    outgoing.flush()
    assert outgoing.size > 1
    there.close()
    outgoing.flush()
    assert outgoing.broken
    assert outgoing.size == 0
    assert opened() < before


# whole messages ----------------------------------------------------------------------------------------------


def taken(part: Part, sock: socket.socket, most: int = 0) -> list[tuple[bytes, int]]:
    """Messages, and how many descriptors came with each."""
    found = []
    for data, descriptors in part.take(sock, streams.look(sock), most):
        found.append((data, len(descriptors)))
        for number in descriptors:
            os.close(number)
    return found


def test_a_message_that_is_not_all_there_is_left(pair: Pair) -> None:
    here, there = pair
    part = Part()
    write(here, b'{"a": 1}{"b"')
    assert taken(part, there) == [(b'{"a": 1}', 0)]
    assert taken(part, there) == []
    assert not part.begun
    assert streams.unread(there) == 4
    write(here, b": 2} {} {}")
    assert taken(part, there, most=2) == [(b'{"b": 2}', 0), (b" {}", 0)]
    assert taken(part, there) == [(b" {}", 0)]


def test_a_long_message_is_taken_in_parts(pair: Pair) -> None:
    here, there = pair
    part = Part()
    write(here, b'{"a": "' + b"x" * LONG)
    assert taken(part, there) == []
    assert part.begun
    assert streams.unread(there) == 0
    write(here, b'"}{}')
    assert taken(part, there) == [(b'{"a": "' + b"x" * LONG + b'"}', 0), (b"{}", 0)]
    assert not part.begun


def test_descriptors_come_with_their_message(pair: Pair) -> None:
    here, there = pair
    part = Part()
    write(here, b"{}")
    write(here, b'{"a"', 0, 0)
    assert taken(part, there) == [(b"{}", 0)]
    assert taken(part, there) == []
    assert part.begun
    write(here, b": 1}")
    assert taken(part, there) == [(b'{"a": 1}', 2)]
    write(here, b" ", 0)
    assert taken(part, there) == []
    write(here, b"{}{}")
    assert taken(part, there) == [(b" {}", 1), (b"{}", 0)]
    write(here, b"{} {}", 0)  # who of them wants it is not ours to say
    assert taken(part, there) == [(b"{} {}", 1)]
    assert not part.begun


def test_later_descriptors_replace_earlier_ones(pair: Pair) -> None:
    here, there = pair
    before = opened()
    part = Part()
    write(here, b" ", 0, 0, 0)
    assert taken(part, there) == []
    write(here, b" ", 0)
    assert taken(part, there) == []
    write(here, b"{}")
    assert taken(part, there) == [(b"  {}", 1)]
    write(here, b" ", 0)
    assert taken(part, there) == []
    part.close()
    assert opened() == before
