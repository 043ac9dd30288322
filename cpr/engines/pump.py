"""The thread that passes whole QMP messages between a client, QEMU and ourselves.

    client ─────► pump ─────► QEMU      commands, each with its descriptors
       ▲           │ ▲
       └── replies ┤ └─────── ourselves, with ids of our own
           events  └────────► ourselves: our replies, every event

A client's command is taken out of the kernel's queue only when all of it is there, so what we hold of it when we die is
little: nothing while its commands are `held`. Only one that is longer than the queue, or whose descriptors have to be
taken to see what follows, is taken in parts.

Out of scope: how the pump gets between the two (graft.py), and what is said (relay.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from cpr.engines.intake import Part
from cpr.linux import streams
from cpr.qemu import framing

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

STEPS = 50
"""After how many steps others may ask something."""
EVENT_MASK = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET


class Pump:
    """Passes messages from `start` to `close`. Everything is done, and may be asked, under `changed`."""

    def __init__(self, client: socket.socket, qemu: socket.socket, *, hide: Collection[str]) -> None:
        self.changed = threading.Condition()
        self.hide = frozenset(hide)
        self.held = True
        """No further command of the client is passed on."""
        self.unsure = True
        """Nobody knows yet whether QEMU's parser holds the beginning of a command: nothing is sent to it."""
        self.cut = False
        """It does: the client went on in the middle of one."""
        self.client_gone = False
        self.qemu_gone = False
        self.passed = 0
        """Messages of the client that were passed on."""
        self.answered = 0
        """Replies that were passed to it."""
        self.hidden: dict[str, int] = {}
        """Events that were not, by name."""
        self.greeting: dict[str, Any] = {}
        self.error: BaseException | None = None
        self._client = client
        self._qemu = qemu
        self._own: socket.socket | None = None
        self._to_client = streams.Outgoing(client)
        self._to_qemu = streams.Outgoing(qemu)
        self._to_own: streams.Outgoing | None = None
        self._lines = framing.Lines()
        self._parts = {"client": Part(), "own": Part()}
        self._prefix = f"cpr-{secrets.token_hex(16)}-"
        self._count = 0
        self._asked: dict[str, Any] = {}
        """By our id: the id that our client gave its command, or _ASKED."""
        self._replies: dict[str, dict[str, Any]] = {}
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        for sock in (client, qemu):
            self._epoll.register(sock, EVENT_MASK)
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop; what was not delivered is lost. The sockets are closed but for the client's."""
        with self.changed:
            self._closing = True
            self.wake()
        if self._thread.ident is not None:
            self._thread.join()
        self._to_client.close()
        self._to_qemu.close()
        for part in self._parts.values():
            part.close()
        self._qemu.close()
        if self._own is not None:
            self._own.close()
        self._epoll.close()
        os.close(self._wake)

    # what is asked of it, with `changed` held ------------------------------------------------------------------

    def wake(self) -> None:
        os.eventfd_write(self._wake, 1)

    def wait(self, ready: Callable[[], Any], until: float, *, of_qemu: bool = True) -> bool:
        """Wait, without holding up the pump, until it is so, the pump failed or, if it is QEMU's to do, QEMU is gone.
        Whether it is so."""
        over = lambda: ready() or (of_qemu and self.qemu_gone) or self.error is not None
        self.wake()
        self.changed.wait_for(over, max(0.0, until - time.monotonic()))
        return bool(ready())

    def connect_own(self) -> socket.socket:
        """A new channel for ourselves: what speaks on it is greeted, negotiates, and does not see other ids than its
        own. One that there was is hung up."""
        ours, theirs = socket.socketpair()
        self._drop_own()
        self._own, self._to_own = theirs, streams.Outgoing(theirs)
        self._parts["own"] = Part()
        self._epoll.register(theirs, EVENT_MASK)
        self._to_own.put(json.dumps(self.greeting).encode() + b"\r\n")
        self.wake()
        return ours

    def ask(self, command: str, key: str = "execute") -> str:
        """Send a command of our own; `reply` has the answer under what is returned."""
        asked = self._next_id(_ASKED)
        self._to_qemu.put(json.dumps({key: command, "id": asked}).encode() + b"\n")
        self.wake()
        return asked

    def reply(self, asked: str) -> dict[str, Any] | None:
        return self._replies.get(asked)

    def go_on_with(self, qemu: socket.socket) -> None:
        """QEMU is another one now, negotiated; all was said with the old one."""
        with contextlib.suppress(OSError, ValueError):
            self._epoll.unregister(self._qemu)
        self._qemu.close()
        self._qemu = qemu
        self._to_qemu.close()
        self._to_qemu = streams.Outgoing(qemu)
        self._lines = framing.Lines()
        self._asked.clear()
        self.qemu_gone = False
        self._epoll.register(qemu, EVENT_MASK)

    @property
    def undelivered(self) -> int:
        """Bytes for the client which it has no room for."""
        return self._to_client.size

    @property
    def delivered(self) -> bool:
        """The client has everything, or is gone."""
        return self.client_gone or not self._to_client.size

    @property
    def unsent(self) -> int:
        """Bytes for QEMU that it has no room for."""
        return self._to_qemu.size

    @property
    def begun(self) -> bool:
        """A part of a client's command was taken out of its queue, and the rest may come."""
        return self._parts["client"].begun and not self.client_gone

    @property
    def at_rest(self) -> bool:
        """No command of ours is under way, and nothing of QEMU's that is not all there."""
        return not (self._asked or self._to_qemu.size or self._lines.rest)

    def tell_client(self, message: dict[str, Any]) -> None:
        self._to_client.put(json.dumps(message).encode() + b"\r\n")
        self.wake()

    def drain(self) -> None:
        """Pass on what QEMU has said so far: all of it, if it stands still."""
        self._from_qemu()
        self._to_client.flush()

    def hand_over(self) -> None:
        """Before the client's connection is given back: what was taken of a command goes on, and what QEMU had begun
        to say before us."""
        data, descriptors = self._parts["client"].steal()
        if data or descriptors:
            self._to_qemu.put(data, descriptors)
            self._to_qemu.flush()
        if self._lines.rest:
            self._to_client.put(self._lines.rest)
            self._lines = framing.Lines()
            self._to_client.flush()

    # the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                for number, events in self._epoll.poll():
                    if number == self._wake:
                        with contextlib.suppress(BlockingIOError):
                            os.eventfd_read(self._wake)
                    elif number == self._client.fileno() and events & (select.EPOLLHUP | select.EPOLLRDHUP):
                        self.client_gone = True
                with self.changed:
                    if all(not self._closing and self._step() for _ in range(STEPS)):
                        self.wake()
                    self.changed.notify_all()
        except BaseException as error:  # whoever waits is told
            with self.changed:
                self.error = error
                self.changed.notify_all()

    def _step(self) -> bool:
        """Do what can be done now. Whether there may be more."""
        did = self._from_qemu()
        did |= self._to_client.flush()
        did |= self._from_own()
        did |= self._from_client()
        did |= self._to_qemu.flush()
        if self._to_own is not None:
            did |= self._to_own.flush()
        return did

    def _from_client(self) -> bool:
        part = self._parts["client"]
        if self.qemu_gone or self._to_qemu.size or (self.held and not part.begun and not self.unsure):
            return False
        try:
            waiting = streams.look(self._client)
        except (EOFError, OSError):
            self.client_gone = True
            return False
        if self.unsure and not part.begun:
            begins = framing.begins_command(waiting.data)
            self.cut = begins is False
            self.unsure = begins is not True
            return False
        before = part.size
        messages = part.take(self._client, waiting, most=1 if self.held else 0)
        for message, descriptors in messages:
            self._to_qemu.put(message, descriptors)
            self.passed += 1
        return bool(messages) or part.size != before

    def _from_own(self) -> bool:
        if self._own is None or self.unsure or self._to_qemu.size or self.qemu_gone:
            return False
        part = self._parts["own"]
        before = part.size
        try:
            messages = part.take(self._own, streams.look(self._own))
        except (EOFError, OSError):
            self._drop_own()
            return True
        for data, descriptors in messages:
            self._own_command(data, descriptors)
        return bool(messages) or part.size != before

    def _own_command(self, data: bytes, descriptors: list[int]) -> None:
        message = framing.parse(data) or {}
        if message.get("execute") == "qmp_capabilities":
            self._tell_own({"return": {}, **{k: v for k, v in message.items() if k == "id"}})
            return
        message["id"] = self._next_id(message.get("id", _NO_ID))
        self._to_qemu.put(json.dumps(message).encode() + b"\n", descriptors)

    def _next_id(self, theirs: Any) -> str:
        self._count += 1
        asked = f"{self._prefix}{self._count}"
        self._asked[asked] = theirs
        return asked

    def _tell_own(self, message: dict[str, Any]) -> None:
        if self._to_own is not None:
            self._to_own.put(json.dumps(message).encode() + b"\r\n")

    def _drop_own(self) -> None:
        if self._own is not None and self._to_own is not None:
            self._to_own.flush()
            self._to_own.close()
            with contextlib.suppress(OSError, ValueError):
                self._epoll.unregister(self._own)
            self._own.close()
            self._own = self._to_own = None

    def _from_qemu(self) -> bool:
        if self.qemu_gone:
            return False
        try:
            data, descriptors = streams.take(self._qemu, streams.LIMIT)
        except BlockingIOError:
            return False
        except (EOFError, OSError):
            self.qemu_gone = True
            self._drop_own()
            return False
        for number in descriptors:  # QEMU sends none
            os.close(number)
        for line in self._lines.feed(data):
            self._from_qemu_line(line)
        return True

    def _from_qemu_line(self, line: bytes) -> None:
        message = framing.parse(line)
        if message is None:
            self._to_client.put(line)
            return
        asked = message.get("id")
        if "event" in message:
            name = str(message["event"])
            self._tell_own(message)
            if name in self.hide:
                self.hidden[name] = self.hidden.get(name, 0) + 1
                return
        elif isinstance(asked, str) and asked.startswith(self._prefix):
            theirs = self._asked.pop(asked, _ASKED)
            if theirs is _ASKED:
                self._replies[asked] = message
                return
            del message["id"]
            self._tell_own(message if theirs is _NO_ID else {**message, "id": theirs})
            return
        else:
            self.answered += 1
        self._to_client.put(line)


_NO_ID, _ASKED = object(), object()
