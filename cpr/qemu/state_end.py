"""Where the state is complete in what a migrating QEMU sends: the words about its format follow, which nobody needs.

    ... | footer of the last section | QEMU_VM_EOF | QEMU_VM_VMDESCRIPTION, length | {"page_size": 4096, "devices": ...

(migration/savevm.c, qemu_savevm_state_complete_precopy). QEMU writes all of that with the guest stopped and its big
lock held, and the words, 40 KB and more, are far more than a socket of `SOCKET_BYTES` takes: who stops reading at the
mark has a QEMU that can do nothing else any more, neither read what clients say nor any command, and whose state is
complete.

The stream is the guest's in parts, so it may hold a mark in a wrong place. Then what was passed on is no complete
state, and is refused by whoever loads it.

Out of scope: who reads it and what for (engines/crossing.py).
"""

from __future__ import annotations

import struct

SOCKET_BYTES = 8192
"""For SO_SNDBUF of the sender's end; the kernel doubles it."""
CHUNK = 16384
"""Bytes to read at a time: with what waits in the socket less than the words."""
MARK_BYTES = 6
"""QEMU_VM_EOF, QEMU_VM_VMDESCRIPTION, and the length of the words."""
EOF_AND_DESCRIPTION = b"\x00\x06"
BEGINNINGS = (b'{"page_size": ', b'{"configuration": ')
"""Of the words, the second from QEMU 8.2 on."""
WORDLESS = struct.pack(">2sI", EOF_AND_DESCRIPTION, 0)
"""The mark with no words behind it: who loads goes by the length (qemu_loadvm_state)."""
_HELD = MARK_BYTES + max(map(len, BEGINNINGS)) - 1


class Ending:
    """What of a stream is to be passed on, as it comes in: all up to the mark, which is passed on without words."""

    def __init__(self) -> None:
        self.complete = False
        """The mark was met; nothing of what follows is passed on."""
        self.held = b""
        """Not yet passed on: what may be the beginning of the mark."""

    def feed(self, data: bytes) -> bytes:
        """The next bytes to pass on."""
        if self.complete:
            return b""
        data = self.held + data
        if (mark := _mark(data)) is not None:
            self.complete, self.held = True, b""
            return data[:mark] + WORDLESS
        at = max(0, len(data) - _HELD)
        self.held = data[at:]
        return data[:at]

    def release(self) -> bytes:
        """What is held, as nothing more comes: a machine with `suppress-vmdesc=on` has no words."""
        held, self.held = self.held, b""
        return held


def _mark(data: bytes) -> int | None:
    """Where it is."""
    for beginning in BEGINNINGS:
        at = data.find(beginning)
        while at >= 0:
            mark = at - MARK_BYTES
            if mark >= 0 and data.startswith(EOF_AND_DESCRIPTION, mark):
                return mark
            at = data.find(beginning, at + 1)
    return None
