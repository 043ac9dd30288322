"""The state on its way from the old QEMU to the new one, through us, who stop the old one where the state is complete.

A QEMU whose state is saved goes on reading its chardevs: what a client says then goes into devices that are saved
already, and is lost; a byte for a virtio port goes into a queue in RAM that the new QEMU knows otherwise. But it saves
with its big lock held, and writes some 40 KB of words about the format behind the state. So those are not read: it
stands still in the middle of them, unable to read anything, until SIGSTOP has it (qemu/state_end.py).

Out of scope: what is sent before and after, and who gets which descriptor (stream.py).
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from typing import TYPE_CHECKING

from cpr.qemu.state_end import CHUNK, SOCKET_BYTES, Ending

if TYPE_CHECKING:
    from collections.abc import Callable


SILENCE = 20
"""Milliseconds after which nothing more is expected to come at once."""


def narrow(sender: socket.socket) -> None:
    """Have the sender's end of the way hold so little that it stands still where we do not read on."""
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)


class Crossing:
    """Passes on what comes from `source` to `sink`, and back, in a thread of its own; owns both.

    Where the state is complete `stop` is called, and only after that is the new QEMU given the last bytes; nothing is
    read from `source` any more. Should one of the two hang up, the other is hung up on.
    """

    def __init__(self, source: socket.socket, sink: socket.socket, stop: Callable[[], None]) -> None:
        self._source = source
        self._sink = sink
        self._stop = stop
        self._ending = Ending()
        self._thread = threading.Thread(target=self._pass_on, name="crossing", daemon=True)
        self._thread.start()

    @property
    def complete(self) -> bool:
        """The state is; the old QEMU answers nothing any more."""
        return self._ending.complete

    def close(self) -> None:
        """Hang up on both. Safe to repeat."""
        self._hang_up()
        self._thread.join()
        self._source.close()
        self._sink.close()

    def _hang_up(self) -> None:
        for sock in (self._source, self._sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _pass_on(self) -> None:
        poll = select.poll()
        poll.register(self._source, select.POLLIN)
        poll.register(self._sink, select.POLLIN)
        try:
            while True:
                ready = poll.poll(SILENCE if self._ending.held else None)
                if not ready:
                    self._sink.sendall(self._ending.release())
                for number, _ in ready:
                    if number == self._sink.fileno():
                        self._answer()
                        continue
                    self._forward()
                    if self._ending.complete:
                        poll.unregister(self._source)
        except OSError:
            pass
        finally:
            self._hang_up()

    def _forward(self) -> None:
        data = self._source.recv(CHUNK)
        passed = self._ending.feed(data) if data else self._ending.release()
        if self._ending.complete:
            self._stop()
        self._sink.sendall(passed)
        if not data:
            raise ConnectionResetError

    def _answer(self) -> None:
        """Pass on what the new QEMU says on the return path."""
        data = self._sink.recv(CHUNK)
        if not data:
            raise ConnectionResetError
        if not self._ending.complete:
            self._source.sendall(data)
