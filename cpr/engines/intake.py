"""Taking whole QMP messages out of a socket's queue, each with the descriptors that belong to it.

What is not all there stays where it is, as far as that can be: the queue outlives us.

Out of scope: where a message ends (framing.py), what becomes of it (pump.py).
"""

from __future__ import annotations

import contextlib
import itertools
import os
from typing import TYPE_CHECKING

from cpr.linux import streams
from cpr.qemu import framing

if TYPE_CHECKING:
    import socket

LONG = 32768
"""From how many bytes on a command is taken in parts: below what fits into a socket by default (212992, with some 8 KB
of it for each write of a few bytes)."""


class Part:
    """What was taken of a message that is not all there, and the descriptors that go with it."""

    def __init__(self) -> None:
        self._data = b""
        self._descriptors: list[int] = []

    @property
    def size(self) -> int:
        """Bytes that were taken."""
        return len(self._data)

    @property
    def begun(self) -> bool:
        return bool(self._data or self._descriptors)

    def take(
        self, sock: socket.socket, waiting: streams.Unread, most: int = 0
    ) -> list[tuple[bytes, list[int]]]:
        """The whole messages among what waits, at most so many; they are taken, the rest is left as far as it can be.

        A message gets the descriptors that came with it or with blanks before it, together with those that were written
        with it in one go, as one of them wants the descriptors; later ones replace earlier ones, as in QEMU
        (chardev/char-socket.c, tcp_chr_recv).
        """
        data, already = self._data + waiting.data, len(self._data)
        ends = [0]
        while len(ends) <= (most or len(data)) and (end := framing.end_of_message(data, ends[-1])):
            ends.append(end)
        if len(ends) == 1:
            if waiting.carries or len(waiting.data) >= LONG:
                self._replace(streams.take_all(sock, len(waiting.data)))
                self._data = data
            return []
        carrier = len(data)
        brought: list[int] = []
        if waiting.carries:
            at, brought = streams.take_marked(sock, ends[-1] - already)
            carrier = already + at
        else:
            streams.take_all(sock, ends[-1] - already)
        self._data = b""
        found = []
        for begin, end in itertools.pairwise(ends):
            if begin <= carrier < end:
                self._replace(brought)
                found.append((data[begin : ends[-1]], self._descriptors))
                self._descriptors = []
                break
            found.append((data[begin:end], self._descriptors))
            self._descriptors = []
        return found

    def _replace(self, descriptors: list[int]) -> None:
        if descriptors:
            self.close()
            self._descriptors = descriptors

    def steal(self) -> tuple[bytes, list[int]]:
        data, descriptors = self._data, self._descriptors
        self._data, self._descriptors = b"", []
        return data, descriptors

    def close(self) -> None:
        for number in self._descriptors:
            with contextlib.suppress(OSError):
                os.close(number)
        self._descriptors = []
