"""The state on its way from the old QEMU to the new one, through us, who stop the old one where the state is complete.

A QEMU whose state is saved goes on reading its chardevs: what a client says then goes into devices that are saved
already, and is lost; a byte for a virtio port goes into a queue in RAM that the new QEMU knows otherwise. But it saves
with its big lock held, and writes some 40 KB of words about the format behind the state. So those are not read: it
stands still in the middle of them, unable to read anything, until SIGSTOP has it (qemu/state_end.py).

Out of scope: what is sent before and after, and who gets which descriptor (stream.py).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from typing import TYPE_CHECKING

from cpr.qemu.state_end import CHUNK, SOCKET_BYTES, Ending

if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.qemu.state_end import Mark


LAST = 4
"""Bytes that the new QEMU has to wait for."""
SILENCE = 5
"""Milliseconds after which nothing more is expected to come at once."""


def narrow(sender: socket.socket) -> None:
    """Have the sender's end of the way hold so little that it stands still where we do not read on."""
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)


class Crossing:
    """Passes on what comes from `source` to `sink`, and back, in a thread of its own; owns both.

    Where the state is complete `stop` is called, and only after that is the new QEMU given the last bytes; nothing is
    read from `source` any more. `genuine`: whether the state can be complete by now.

    The old QEMU is only hung up on by `hang_up`: its migration fails then, and it runs the guest by itself. Whatever
    else ends, it stays where it is, as long as somebody has `source` (stream.py).
    """

    def __init__(
        self,
        source: socket.socket,
        sink: socket.socket,
        stop: Callable[[], None],
        genuine: Callable[[Mark], bool] = lambda _: True,
    ) -> None:
        self._source = source
        self._sink = sink
        self._stop = stop
        self._ending = Ending(genuine)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._closed = False
        self._thread = threading.Thread(target=self._pass_on, name="crossing", daemon=True)
        self._thread.start()

    @property
    def complete(self) -> bool:
        """The state is; the old QEMU answers nothing any more."""
        return self._ending.complete

    def hang_up(self) -> None:
        """Tell the old QEMU that nobody reads what it writes: only when the new one is dead. Safe to repeat."""
        if not self._closed:
            _shut(self._source)
        self.close()

    def close(self) -> None:
        """Let go of both. Safe to repeat."""
        if self._closed:
            return
        self._closed = True
        os.eventfd_write(self._wake, 1)
        _shut(self._sink)  # or it would wait for a new QEMU that does not read
        self._thread.join()
        self._source.close()
        self._sink.close()
        os.close(self._wake)

    def _pass_on(self) -> None:
        source, sink = self._source.fileno(), self._sink.fileno()
        poll = select.poll()
        for number in (source, sink, self._wake):
            poll.register(number, select.POLLIN)
        with contextlib.suppress(OSError):
            while True:
                ready = {number for number, _ in poll.poll(SILENCE if self._ending.held else None)}
                if self._wake in ready:
                    return
                if not ready:
                    self._sink.sendall(self._ending.release())
                if sink in ready:
                    self._answer()
                if source in ready:
                    self._forward()
                    if self._ending.complete:
                        poll.unregister(source)
        if not self._ending.complete:
            _shut(self._sink)

    def _forward(self) -> None:
        passed, more = self._ending.receive(self._source)
        if not self._ending.complete:
            self._sink.sendall(passed)
            if not more:
                raise ConnectionResetError
            return
        self._sink.sendall(passed[:-LAST])  # it loads that while the old one is stopped
        self._stop()
        self._sink.sendall(passed[-LAST:])
        self._sink.shutdown(socket.SHUT_WR)  # who has no complete state by now fails at once

    def _answer(self) -> None:
        """Pass on what the new QEMU says on the return path."""
        data = self._sink.recv(CHUNK)
        if not data:
            raise ConnectionResetError
        if not self._ending.complete:
            self._source.sendall(data)


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
