"""Where the state ends in a stream, however it comes in."""

from __future__ import annotations

import os

import pytest

from cpr.qemu.state_end import BEGINNINGS, WORDLESS, Ending

WORDS = {
    "7.2": b'{"page_size": 4096, "devices": [{"name": "timer"}]}',
    "8.2": b'{"configuration": {"vmsd_name": "configuration"}, "page_size": 4096, "devices": []}',
}
STATE = b"QEVM\0\0\0\3" + os.urandom(3000) + b'\0\6{"page_size": {"configuration": \0\6' + b"\0" * 100 + b"~\0\0\0("


def stream(words: bytes) -> bytes:
    return STATE + b"\0\6" + len(words).to_bytes(4, "big") + words


def passed(data: bytes, size: int) -> tuple[bytes, Ending]:
    ending = Ending()
    return b"".join(ending.feed(data[at : at + size]) for at in range(0, len(data), size)), ending


@pytest.mark.parametrize("size", [1, 2, 7, 23, 24, 25, 1000, 1 << 20])
@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_the_state_is_passed_on_without_the_words(words: bytes, size: int) -> None:
    said, ending = passed(stream(words), size)
    assert said == STATE + WORDLESS
    assert ending.complete


@pytest.mark.parametrize("size", [1, 24, 1000, 1 << 20])
def test_a_state_without_words_is_passed_on_whole(size: int) -> None:
    said, ending = passed(STATE + b"\0", size)
    assert not ending.complete
    assert said + ending.release() == STATE + b"\0"
    assert ending.release() == b""


def test_it_is_complete_at_the_beginning_of_the_words() -> None:
    for beginning in BEGINNINGS:
        ending = Ending()
        mark = b"\0\6\0\0\xad\x4a" + beginning
        assert ending.feed(STATE + mark[:-1]) + ending.feed(mark[-1:]) == STATE + WORDLESS
        assert ending.complete
        assert ending.feed(b"more words") == b""
