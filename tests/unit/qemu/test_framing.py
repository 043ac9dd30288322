"""Cutting what is said on a monitor, whatever is said: nothing is lost, nothing is cut in two, nothing takes long."""

from __future__ import annotations

import json
import random
import time

import pytest

from cpr.qemu import framing

QUERY = b'{"execute": "query-status", "id": 1}'


def messages(data: bytes) -> tuple[list[bytes], bytes]:
    """All whole messages, and the rest."""
    found, at = [], 0
    while end := framing.end_of_message(data, at):
        found.append(data[at:end])
        at = end
    return found, data[at:]


@pytest.mark.parametrize(
    "message",
    [
        QUERY,
        b"{}",
        b"\r\n\t {}",
        b'{"a": "}"}',
        b'{"a": "\\"}"}',
        b'{"a": "\\\\"}',
        b"{'a': '\"}'}",
        b"{'a': 'it\\'s }'}",
        b'{"a": "\\u007d\\n"}',
        b'{"a": [{"b": []}, [[]], "]"]}',
        b'{"a": -1.5e+3, "b": true, "c": null}',
        '{"a": "grüße}"}'.encode(),
        b'{"arguments": {"command-line": "info status"}, "execute": "human-monitor-command"}',
        b"[1, 2]",
        b'"text"',
        b"{]",  # QEMU: one too many ends it
        b"]",
        b",",
        b'{"a": "\n',  # what may not stand in a string ends it
        b'{"a\xff',
        b"\xff",
        b'{"a": \x01',
        b'{"a": =',
    ],
)
def test_one_message(message: bytes) -> None:
    assert messages(message) == ([message], b"")
    assert messages(message + QUERY) == ([message, QUERY], b"")
    assert messages(QUERY + message + b"\r\n") == ([QUERY, message], b"\r\n")
    for size in range(len(message)):
        assert framing.end_of_message(message[:size]) in (0, size)


@pytest.mark.parametrize("word", [b"hello", b"true", b"12.5", b"%d"])
def test_a_word_of_its_own_ends_with_what_follows(word: bytes) -> None:
    assert messages(word) == ([], word)
    assert messages(word + b" " + QUERY) == ([word, b" " + QUERY], b"")
    assert messages(word + QUERY) == ([word, QUERY], b"")


@pytest.mark.parametrize("data", [b"", b" \r\n", b"{", b'{"a": "', b'{"a": "\\', b'{"a": "\\"}', b"{'", b"[{}"])
def test_not_all_there(data: bytes) -> None:
    assert framing.end_of_message(data) == 0


def test_any_values_one_behind_the_other() -> None:
    luck = random.Random(7)  # noqa: S311

    def value(depth: int) -> object:
        kind = luck.randrange(6 if depth else 4)
        if kind == 4:
            return [value(depth - 1) for _ in range(luck.randrange(4))]
        if kind == 5:
            return {str(value(0)): value(depth - 1) for _ in range(luck.randrange(4))}
        characters = '{}[]"\\\'\n\t aé\U0001f600\x7f,:'
        return [luck.random(), None, luck.randrange(-99, 99), "".join(luck.choices(characters, k=9))][kind]

    for _ in range(300):
        written = [
            json.dumps({"execute": value(3)}, ensure_ascii=luck.random() < 0.5).encode()
            for _ in range(luck.randrange(1, 5))
        ]
        glue = luck.choice([b"", b"\r\n", b" "])
        found, rest = messages(glue.join(written))
        assert [m.strip() for m in found] == written
        assert rest == b""


@pytest.mark.parametrize(
    "data", [b'{"a": "' + b"\\\\" * 500_000, b"{" * 1_000_000, b'{"a": "' + b"x" * 1_000_000, b"\n" * 1_000_000]
)
def test_hostile_lengths_take_no_time(data: bytes) -> None:
    began = time.monotonic()
    assert framing.end_of_message(data) == 0
    assert framing.begins_command(data) in (None, False)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("data", "begins"),
    [
        (QUERY, True),
        (b'  {"execute"  :', True),
        (b"{'exec-oob': 'x'", True),
        (b'{"id": 3, "execute": "x"}', True),
        (b'{"arguments": {"a": 1}, "execute": "x"}', True),
        (b"", None),
        (b" \r\n", None),
        (b"{", None),
        (b'{"exec', None),
        (b'{"id": 3, "exe', None),
        (b'{"id": "dev0", "driver": "virtio-net"}}', False),  # within `arguments`
        (b'"execute": "x"}', False),
        (b'cute": "x"}', False),
        (b"}", False),
        (b"xxx", False),
    ],
)
def test_where_a_command_begins(data: bytes, begins: bool | None) -> None:
    assert framing.begins_command(data) is begins


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (b'ame"}' + QUERY, 5),
        (b'ame"}\r\n ' + QUERY, 8),
        (b'"}}}' + QUERY + QUERY, 4),
        (b"}" + QUERY, 1),
        (b'ame"}', 0),
        (b'ame"}\r\n', 0),
        (b'ame"}{"exec', 0),
        (b'a}{"b": {}}, {"execute": 1}', 0),
        (b'}{\\"execute\\": "}' + QUERY, 17),  # within a string that QEMU has begun to read
        (QUERY, 0),
        (b"", 0),
    ],
)
def test_where_a_command_ends_that_was_begun_before(data: bytes, size: int) -> None:
    assert framing.end_of_begun(data) == size


EVENT = b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}\r\n'
REPLY = b'{"return": {"a": "}{"}, "id": "x"}\r\n'
PRETTY = b'{\r\n    "return": {\r\n    },\r\n    "id": [\r\n        {\r\n        }\r\n    ]\r\n}\r\n'
PLAIN_PRETTY = PRETTY.replace(b"\r\n", b"\n")


@pytest.mark.parametrize("said", [[EVENT, REPLY], [PRETTY, PRETTY], [PLAIN_PRETTY, REPLY], [b"\r\n", EVENT]])
def test_lines_in_any_pieces(said: list[bytes]) -> None:
    for size in (1, 2, 7, 1000):
        lines = framing.Lines()
        data = b"".join(said) + b'{"ret'
        found = [line for at in range(0, len(data), size) for line in lines.feed(data[at : at + size])]
        assert found == said
        assert lines.rest == b'{"ret'


@pytest.mark.parametrize("message", [EVENT, REPLY, PRETTY])
def test_lines_from_the_middle_of_a_message(message: bytes) -> None:
    """The rest of it is no message, all of it comes out, and the next one is recognized."""
    for cut in range(1, len(message)):
        lines = framing.Lines()
        *before, last = lines.feed(message[cut:] + EVENT)
        assert last == EVENT
        assert b"".join(before) == message[cut:]
        assert [m for m in map(framing.parse, before) if m and {"event", "return"} & m.keys()] == []


def test_what_is_no_object_is_no_message() -> None:
    assert framing.parse(b"[1]") is None
    assert framing.parse(b"\xff") is None
    assert framing.parse(b"[" * 100_000) is None
    assert framing.parse(EVENT) == json.loads(EVENT)


@pytest.mark.parametrize(
    ("answer", "empty"),
    [
        (b"x\x1b[K", True),
        (b"(qemu) x\x1b[K", True),
        (b"VM status: running\r\n(qemu) x\x1b[K", True),
        (b"abcx\x1b[K", False),
        (b"\x1b[D\x1b[D\x1b[Dabcx\x1b[K", False),
        (b"\x1b[D\x1b[Daxbc\x1b[K\x1b[D\x1b[D", False),
        (b"*\x1b[K", False),  # a password is asked for
        (b"", None),
        (b"x", None),
        (b"x\x1b[", None),
    ],
)
def test_what_stands_on_a_line(answer: bytes, empty: bool | None) -> None:
    assert framing.stands_empty(answer) is empty
