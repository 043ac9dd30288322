"""What is made of the guests' words."""

import itertools
import socket
import struct
from pathlib import Path

import pytest

from tests.lab import tap
from tests.lab.console import Console, largest_gap
from tests.lab.counting import BadStamp, CountingLog
from tests.lab.linux import LinuxLog


def counted(text: bytes) -> CountingLog:
    log = CountingLog()
    log.feed(text, 1.0)
    return log


def test_count_is_read_in_whatever_pieces_it_comes() -> None:
    text = b"SeaBIOS\r\n\nhello counting 1 pages 100 tsc ff\nc 1 10\nc 2 20\nround 7 bad 0\ne 41\nc 3 3f\nc 4"
    for size in (1, 3, 1000):
        log = CountingLog()
        for when, start in enumerate(range(0, len(text), size)):
            log.feed(text[start : start + size], float(when))
        assert [(tick.number, tick.tsc) for tick in log.ticks] == [(1, 16), (2, 32), (3, 63)]
        assert (log.number, log.round, log.pages, log.starts, bytes(log.echoed)) == (3, 7, 100, 1, b"A")
        assert log.sound
        assert log.largest_tsc_gap() == 31
        assert log.problems() == []


def test_lost_and_repeated_ticks() -> None:
    log = counted(b"c 5 1\nc 6 2\nc 9 3\nc 9 4\nc 8 5\nc 9 6\n")
    assert log.lost == [(6, 9)]
    assert log.repeated == [(9, 9), (9, 8)]
    assert not log.contiguous
    assert "count goes from 6 to 9" in log.problems()


def test_bad_pages_complaints_and_restarts() -> None:
    log = counted(
        b"hello counting 1 pages 9 tsc 1\nc 1 1\nBAD page 1234ff0 want 17 got 16\nBAD register\n"
        b"round 18 bad 1\nhello counting 1 pages 9 tsc 1\nc 1 1\n"
    )
    assert log.bad == [BadStamp(0x1234FF0, 17, 16)]
    assert log.bad[0].page == 0x1234000
    assert log.complaints == ["BAD register"]
    assert log.bad_in_rounds == 1
    assert log.starts == 2
    assert len(log.problems()) == 4


def test_damaged_line_is_noticed_unless_we_came_late() -> None:
    assert counted(b"2 10\nc 3 11\n").sound
    log = counted(b"c 1 1\nc 2\nc 3 4\n")
    assert log.garbled == ["c 2"]
    assert not log.contiguous


def test_gaps() -> None:
    assert largest_gap([]) == 0
    assert largest_gap([1, 2, 5, 6]) == 3
    assert largest_gap([1, 2, 5, 6], since=5.5) == 1
    assert largest_gap([1, 2], until=9) == 7


def test_linux_guests_words() -> None:
    log = LinuxLog()
    log.feed(b"boot abc\ntick 0 1.50\ndisk ok 0\ncpu 0 0\ntick 1 1.51\ncpu 0 1\ndisk ok 10\ne hi there\n", 1)
    assert log.sound
    assert (log.boot_ids, log.disk_ok, log.cpus, log.echoed) == (["abc"], 10, {0: 1}, ["hi there"])
    log.feed(b"tick 3 1.40\ndisk BAD 7 read back as: x\n[ 2.0] BUG: soft lockup\nboot def\ncpu 0 3\n", 2)
    assert log.problems() == [
        "count goes from 1 to 3",
        "disk BAD 7 read back as: x",
        "[ 2.0] BUG: soft lockup",
        "cpu 0 counts from 1 to 3",
        "booted 2 times",
        "the uptime went back",
    ]


def test_wait_says_what_did_not_happen() -> None:
    with pytest.raises(TimeoutError, match=r"not 2 more ticks within 0\.01 s; console: .*c 1 1"):
        counted(b"c 1 1\n").wait_ticks(2, 0.01)


def test_console_reconnects_when_the_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "console"
    with Console(CountingLog()) as console:
        for number in (1, 2):
            path.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))
                server.listen()
                if number == 1:
                    console.connect(path)
                peer = server.accept()[0]
                peer.sendall(b"c %d 1\n" % number)
                console.log.wait(lambda number=number: console.log.number == number)  # type: ignore[misc]
                console.send(b"x")
                assert peer.recv(1) == b"x"
                peer.close()
        assert console.log.contiguous


def test_console_listens_and_follows(tmp_path: Path) -> None:
    with Console(CountingLog()).listen(tmp_path / "socket") as console:
        for number in (1, 2):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(str(tmp_path / "socket"))
                peer.sendall(b"c %d 1\n" % number)
            console.log.wait(lambda wanted=number: console.log.number == wanted)  # type: ignore[misc]
    with Console(CountingLog()).follow(tmp_path / "file") as console:
        (tmp_path / "file").write_bytes(b"c 1 1\n")
        console.log.wait(lambda: console.log.number == 1)


def test_numbers_are_what_seq_prints() -> None:
    take = tap.numbers()
    expected = b"".join(b"%d\n" % number for number in range(1, 3001))
    got = b"".join(take(size) for size in itertools.islice(itertools.cycle((1, 7, 1000)), 30))
    assert got == expected[: len(got)]


def test_ping_has_a_right_checksum() -> None:
    for number in (0, 1, 0x1FFFF):
        total = sum(struct.unpack("!8H", tap.echo_request(0xBEEF, number)))
        while total > 0xFFFF:
            total = (total & 0xFFFF) + (total >> 16)
        assert total == 0xFFFF
