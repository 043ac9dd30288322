"""Borrowing a human monitor (HMP) that somebody holds: at its prompt with nothing typed, and nothing passes meanwhile.

What a line editor holds cannot be carried over to another QEMU, and it echoes every byte, so nobody can type there
between a client's bytes unseen. So a session is borrowed only when it is idle: its client then waits, and what it types
waits in the kernel until `give_back`. To see whether it is, a letter is typed and taken back: an empty line answers to
that by showing the letter alone. The client does not see it. Where something stood on the line, it gets its connection
back at once and sees its line drawn anew.

A letter that comes in the middle of an escape sequence of the client (an arrow key, whose bytes come one by one) is
swallowed, and the sequence is broken.

If we die meanwhile, `mend.repair` gives the client its session back.

Out of scope: QMP (relay.py).
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from cpr.engines import graft
from cpr.engines.mend import open_human_session
from cpr.errors import MonitorError
from cpr.linux import streams
from cpr.qemu import clients, framing, qmp

if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.engines.graft import Kept, Stopped, Swapped
    from cpr.linux.process import Process
    from cpr.linux.tracer import Tracer

ANSWER_SECONDS = 0.5
"""A main loop that is alive echoes within milliseconds; one that does not is busy with a command."""
AGAIN_SECONDS = 0.02
GIVE_BACK_SECONDS = 5.0


class Typed:
    """A human monitor at its prompt, and we in the place of its client. Used by one thread at a time."""

    def __init__(self, process: Process, name: str, number: int, swapped: Swapped) -> None:
        self.name = name
        self.number = number
        """The accepted descriptor in QEMU that is the client's."""
        self.kept: Kept = swapped.kept
        self.stopped: list[Stopped] = [swapped.stopped]
        self._process = process
        self._client = swapped.client
        self._ours = swapped.ours
        self._to_client = streams.Outgoing(swapped.client)
        self._gone = False
        self._ready = False

    @classmethod
    def borrow(
        cls, process: Process, tracer: Tracer, number: int, *, name: str = "monitor", until: float
    ) -> Self:
        """Take the place of the client of QEMU's accepted descriptor `number` while it is idle.

        Raises:
            TimeoutError: it was not by `until` (time.monotonic): something is typed, a command runs or a password is
            awaited. StepFailed: the client hung up. ConnectionError: the tracer died. OSError. In all cases the client
            has its connection back.
        """
        stops: list[Stopped] = []
        while True:
            swapped = graft.swap_in(process, tracer, number, _nothing_waits, until)
            stops.append(swapped.stopped)
            typed = cls(process, name, number, swapped)
            typed.stopped = stops
            try:
                if typed._is_idle(tracer):
                    return typed
            except BaseException:
                with contextlib.suppress(Exception):
                    typed._put_back(tracer, number, time.monotonic() + GIVE_BACK_SECONDS)
                raise
            if time.monotonic() > until:
                raise TimeoutError(f"{name}: its client is not at an empty prompt, looked {len(stops)} times")
            time.sleep(AGAIN_SECONDS)

    def _is_idle(self, tracer: Tracer) -> bool:
        """Whether nothing is typed and no command runs; if it is not so, the client has its connection back."""
        self._ours.send(framing.PROBE)
        answer = b""
        while True:
            answer = self._read(lambda said: framing.stands_empty(said) is not None, ANSWER_SECONDS, answer)
            empty = framing.stands_empty(answer)
            if empty is not None:
                break
            if not streams.unsent(self._ours):  # swallowed
                self._leave(tracer, answer)
                return False
            with contextlib.suppress(TimeoutError):  # it is read after all
                self._leave(tracer, answer, while_so=lambda: streams.unsent(self._ours) > 0)
                return False
        self._ours.send(framing.UNDO)
        undone = self._read(lambda said: b"\x1b[K" in said, ANSWER_SECONDS)
        if not (empty and undone == framing.UNDONE):
            self._leave(tracer, answer + undone)
            return False
        self._to_client.put(answer.removesuffix(framing.SHOWN))
        self._to_client.flush()
        return True

    def _leave(self, tracer: Tracer, said: bytes, while_so: Callable[[], bool] = lambda: True) -> None:
        """Give the connection back, if it is still so. Raises as `_put_back`; TimeoutError: it is not."""
        until = time.monotonic() + (GIVE_BACK_SECONDS if while_so() else 0.0)
        self._put_back(tracer, self.number, until, lambda: while_so() and self._tell(said))

    def _tell(self, said: bytes) -> bool:
        self._to_client.put(said)
        return True

    def _read(self, enough: Callable[[bytes], bool], seconds: float, said: bytes = b"") -> bytes:
        """What is said until it is enough or the time is up, `said` before."""
        until = time.monotonic() + seconds
        while not enough(said) and (left := until - time.monotonic()) > 0:
            if select.select([self._ours], [], [], left)[0]:
                said += self._take()
                if self._gone:
                    break
        return said

    def _take(self) -> bytes:
        try:
            return streams.take(self._ours, streams.LIMIT)[0]
        except BlockingIOError:
            return b""
        except (EOFError, OSError):
            self._gone = True
            return b""

    def execute(self, line: str, *, timeout: float = GIVE_BACK_SECONDS) -> str:
        """Type a command of ours, unseen by the client; what it said.

        Raises:
            MonitorError: no prompt within `timeout` seconds.
        """
        self._ours.sendall(line.encode() + b"\n" + framing.PROBE)
        end = framing.PROMPT + framing.SHOWN
        said = self._read(lambda said: said.endswith(end), timeout)
        if not said.endswith(end):
            raise MonitorError(self.name, f"no prompt after {line!r}")
        self._ours.sendall(framing.UNDO)
        self._read(lambda said: said.endswith(framing.UNDONE), timeout)
        return said.partition(b"\r\n")[2].removesuffix(end).decode(errors="replace").replace("\r\n", "\n")

    @property
    def client_number(self) -> int:
        """Descriptor of ours that is the client's connection."""
        return self._client.fileno()

    def move(self, process: Process, number: int) -> None:
        """QEMU is another process now, which has the client's connection as `number`. Call `reconnect` then."""
        self._process = process
        self.kept = replace(self.kept, number=number)

    def reconnect(self, sock: socket.socket, timeout: float = qmp.GREETING_SECONDS) -> None:
        """QEMU is another one now: `sock` is a fresh connection to it, of ours from here on, which stands at its prompt
        when this returns.

        Raises:
            MonitorError: there is no prompt. OSError.
        """
        try:
            open_human_session(sock, self.name, timeout=timeout)
        except BaseException:
            sock.close()
            raise
        self._ours.close()
        self._ours = sock
        self._gone = False

    def give_back(
        self, tracer: Tracer, number: int | None = None, *, timeout: float = GIVE_BACK_SECONDS
    ) -> None:
        """Have the client's connection take the place of the accepted descriptor `number` of QEMU (of the one that it
        was, if not given), which stands at its prompt. Then this object is of no use any more.

        Raises:
            TimeoutError: the client has no room for what was said to it. ConnectionError: the tracer died. StepFailed:
            no such descriptor. OSError. The client's connection is still kept then.
        """
        widened = bool(self._to_client.size) and clients.widen(self._client)
        try:
            self._put_back(tracer, self.number if number is None else number, time.monotonic() + timeout)
        finally:
            if widened:
                clients.narrow(self._client)

    def _put_back(
        self, tracer: Tracer, number: int, until: float, ready: Callable[[], bool] = lambda: True
    ) -> None:
        """When it is `ready`, after which nothing may stop it but a client without room."""

        def delivered() -> bool:
            if not self._ready and not ready():
                return False
            self._ready = True
            while data := self._take():
                self._to_client.put(data)
            self._to_client.flush()
            return not self._to_client.size

        self._ready = False
        self.stopped.append(graft.surely_put_back(self._process, tracer, self.kept, number, delivered, until))
        self.close()

    def close(self) -> None:
        """Let go. Where the client has not got its connection back, QEMU sees it hang up."""
        self._to_client.close()
        self._ours.close()
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _nothing_waits(client: socket.socket) -> bool:
    with contextlib.suppress(EOFError):
        return not streams.look(client).data
    return True
