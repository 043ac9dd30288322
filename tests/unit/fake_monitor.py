"""A fake QMP server that misbehaves on purpose: no real QEMU talks nonsense when asked to."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}, "capabilities": []}}


class FakeMonitor:
    """Listens at `path` and gives every connection to `script`."""

    def __init__(self, path: Path, script: Callable[[socket.socket], None]) -> None:
        self.path = str(path)
        self._script = script
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._open.append(sock)
                threading.Thread(target=self._talk, args=(sock,), daemon=True).start()

    def _talk(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self._script(sock)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._thread.join(5)


def saying(data: bytes, *, hang_up: bool = True) -> Callable[[socket.socket], None]:
    """Say this and hang up (or stay silent)."""

    def script(sock: socket.socket) -> None:
        sock.sendall(data)
        if hang_up:
            sock.shutdown(socket.SHUT_RDWR)
        else:
            threading.Event().wait(30)

    return script


def messages(sock: socket.socket) -> Iterator[dict[str, Any]]:
    """JSON objects as they come, with nothing between them."""
    waiting = ""
    while data := sock.recv(65536):
        waiting += data.decode()
        while waiting.lstrip():
            try:
                message, end = json.JSONDecoder().raw_decode(waiting.lstrip())
            except ValueError:
                break
            waiting = waiting.lstrip()[end:]
            yield message


def answering(answers: Mapping[str, Any], *, cut: str = "") -> Callable[[socket.socket], None]:
    """Greet, negotiate, and answer commands from a table; the answer to `cut` ends in the middle.

    What is not in the table is CommandNotFound.
    """

    def script(sock: socket.socket) -> None:
        sock.sendall(json.dumps(GREETING).encode() + b"\r\n")
        for message in messages(sock):
            command = message["execute"]
            if command == "qmp_capabilities":
                reply: dict[str, Any] = {"return": {}}
            elif command in answers:
                reply = {"return": answers[command]}
            else:
                reply = {"error": {"class": "CommandNotFound", "desc": f"{command} has not been found"}}
            echoed = {"id": message["id"]} if "id" in message else {}
            data = json.dumps({**reply, **echoed}).encode() + b"\r\n"
            if command == cut:
                sock.sendall(data[: len(data) // 2])
                sock.shutdown(socket.SHUT_RDWR)
                return
            sock.sendall(data)

    return script
