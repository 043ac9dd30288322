"""Where the messages on a monitor's connection begin and end.

What a client says is cut as QEMU's own parser does it (qobject/json-lexer.c, json-streamer.c): a message ends when all
braces and brackets are closed or one too many is; strings have double or single quotes; a byte that may stand nowhere
ends whatever it stands in. So also what QEMU answers with an error is one message, and comes out as it went in.

What QEMU says are lines: each message ends with one, and has no line end within, but with pretty=on, where only the
closing brace begins a line (monitor/qmp.c, qmp_send_response).

Out of scope: sockets, and what the messages mean.
"""

from __future__ import annotations

import json
import re
from typing import Any

_BLANK = re.compile(rb"[ \t\r\n]*+")
_BETWEEN = re.compile(rb"[ \t\r\n\w.+%,:-]*+")
_WORD = re.compile(rb"[\w.+%-]*+")
_STRING = {
    ord('"'): re.compile(rb'"(?:[^"\\\x00-\x1f\xfe\xff]++|\\[^\x00-\x1f\xfe\xff])*+'),
    ord("'"): re.compile(rb"'(?:[^'\\\x00-\x1f\xfe\xff]++|\\[^\x00-\x1f\xfe\xff])*+"),
}
_CHANGE = {ord("{"): (1, 0), ord("}"): (-1, 0), ord("["): (0, 1), ord("]"): (0, -1)}
_BEGINNING = re.compile(rb"""\{[ \t\r\n]*(["'])(execute|exec-oob)\1[ \t\r\n]*:""")
_NEXT = re.compile(rb"""\}[ \t\r\n]*(?=\{[ \t\r\n]*"(execute|exec-oob)"[ \t\r\n]*:)""")
_PRETTY_END = re.compile(rb"\n\}\r?\n")

PROMPT = b"(qemu) "
PROBE, UNDO = b"x", b"\x7f"
"""What is typed into a readline to see what stands there, and what takes it away again."""
SHOWN, UNDONE = b"x\x1b[K", b"\x1b[D\x1b[K"
"""What an empty line answers to them (util/readline.c, readline_update)."""


def end_of_message(data: bytes, start: int = 0) -> int:
    """Where the message that begins at `start`, blanks before it included, ends; 0 where it is not all there."""
    at = _end(_BLANK, data, start)
    braces = brackets = 0
    while at < len(data):
        byte = data[at]
        if byte in _CHANGE:
            brace, bracket = _CHANGE[byte]
            braces, brackets, at = braces + brace, brackets + bracket, at + 1
        elif byte in _STRING:
            at = _end(_STRING[byte], data, at)
            if data[at:] in (b"", b"\\"):
                return 0
            if data[at] != byte:
                return at + 1  # what may not stand in a string
            at += 1
        elif (word := _end(_WORD, data, at)) > at:
            if word == len(data):
                return 0
            at = word
        else:
            return at + 1  # nothing may begin so
        if braces < 0 or brackets < 0 or not (braces or brackets):
            return at
        at = _end(_BETWEEN, data, at)
    return 0


def _end(pattern: re.Pattern[bytes], data: bytes, at: int) -> int:
    found = pattern.match(data, at)
    return found.end() if found else at


def begins_command(data: bytes) -> bool | None:
    """Whether a command of a client begins here, blanks before it left out; None where too little is there to tell.

    It does where its first member says so. Where that is another one (`id`, `arguments`), there may be such an object
    within a command as well: it is one of its own if all of it is there and it has a member `execute`.
    """
    data = data.lstrip(b" \t\r\n")
    if not data:
        return None
    if not data.startswith(b"{"):
        return False
    if _BEGINNING.match(data):
        return True
    end = end_of_message(data)
    if not end:
        return None
    message = parse(data[:end])
    return message is not None and bool({"execute", "exec-oob"} & message.keys())


def end_of_begun(data: bytes) -> int:
    """Where a command ends whose beginning was read before, if another one follows; else 0.

    Behind a closing brace no object may follow but at the top, and within a string its quotes could not stand so.
    """
    found = _NEXT.search(data)
    return found.end() if found else 0


def parse(data: bytes) -> dict[str, Any] | None:
    """The JSON object that it is, or None."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class Lines:
    """Cuts what QEMU says into whole messages, each with its line end. It may begin in the middle of one.

    What is no message comes out as well, line by line, so that all of it in order is all that went in.
    """

    def __init__(self) -> None:
        self._rest = b""

    @property
    def rest(self) -> bytes:
        """The beginning of a message that is not all there."""
        return self._rest

    def feed(self, data: bytes) -> list[bytes]:
        self._rest += data
        if b"\n" not in data:
            return []
        found = []
        at = 0
        while (end := self._rest.find(b"\n", at) + 1) > 0:
            if self._rest[at:end].strip() == b"{":
                pretty = _PRETTY_END.search(self._rest, end - 1)
                if pretty is None:
                    break
                end = pretty.end()
            found.append(self._rest[at:end])
            at = end
        self._rest = self._rest[at:]
        return found


def stands_empty(answer: bytes) -> bool | None:
    """From what a readline answered to PROBE: whether nothing was typed before it. None: not all of it is there.

    A line that is not empty is shown again as a whole. Output of a command may come before, with the prompt behind.
    """
    if not answer.endswith(b"\x1b[K") and not re.search(rb"\x1b\[K(\x1b\[D)+$", answer):
        return None
    before = answer.removesuffix(SHOWN)
    return answer.endswith(SHOWN) and (not before or before.endswith(b"\n" + PROMPT) or before == PROMPT)
