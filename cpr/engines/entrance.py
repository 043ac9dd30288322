"""When to come in between a QMP client and QEMU (relay.py): never in the middle of a command that could be cut.

Out of scope: what cannot be seen, see relay.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpr.linux import streams
from cpr.qemu import framing

if TYPE_CHECKING:
    import socket

    from cpr.engines.graft import Swapped

LONGEST_REST = 8192
"""Bytes that fit into our socket at once."""


class Entrance:
    """Whether we may come in: nothing waits to be read, or it begins a command, or the rest of one that QEMU is reading
    is all there, with another one behind it. Then that rest goes on through us before QEMU does."""

    def __init__(self) -> None:
        self._rest = streams.Unread()
        self._unread = 0

    def is_open(self, client: socket.socket) -> bool:
        self._rest = streams.Unread()
        before, self._unread = self._unread, streams.unread(client)
        try:
            waiting = streams.look(client)
        except EOFError:
            return True
        if not waiting.data.strip() or framing.begins_command(waiting.data):
            return True
        end = framing.end_of_begun(waiting.data)
        self._rest = streams.Unread(waiting.data[:end], waiting.carries)
        return 0 < end <= LONGEST_REST and 0 != before != self._unread  # it reads, and so will read the rest of it

    def pass_rest(self, swapped: Swapped) -> None:
        data, size = self._rest.data, len(self._rest.data)
        if data:
            at = size
            descriptors: list[int] = []
            if self._rest.carries:
                at, descriptors = streams.take_marked(swapped.client, size)
            else:
                streams.take_all(swapped.client, size)
            outgoing = streams.Outgoing(swapped.ours)
            outgoing.put(data[:at])
            outgoing.put(data[at:], descriptors)
            outgoing.flush()
