"""Fakes that play a QEMU's monitor at its socket's path, to see what cpr makes of nonsense. No QEMU is behind them.

Each serves every client that comes, until closed: it greets (or not), and answers (or not).
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

GREETING = (
    b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}, "capabilities": []}}\r\n'
)


def answering(reply: Callable[[dict[str, Any]], bytes]) -> Callable[[socket.socket], None]:
    """One who greets well and answers the negotiation, and everything else with `reply`."""

    def talk(client: socket.socket) -> None:
        client.sendall(GREETING)
        for request in requests(client):
            good = json.dumps({"return": {}, "id": request.get("id")}).encode() + b"\r\n"
            client.sendall(good if request["execute"] == "qmp_capabilities" else reply(request))

    return talk


def requests(client: socket.socket) -> Iterator[dict[str, Any]]:
    """What a client asks; requests stand one behind the other, with or without a line's end."""
    decoder, text = json.JSONDecoder(), ""
    while data := client.recv(4096):
        text = (text + data.decode()).lstrip()
        while text:
            try:
                request, end = decoder.raw_decode(text)
            except ValueError:
                break  # not whole yet
            yield request
            text = text[end:].lstrip()


def value(it: Any) -> Callable[[socket.socket], None]:
    """One who answers every question with the same value."""
    return answering(lambda request: json.dumps({"return": it, "id": request.get("id")}).encode() + b"\r\n")


def saying(words: bytes) -> Callable[[socket.socket], None]:
    """One who says the same to everybody, and listens for ever."""

    def talk(client: socket.socket) -> None:
        client.sendall(words)
        while client.recv(4096):
            pass

    return talk


TALKS: dict[str, Callable[[socket.socket], None]] = {
    "silent": saying(b""),
    "hangs-up": lambda _: None,
    "greets-and-hangs-up": lambda client: client.sendall(GREETING),
    "no-json": saying(b"Welcome to a monitor of another kind\r\n(qemu) "),
    "half-a-greeting": saying(GREETING[:40]),
    "not-text": saying(bytes(range(256)) * 16 + b"\r\n"),
    "another-json": saying(b"[1, 2, 3]\r\n"),
    "deep": saying(b"[" * 200000 + b"\r\n"),
    "endless-line": saying(b"x" * (1 << 22)),
    "greets-only": saying(GREETING),
    "answers-nonsense": answering(lambda _: b"\0\1\2 nonsense\r\n"),
    "answers-null": value(None),
    "answers-a-number": value(4711),
    "answers-a-list-of-lists": value([[[]]]),
    "answers-errors": answering(
        lambda r: (
            json.dumps({"error": {"class": "GenericError", "desc": "not today"}, "id": r.get("id")}).encode() + b"\r\n"
        )
    ),
    "answers-somebody-else": answering(lambda _: b'{"return": {}, "id": "of another"}\r\n'),
}


class FakeMonitor:
    """Listens at `path` until closed. A context manager."""

    def __init__(self, path: Path, talk: Callable[[socket.socket], None]) -> None:
        self._talk = talk
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._one, args=(client,), daemon=True).start()

    def _one(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, ValueError):
            self._talk(client)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
