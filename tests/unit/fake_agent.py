"""A fake guest agent that misbehaves on purpose: behind a UNIX socket, as QEMU's chardev is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Mapping

INFO = {
    "version": "10.0.2",
    "supported_commands": [
        {"name": "guest-suspend-ram", "enabled": True, "success-response": False},
        {"name": "guest-set-time", "enabled": True, "success-response": True},
        {"name": "guest-exec", "enabled": False, "success-response": True},
    ],
}


def questions(sock: socket.socket) -> Iterator[dict[str, Any]]:
    """What is asked, line by line; 0xff resets the agent's parser as it does in qga."""
    waiting = b""
    while data := sock.recv(65536):
        waiting += data
        while b"\n" in waiting:
            line, _, waiting = waiting.partition(b"\n")
            yield json.loads(line.rpartition(b"\xff")[2])


def say(sock: socket.socket, message: Any, *, delimited: bool = False) -> None:
    sock.sendall((b"\xff" if delimited else b"") + json.dumps(message).encode() + b"\n")


def agent(
    answers: Mapping[str, Any], *, first: bytes = b"", deaf_to: int = 0, asked: list[dict[str, Any]] | None = None
) -> Callable[[socket.socket], None]:
    """Sync, and answer from a table: bytes are said as they are, None is silence.

    `first` comes before the first answer; the first `deaf_to` questions are swallowed.
    """

    def script(sock: socket.socket) -> None:
        heard = 0
        for message in questions(sock):
            if asked is not None:
                asked.append(message)
            heard += 1
            if heard <= deaf_to:
                continue
            if heard == deaf_to + 1 and first:
                sock.sendall(first)
            command = message["execute"]
            if command == "guest-sync-delimited":
                say(sock, {"return": message["arguments"]["id"]}, delimited=True)
            elif command not in answers:
                say(sock, {"error": {"class": "CommandNotFound", "desc": f"Command {command} has been disabled"}})
            elif isinstance(answers[command], bytes):
                sock.sendall(answers[command])
            elif answers[command] is not None:
                say(sock, {"return": answers[command]})

    return script
