"""Where the state ends in a stream, however it comes in."""

from __future__ import annotations

import os

import pytest

from cpr.qemu.state_end import BEGINNINGS, WORDLESS, Ending, Mark

WORDS = {
    "7.2": b'{"page_size": 4096, "devices": [{"name": "timer"}]}',
    "8.2": b'{"configuration": {"vmsd_name": "configuration"}, "page_size": 4096, "devices": []}',
}
STATE = b"QEVM\0\0\0\3" + os.urandom(3000) + b'\0\6{"page_size": {"configuration": \0\6' + b"\0" * 100 + b"~\0\0\0("


def stream(words: bytes) -> bytes:
    return STATE + b"\0\6" + len(words).to_bytes(4, "big") + words


def passed(data: bytes, size: int, ending: Ending) -> tuple[bytes, int]:
    """What is passed on, and how much is read."""
    said, at = b"", 0
    while at < len(data) and not ending.complete:
        more, used = ending.feed(data[at : at + size])
        assert used >= 0, "what was read cannot be put back"
        said, at = said + more, at + used
    return said, at


@pytest.mark.parametrize("size", [1, 2, 7, 23, 24, 25, 1000, 1 << 20])
@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_the_state_is_passed_on_without_the_words(words: bytes, size: int) -> None:
    ending = Ending()
    said, read = passed(stream(words), size, ending)
    assert said == STATE + WORDLESS
    assert ending.complete
    beginning = len(STATE) + len(WORDLESS)
    assert 0 <= read - beginning < max(map(len, BEGINNINGS)), "as few of the words are read as can be"
    assert ending.feed(b"more words") == (b"", 0)


@pytest.mark.parametrize("size", [1, 24, 1000, 1 << 20])
def test_a_state_without_words_is_passed_on_whole(size: int) -> None:
    ending = Ending()
    said, read = passed(STATE + b"\0", size, ending)
    assert not ending.complete
    assert read == len(STATE) + 1
    assert said + ending.release() == STATE + b"\0"
    assert ending.release() == b""


@pytest.mark.parametrize("size", [1, 25, 1 << 20])
def test_a_mark_where_none_can_be_is_passed_on_as_it_is(size: int) -> None:
    """The guest's own RAM holds one."""
    answers = [False, False, True]
    false = stream(WORDS["7.2"])
    ending = Ending(lambda _: answers.pop(0))
    said, _ = passed(false + false + stream(WORDS["8.2"]), size, ending)
    assert said == false + false + STATE + WORDLESS
    assert answers == []


def test_it_is_complete_at_the_beginning_of_the_words() -> None:
    for beginning in BEGINNINGS:
        ending = Ending()
        mark = b"\0\6\0\0\xad\x4a" + beginning
        said, read = passed(STATE + mark[:-1], 1 << 20, ending)
        assert not ending.complete
        assert read == len(STATE + mark) - 1
        assert said + ending.feed(mark[-1:])[0] == STATE + WORDLESS
        assert ending.complete


@pytest.mark.parametrize("size", [1, 6, 25, 1 << 20])
def test_the_mark_of_another_stream_is_told_from_the_guest_s_own(size: int) -> None:
    """The guest sends its own guest's state through a network card of ours, say."""
    words = WORDS["7.2"]
    first = Ending(lambda _: False)
    passed(stream(words), size, first)
    assert first.mark == Mark(footer=b"~\0\0\0(", words=len(words))
    nested = STATE[:-1] + b")" + b"\0\6" + len(words).to_bytes(4, "big") + words
    longer = STATE + b"\0\6\0\1\0\0" + words
    ending = Ending(first.mark.resembles)
    said, _ = passed(nested + longer + stream(words[:-1]), size, ending)
    assert said == nested + longer + STATE + WORDLESS
    assert not first.mark.holds
    assert Mark(footer=b"", words=40000).holds
