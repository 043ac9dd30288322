"""The guest agent of the host VM: commands over a virtio-serial port, each with a deadline.

The socket stays open while the host VM boots another kernel, so an answer may be of an agent that is gone, and a
request may have been swallowed by one that was going.  Hence every conversation begins with a
``guest-sync-delimited`` of an id that was never used before, sent again twice a second until it is answered, and an
answer that does not come in time ends the conversation.

Out of scope: what to run (see ``vm``).
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RESEND_SECONDS = 0.5
STEP_SECONDS = 0.1
HANGUP_SECONDS = 2.0

_ids = itertools.count(os.getpid() << 20)


class AgentError(Exception):
    """The agent refused a command."""


class AgentSilent(TimeoutError):
    """The agent did not answer in time."""


@dataclass(frozen=True)
class Ended:
    """How a program in the host VM ended. code: negative for a signal."""

    code: int
    out: bytes
    err: bytes


class Agent:
    """Talks to the agent at the UNIX socket `path`; `check` is called all the while and may raise."""

    def __init__(self, path: Path, check: Callable[[], None]) -> None:
        self._path = path
        self._check = check
        self._socket: socket.socket | None = None
        self._buffer = b""
        self._synced = False

    def close(self) -> None:
        """Hang up."""
        self._synced = False
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def sync(self, seconds: float) -> None:
        """Wait until an agent answers that reads what we send now.  Raises AgentSilent."""
        end = time.monotonic() + seconds
        self._synced = False
        while time.monotonic() < end:
            self._check()
            try:
                if self._synchronized(min(RESEND_SECONDS, max(0.05, end - time.monotonic()))):
                    self._synced = True
                    return
            except OSError:
                self.close()
                time.sleep(0.02)
        raise AgentSilent(f"the guest agent of the host VM did not answer within {seconds:g} s")

    def _synchronized(self, seconds: float) -> bool:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(str(self._path))
            self._buffer = b""
        number = next(_ids)
        # 0xff has the agent's parser throw away half a command that somebody left behind
        self._send("guest-sync-delimited", {"id": number}, b"\xff")
        end = time.monotonic() + seconds
        while (answer := self._answer(end)) is not None:
            if answer.get("return") == number:
                return True
        return False

    def call(self, command: str, seconds: float = 5.0, **arguments: Any) -> Any:
        """Execute a command of the agent.  Raises AgentError, AgentSilent."""
        end = time.monotonic() + seconds
        if not self._synced:
            self.sync(seconds)
        try:
            self._send(command, arguments)
            answer = self._answer(end)
        except OSError as error:
            self.close()
            self._see_why(end)
            raise AgentSilent(f"{command}: {error}") from error
        if answer is None:
            self._synced = False
            raise AgentSilent(f"{command}: no answer within {seconds:g} s")
        if "error" in answer:
            raise AgentError(f"{command}: {answer['error']}")
        return answer["return"]

    def _see_why(self, end: float) -> None:
        """A host VM that ends hangs up first; whoever waits shall hear that it has ended."""
        end = min(end, time.monotonic() + HANGUP_SECONDS)
        while time.monotonic() < end:
            self._check()
            time.sleep(STEP_SECONDS)

    def run(self, words: list[str], seconds: float, given: bytes = b"") -> Ended:
        """Run a program to its end.  Raises AgentSilent if it takes longer."""
        end = time.monotonic() + seconds
        pid = self.start(words, given)
        pause = 0.02
        while True:
            status = self.call("guest-exec-status", pid=pid)
            if status["exited"]:
                code = status.get("exitcode", -status.get("signal", 0))
                return Ended(code, decoded(status, "out-data"), decoded(status, "err-data"))
            if time.monotonic() > end:
                self.start(["/bin/kill", "-KILL", str(pid)])
                raise AgentSilent(f"{words[-1]!r} did not end within {seconds:g} s")
            time.sleep(pause)
            pause = min(0.2, pause * 1.5)

    def start(self, words: list[str], given: bytes = b"") -> int:
        """Start a program and return its pid."""
        arguments: dict[str, Any] = {"path": words[0], "arg": words[1:], "capture-output": True}
        if given:
            arguments["input-data"] = base64.b64encode(given).decode()
        started = self.call("guest-exec", **arguments)
        return int(started["pid"])

    def _send(self, command: str, arguments: dict[str, Any], before: bytes = b"") -> None:
        assert self._socket is not None
        self._socket.settimeout(2.0)
        request = {"execute": command, "arguments": arguments}
        self._socket.sendall(before + json.dumps(request).encode() + b"\n")

    def _answer(self, end: float) -> dict[str, Any] | None:
        """The next whole answer, or None at `end`."""
        assert self._socket is not None
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                try:
                    answer = json.loads(line.rpartition(b"\xff")[2])
                except ValueError:
                    continue  # of somebody who was interrupted
                if isinstance(answer, dict):
                    return answer
                continue
            self._check()
            if (left := end - time.monotonic()) <= 0:
                return None
            self._socket.settimeout(min(STEP_SECONDS, left))
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                continue
            if not data:
                raise ConnectionResetError("the host VM hung up")
            self._buffer += data


def decoded(status: dict[str, Any], name: str) -> bytes:
    """One of the outputs in an answer to guest-exec-status."""
    if status.get(name.replace("data", "truncated")):
        raise AgentError(f"{name} is not all there was")
    return base64.b64decode(status.get(name, ""))
