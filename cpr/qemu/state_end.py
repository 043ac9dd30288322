"""Where the state is complete in what a migrating QEMU sends: the words about its format follow, which nobody needs.

    ... | footer of the last section | QEMU_VM_EOF | QEMU_VM_VMDESCRIPTION, length | {"page_size": 4096, "devices": ...

(migration/savevm.c, qemu_savevm_state_complete_precopy). QEMU writes all of that with the guest stopped and its big
lock held, and the words, 40 KB and more, are far more than a socket of `SOCKET_BYTES` takes: who stops reading at the
mark has a QEMU that can do nothing else any more, neither read what clients say nor any command, and whose state is
complete.

The stream is the guest's in parts, so it may hold a mark in a wrong place. `Ending` asks before it believes in one; and
what was passed on then is no complete state, and is refused by whoever loads it and sees its end. Where that would be
too late, the mark is compared with that of a state which was saved before: the section that it follows is the same, and
the words are about as long.

Out of scope: who reads it and what for (engines/crossing.py).
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SOCKET_BYTES = 8192
"""For SO_SNDBUF of the sender's end; the kernel doubles it."""
CHUNK = 16384
"""Bytes to look at a time."""
MARK_BYTES = 6
"""QEMU_VM_EOF, QEMU_VM_VMDESCRIPTION, and the length of the words."""
EOF_AND_DESCRIPTION = b"\x00\x06"
BEGINNINGS = (b'{"page_size": ', b'{"configuration": ')
"""Of the words, the second from QEMU 8.2 on."""
WORDLESS = struct.pack(">2sI", EOF_AND_DESCRIPTION, 0)
"""The mark with no words behind it: who loads goes by the length (qemu_loadvm_state)."""
FOOTER_BYTES = 5
"""QEMU_VM_SECTION_FOOTER and the number of the section that ends."""
_HELD = FOOTER_BYTES + MARK_BYTES + max(map(len, BEGINNINGS)) - 1
_DIFFERENCE = 8192
"""By how much the words of two states of one guest may differ in length: parts of a state come and go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What was seen at the end of a state."""

    footer: bytes
    """Of the last section."""
    words: int
    """Bytes."""

    def resembles(self, other: Mark) -> bool:
        """Whether it may be that of another state of the same guest."""
        return self.footer == other.footer and abs(self.words - other.words) <= _DIFFERENCE

    @property
    def holds(self) -> bool:
        """Whether a QEMU that nobody reads from stands still in the middle of the words."""
        return self.words > 2 * SOCKET_BYTES


class Ending:
    """What of a stream is to be passed on, as it comes in: all up to the mark, which is passed on without words."""

    def __init__(self, genuine: Callable[[Mark], bool] = lambda _: True) -> None:
        """genuine: asked of a mark, whether the state can be complete at all."""
        self.complete = False
        """The mark was met; nothing of what follows is passed on."""
        self.mark: Mark | None = None
        """The last that was met, genuine or not."""
        self.held = b""
        """Not yet passed on: what may be the beginning of the mark."""
        self._genuine = genuine
        self._asked = 0
        """Up to there what is held has no mark that was not asked about."""

    def feed(self, data: bytes) -> tuple[bytes, int]:
        """What to pass on next, and how many bytes of `data` are used up: not those behind the mark, but for some where
        the beginning of the words came in parts."""
        if self.complete:
            return b"", 0
        before, data = len(self.held), self.held + data
        at = self._asked
        while (mark := _mark(data, at)) is not None:
            (words,) = struct.unpack_from(">I", data, mark + len(EOF_AND_DESCRIPTION))
            self.mark = Mark(footer=data[max(0, mark - FOOTER_BYTES) : mark], words=words)
            if self._genuine(self.mark):
                self.complete, self.held = True, b""
                return data[:mark] + WORDLESS, max(0, mark + len(WORDLESS) - before)
            at = mark + 1
        keep = max(0, len(data) - _HELD)
        self._asked = max(0, at - keep)
        self.held = data[keep:]
        return data[:keep], len(data) - before

    def receive(self, sock: socket.socket) -> tuple[bytes, bool]:
        """What to pass on next of what has come in on `sock`, and whether more may come. Raises OSError as `recv`."""
        data = sock.recv(CHUNK, socket.MSG_PEEK)
        if not data:
            return self.release(), False
        passed, used = self.feed(data)
        while used:
            used -= len(sock.recv(used))
        return passed, True

    def release(self) -> bytes:
        """What is held, as nothing more comes: a machine with `suppress-vmdesc=on` has no words."""
        held, self.held = self.held, b""
        return held


def _mark(data: bytes, start: int) -> int | None:
    """Where the first one is from there on."""
    found = []
    for beginning in BEGINNINGS:
        at = data.find(beginning, start)
        while at >= 0:
            mark = at - MARK_BYTES
            if mark >= start and data.startswith(EOF_AND_DESCRIPTION, mark):
                found.append(mark)
                break
            at = data.find(beginning, at + 1)
    return min(found, default=None)
