"""A client of the guest agent (qemu-ga) at the host's end of its virtio-serial port: org.qemu.guest_agent.0.

    with Agent("/run/web1.qga", pid=4242) as agent:
        agent.info()             # version and enabled commands
        agent.suspend_ram()      # nobody answers: the caller watches the runstate

The other end is in the guest, which nobody trusts: an answer may never come, be for a question that somebody else asked
and gave up, be endless, or be no JSON. Every call begins with guest-sync-delimited and a fresh id; what comes before
the answer to that is dropped (qga/qapi-schema.json). A chardev socket serves one client at a time: while somebody is
connected, nobody answers us.

Blocking; one thread at a time. The standard library only, but for the way to a socket (qmp.py).

Out of scope: what a suspended guest is good for.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from cpr.errors import AgentError, AgentTimeout, CommandFailed
from cpr.qemu import answers, qmp

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")

CALL_SECONDS = 15.0
SYNC_AGAIN_SECONDS = 0.5
"""An agent that is just starting loses what it was sent: the question is put again; after twice the time each time, as
one that needs longer than this would never answer the latest."""
MAX_ANSWER = 4 << 20
"""Bytes of one answer; those asked for here are below 10 KiB."""
DELIMITER = b"\xff"


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentInfo:
    """What the agent says of itself."""

    version: str
    commands: frozenset[str]
    """Those that are enabled."""

    @property
    def can_suspend(self) -> bool:
        return "guest-suspend-ram" in self.commands


class Agent:
    """A connection to the agent of one guest; closed by `close` or the end of `with`.

    Raises, here and in every call:
        AgentTimeout: no answer in time. AgentError: nobody listens, it hung up or talks nonsense.
        CommandFailed: the agent refuses, in its own words.
    """

    def __init__(self, path: str, *, pid: int | None = None, timeout: float = CALL_SECONDS) -> None:
        """`path` as the process `pid` sees it, or as we do; `timeout` in seconds is that of each call."""
        self.address = path
        self.timeout = timeout
        self._buffer = bytearray()
        where = "\0" + path[1:] if path.startswith("@") else qmp.path_in(pid, path)
        try:
            self._socket = qmp.connect_unix(where, timeout=min(timeout, 2.0))
        except TimeoutError:
            raise AgentTimeout(path, "its queue of waiting clients is full", hint="somebody holds it") from None
        except OSError as error:
            raise AgentError(path, f"cannot connect: {error.strerror or error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up. Never raises; safe to repeat."""
        with contextlib.suppress(OSError):
            self._socket.close()

    # -- what it can do

    def ping(self) -> None:
        """It answers."""
        self._sync(time.monotonic() + self.timeout)

    def info(self) -> AgentInfo:
        return self._parsed("guest-info", parse_info)

    def suspend_ram(self) -> None:
        """Ask the guest to suspend to RAM (S3). It is sent and not answered: the runstate becomes `suspended`, or not.

        An answer that comes at once is a refusal.

        Raises:
            CommandFailed: it cannot (no S3 in the firmware, the command is disabled).
        """
        deadline = time.monotonic() + self.timeout
        self._sync(deadline)
        self._send({"execute": "guest-suspend-ram"}, deadline)
        with contextlib.suppress(AgentTimeout, _HungUp):
            self._answer("guest-suspend-ram", time.monotonic() + min(1.0, self.timeout))

    def set_time(self, seconds: float | None = None) -> None:
        """Set the guest's clock to `seconds` since the epoch, or by its own RTC.

        Raises:
            CommandFailed: a Linux guest without /sbin/hwclock, among others (qga/commands-posix.c). It depends on the
            agent's version whether the clock was set nevertheless: see `time`.
        """
        self.call("guest-set-time", **({} if seconds is None else {"time": int(seconds * 1e9)}))

    def time(self) -> float:
        """What the guest's clock says, in seconds since the epoch."""
        return self._parsed("guest-get-time", answers.number) / 1e9

    def call(self, command: str, **arguments: Any) -> Any:
        """One command and its return value."""
        deadline = time.monotonic() + self.timeout
        self._sync(deadline)
        self._send({"execute": command, **({"arguments": arguments} if arguments else {})}, deadline)
        return self._answer(command, deadline)

    # -- the wire

    def _parsed(self, command: str, parse: Callable[[Any], T]) -> T:
        reply = self.call(command)
        try:
            return parse(reply)
        except answers.NONSENSE as error:
            raise AgentError(self.address, f"answers nonsense to {command}: {str(error)[:120]}") from None

    def _sync(self, deadline: float) -> None:
        """Come to where the next line is the answer to our next question."""
        patience = SYNC_AGAIN_SECONDS
        while True:
            wanted = secrets.randbits(62) + 2
            # 0xff makes the agent's parser give up what a client before us left half said
            self._send({"execute": "guest-sync-delimited", "arguments": {"id": wanted}}, deadline, DELIMITER)
            if self._synced(wanted, min(deadline, time.monotonic() + patience), deadline):
                return
            patience *= 2

    def _synced(self, wanted: int, until: float, deadline: float) -> bool:
        """Whether the answer to `wanted` came until then. Raises AgentTimeout when `deadline` has passed."""
        while True:
            try:
                said = self._line(until)
            except AgentTimeout:
                if time.monotonic() < deadline:
                    return False
                raise
            with contextlib.suppress(ValueError, RecursionError):
                message = json.loads(said.rpartition(DELIMITER)[2])
                # where we asked several times, only the last: its answer would else be taken for the next question's
                if isinstance(message, dict) and message.get("return") == wanted:
                    return True

    def _send(self, message: dict[str, Any], deadline: float, before: bytes = b"") -> None:
        try:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            self._socket.sendall(before + json.dumps(message, separators=(",", ":")).encode() + b"\n")
        except TimeoutError:
            raise self._late(message["execute"]) from None
        except OSError as error:
            raise _HungUp(self.address, f"hung up: {error.strerror or error}") from None

    def _answer(self, command: str, deadline: float) -> Any:
        try:
            line = self._line(deadline)
        except AgentTimeout:
            raise self._late(command) from None
        try:
            message = answers.mapping(json.loads(line))
            if "error" in message:
                error = answers.mapping(message["error"])
                raise CommandFailed(command, str(error.get("class", ""))[:80], str(error.get("desc", ""))[:300])
            return message["return"]
        except answers.NONSENSE as error:
            raise AgentError(self.address, f"answers nonsense to {command}: {str(error)[:120]}") from None

    def _late(self, command: str) -> AgentTimeout:
        return AgentTimeout(
            self.address,
            f"no answer to {command} within {self.timeout:g} s",
            hint="is qemu-guest-agent running in the guest, and the guest itself?",
        )

    def _line(self, deadline: float) -> bytes:
        """The next line that is not empty, however it is cut into pieces."""
        while True:
            end = self._buffer.find(b"\n")
            if end >= 0:
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                if line.strip():
                    return line
                continue
            if len(self._buffer) > MAX_ANSWER:
                raise AgentError(self.address, f"its answer is longer than {MAX_ANSWER} bytes")
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._late("guest-sync-delimited")
            try:
                self._socket.settimeout(left)
                data = self._socket.recv(65536)
            except TimeoutError:
                continue
            except OSError as error:
                raise _HungUp(self.address, f"hung up: {error.strerror or error}") from None
            if not data:
                raise _HungUp(self.address, "hung up", hint="QEMU serves one client of this socket at a time")
            self._buffer += data


class _HungUp(AgentError):
    """QEMU closed the socket."""


def parse_info(reply: Any) -> AgentInfo:
    """guest-info's `supported_commands`."""
    members = answers.mappings(answers.mapping(reply)["supported_commands"])
    return AgentInfo(
        version=answers.text(reply["version"]),
        commands=frozenset(answers.text(m["name"]) for m in members if answers.flag(m["enabled"])),
    )
