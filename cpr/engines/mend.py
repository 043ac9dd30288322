"""New sessions, and a client's session given back after we died who had borrowed it (relay.py, typed.py).

QEMU took our end for its client's and listens again; the client's own connection is kept in QEMU, open, and
nobody reads it. So a new session is opened, negotiated as the client's was, and the connection takes its place.

Out of scope: how it is known what is kept where (the journal of the run).
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import time
from typing import TYPE_CHECKING, Any

from cpr.engines import graft
from cpr.errors import MonitorError
from cpr.linux import fds, streams
from cpr.qemu import clients, framing, qmp

if TYPE_CHECKING:
    from cpr.engines.graft import Kept
    from cpr.linux.process import Process
    from cpr.linux.tracer import Tracer
    from cpr.model import MonitorAddress

SECONDS = 5.0


def open_session(sock: socket.socket, name: str, *, oob: bool = False, timeout: float) -> dict[str, Any]:
    """Await the greeting and negotiate; the greeting. What else is said meanwhile is passed over: events, and what QEMU
    owes to the client before.

    Raises:
        MonitorError: it does not greet within `timeout` seconds, hangs up or refuses. OSError.
    """
    mark = f"cpr-{secrets.token_hex(4)}"
    negotiation = {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"] if oob else []}, "id": mark}
    lines = framing.Lines()
    greeting: dict[str, Any] = {}
    sock.settimeout(timeout)
    try:
        while True:
            data = sock.recv(streams.LIMIT)
            if not data:
                raise MonitorError(name, "QEMU hung up")
            for message in filter(None, map(framing.parse, lines.feed(data))):
                if "QMP" in message:
                    greeting = message
                    sock.sendall(json.dumps(negotiation).encode())
                elif message.get("id") != mark:
                    continue
                elif "return" in message:
                    return greeting
                elif "error" in message:
                    raise MonitorError(name, f"negotiation: {message['error']}")
    except TimeoutError:
        raise MonitorError(name, f"no greeting within {timeout:g} s") from None
    finally:
        sock.settimeout(None)  # else Python waits, whatever the call says


def open_human_session(sock: socket.socket, name: str, *, timeout: float) -> None:
    """Await the first prompt on a new connection.

    Raises:
        MonitorError: it does not come within `timeout` seconds. OSError.
    """
    said = b""
    sock.settimeout(timeout)
    try:
        while not said.endswith(framing.PROMPT):
            data = sock.recv(streams.LIMIT)
            if not data:
                raise MonitorError(name, "QEMU hung up")
            said += data
    except TimeoutError:
        raise MonitorError(name, f"no prompt within {timeout:g} s") from None
    finally:
        sock.settimeout(None)


def repair(
    process: Process,
    tracer: Tracer,
    address: MonitorAddress,
    kept: Kept,
    *,
    human: bool = False,
    oob: bool = False,
    first: bytes = b"",
    timeout: float = SECONDS,
) -> None:
    """Give a client its session back after we died: QEMU listens at `address` again, and keeps the client's connection.

    `human`, `oob`: what the session is; `first` is said to the client before all else. Commands that a relay had passed
    on are not answered any more; nor has QEMU file descriptor sets any more that were given and not used
    (monitor/qmp.c: CHR_EVENT_CLOSED).

    Raises:
        StepFailed: it is not kept there. MonitorHeld, MonitorError: QEMU does not serve us: another client came, or it
        hangs. TimeoutError, ConnectionError, OSError: as `graft.put_back`. The connection is kept on.
    """
    until = time.monotonic() + timeout
    before = frozenset(clients.socket_numbers(process.pid))
    try:
        sock = qmp.open_socket(address, process.pid)
    except OSError as error:
        raise MonitorError(str(address), f"cannot connect: {error.strerror or error}") from None
    with sock:
        if human:
            open_human_session(sock, str(address), timeout=timeout)
        else:
            open_session(sock, str(address), oob=oob, timeout=timeout)
        number = graft.accepted_of(process, sock, before)
        if number is None:
            raise MonitorError(str(address), "it was not found out which descriptor of QEMU our session is")
        with fds.take_fd(process.pidfd, kept.number) as fd:
            client = socket.socket(fileno=fd.steal())
        with client:
            lines = framing.Lines()
            outgoing = streams.Outgoing(client)
            outgoing.put(first)

            def at_rest() -> bool:
                with contextlib.suppress(BlockingIOError, EOFError):
                    while True:
                        for line in lines.feed(streams.take(sock, streams.LIMIT)[0]):
                            outgoing.put(line)
                outgoing.flush()
                return not lines.rest and not outgoing.size

            graft.put_back(process, tracer, kept, number, at_rest, until)
