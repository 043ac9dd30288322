"""A blocking QMP client: `qemu.qmp` with its event loop boxed in one daemon thread.

    with connect(address) as monitor:
        monitor.execute("query-status")                 # {'status': 'running', ...}
        with monitor.command_fd(3): ...                 # descriptors travel by SCM_RIGHTS
        monitor.wait_event({"MIGRATION"}, timeout=5)

Everything that can come from the other side, silence, nonsense, a hang-up, an error reply, becomes `MonitorError` (or
`CommandFailed` for a proper error reply). Which commands mean what is not known here.

The event loop is one for the whole process. Calls may come from any thread; one monitor is used by one thread at a
time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any, Self, TypeVar

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError, Runstate
from qemu.qmp.protocol import StateError

from cpr.errors import CommandFailed, MonitorError, MonitorHeld
from cpr.qemu import first_words

if TYPE_CHECKING:
    from collections.abc import Collection, Coroutine, Iterator, Sequence
    from concurrent.futures import Future

    from cpr.model import MonitorAddress

T = TypeVar("T")
Attend = Callable[[], None] | None

GREETING_SECONDS = 3.0
"""A QEMU whose main loop is alive greets within milliseconds; one client at a time is served."""
COMMAND_SECONDS = 30.0
ATTENTION_SECONDS = 0.05
"""Between two looks at whether to go on waiting."""

for _logger in ("qemu.qmp", "asyncio"):  # what matters is raised, with its reason
    logging.getLogger(_logger).setLevel(logging.CRITICAL)


class _Loop:
    """The one event loop, in a thread of its own, started at first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True).start()
            return self._loop

    def run(self, work: Coroutine[Any, Any, T], timeout: float, attend: Attend = None) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self.get())
        try:
            return _result(future, timeout, attend)
        except FutureTimeoutError:
            raise TimeoutError from None


_loop = _Loop()


def _result(future: Future[T], timeout: float, attend: Attend) -> T:
    """What comes of it, awaited in slices between which `attend` looks up. Given up: it is cancelled."""
    deadline = time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        try:
            return future.result(left if attend is None else max(0.0, min(left, ATTENTION_SECONDS)))
        except FutureTimeoutError:
            if attend is None or left <= ATTENTION_SECONDS:
                future.cancel()
                raise
        try:
            attend()
        except BaseException:
            future.cancel()
            raise


class Event:
    """One event: name, data and QEMU's own timestamp in seconds since the epoch; `message` is all of it."""

    __slots__ = ("data", "message", "name", "timestamp")

    def __init__(self, message: dict[str, Any]) -> None:
        self.message = message
        self.name = str(message.get("event", ""))
        data = message.get("data", {})
        self.data: dict[str, Any] = data if isinstance(data, dict) else {}
        stamp = message.get("timestamp", {})
        self.timestamp = -1.0
        if isinstance(stamp, dict) and isinstance(stamp.get("seconds"), int):
            self.timestamp = float(stamp["seconds"]) + float(stamp.get("microseconds", 0)) / 1e6

    def __repr__(self) -> str:
        return f"Event({self.name}, {self.data})"


class _Client(QMPClient):
    """Keeps the events itself, as they come: the library's queue and another task would cost a part of a millisecond.

    What QEMU owes to the client before comes to us: an event while it accepts us, so in front of the greeting, and the
    reply to a command that was under way, anywhere. So each of ours has an id that no other session has.

    Its hooks are also where the library writes each message out for a debugging log, whether anybody reads that or not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Event] = []
        self.arrived = threading.Condition()
        self._mark = f"cpr-{secrets.token_hex(4)}-"

    def _get_exec_id(self) -> str:
        return self._mark + super()._get_exec_id()

    async def _recv(self) -> Message:
        """The next message that is for us, and no event."""
        while True:
            message = await super()._recv()
            if "event" in message:
                with self.arrived:
                    self.seen.append(Event(dict(message)))
                    self.arrived.notify_all()
            elif "QMP" in message or self._is_ours(message):
                return message

    def _is_ours(self, message: Message) -> bool:
        """An error without an id is of a command that could not be read; we begin with one that can."""
        if "id" in message:
            return str(message["id"]).startswith(self._mark)
        if self.runstate is Runstate.RUNNING:
            return "return" not in message
        return not message.keys() & {"return", "error"}

    def _cb_inbound(self, msg: Message) -> Message:
        return msg

    def _cb_outbound(self, msg: Message) -> Message:
        if "id" not in msg:  # the negotiation
            msg["id"] = self._get_exec_id()
        return msg


class Pending:
    """A command that was sent; `result` waits for its reply. Errors as those of `Monitor.execute`."""

    __slots__ = ("_address", "_attend", "_command", "_future")

    def __init__(self, address: str, command: str, future: Future[Any], attend: Attend = None) -> None:
        self._address = address
        self._command = command
        self._future = future
        self._attend = attend

    @property
    def failed(self) -> bool:
        """There is an answer, and it is no value: `result` says what."""
        return self._future.done() and (self._future.cancelled() or self._future.exception() is not None)

    def result(self, timeout: float = COMMAND_SECONDS) -> Any:
        """The value that QEMU returned; a reply that comes after the wait was given up is dropped."""
        try:
            return _result(self._future, timeout, self._attend)
        except ExecuteError as error:
            raise CommandFailed(self._command, error.error_class, str(error)) from None
        except FutureTimeoutError:
            raise MonitorError(self._address, f"no answer to {self._command} within {timeout:g} s") from None
        except (ExecInterruptedError, StateError, EOFError, ConnectionError):
            raise MonitorError(self._address, f"QEMU hung up during {self._command}") from None
        except (QMPError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise MonitorError(self._address, f"{self._command}: unusable reply: {_words(error)}") from None


class Monitor:
    """A negotiated QMP session. Errors: `MonitorError`, `CommandFailed`."""

    def __init__(self, client: _Client, address: str, attend: Attend = None) -> None:
        self.address = address
        self._client = client
        self._attend = attend
        self._events = client.seen
        self._arrived = client.arrived
        self._closed = False
        self._ended = False
        self.first_replies: list[dict[str, Any]] = []
        """To the commands that were sent with the negotiation, in their order."""
        asyncio.run_coroutine_threadsafe(self._watch(), _loop.get())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def greeting_version(self) -> tuple[str, str]:
        """(version, package) of the QEMU that greeted, e.g. ("7.2.22", "Debian 1:7.2+dfsg-7+deb12u18+b3")."""
        greeting = self._client.greeting
        if greeting is None:
            return "", ""
        version = greeting.QMP.version
        qemu = version.get("qemu", {}) if isinstance(version, dict) else {}
        return (
            ".".join(str(qemu.get(k, "?")) for k in ("major", "minor", "micro")),
            str(version.get("package", "")) if isinstance(version, dict) else "",
        )

    async def _watch(self) -> None:
        """Tell whoever waits for an event when the session ends."""
        try:
            while self._client.runstate is Runstate.RUNNING:
                await self._client.runstate_changed()
        finally:
            with self._arrived:
                self._ended = True
                self._arrived.notify_all()

    def execute(self, command: str, *, timeout: float = COMMAND_SECONDS, **arguments: Any) -> Any:
        """Run one command and return its value. Underscores in argument names stand for hyphens."""
        return self.execute_arguments(command, {k.replace("_", "-"): v for k, v in arguments.items()}, timeout=timeout)

    def execute_arguments(
        self, command: str, arguments: dict[str, Any], *, timeout: float = COMMAND_SECONDS
    ) -> Any:
        """Run one command whose argument names are taken as they stand."""
        return self.submit(command, **arguments).result(timeout)

    def submit(self, command: str, **arguments: Any) -> Pending:
        """Send one command now and take its reply later; several may be under way, QEMU answers them in order.

        Argument names are taken as they stand.
        """
        work = self._client.execute(command, arguments or None)
        return Pending(self.address, command, asyncio.run_coroutine_threadsafe(work, _loop.get()), self._attend)

    def send_fd(self, name: str, number: int) -> None:
        """Hand a descriptor to QEMU under a name (`getfd`); the caller keeps its own."""
        self._pass(number)
        self.execute("getfd", fdname=name)

    def add_fd(self, opaque: str, number: int) -> int:
        """Hand a descriptor to QEMU in a set of its own (`add-fd`), to be opened as /dev/fdset/N: that N."""
        self._pass(number)
        return int(self.execute("add-fd", opaque=opaque)["fdset-id"])

    def _pass(self, number: int) -> None:
        try:
            _loop.run(self._scm(number), COMMAND_SECONDS)
        except (QMPError, OSError, TimeoutError) as error:
            raise MonitorError(self.address, f"could not pass a descriptor: {_words(error)}") from None

    async def _scm(self, number: int) -> None:
        self._client.send_fd_scm(number)

    def events(self) -> tuple[Event, ...]:
        """All events so far."""
        with self._arrived:
            return tuple(self._events)

    def wait_event(
        self,
        names: Collection[str],
        accept: Callable[[Event], bool] = lambda _: True,
        *,
        timeout: float,
        after: int = 0,
    ) -> Event:
        """The first event of one of `names` that `accept` takes, not counting the first `after` events ever seen.

        Raises:
            TimeoutError: none came within `timeout` seconds.
            MonitorError: QEMU hung up meanwhile.
        """
        deadline = time.monotonic() + timeout
        seen = after
        with self._arrived:
            while True:
                events = list(self._events)
                for event in events[seen:]:
                    if event.name in names and accept(event):
                        return event
                seen = len(events)
                if self._ended:
                    raise MonitorError(self.address, f"QEMU hung up while {' or '.join(sorted(names))} was awaited")
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"no {' or '.join(sorted(names))} within {timeout:g} s")
                self._arrived.wait(min(left, 0.25))

    @property
    def alive(self) -> bool:
        """Whether the session still stands (QEMU has not hung up)."""
        return not self._closed and self._client.runstate is Runstate.RUNNING

    @property
    def event_count(self) -> int:
        return len(self._events)

    def close(self) -> None:
        """Hang up. Never raises; safe to repeat."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(Exception):
            _loop.run(self._client.disconnect(), 2.0)


def _words(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]


def open_socket(address: MonitorAddress, pid: int | None = None, *, timeout: float = 2.0) -> socket.socket:
    """Connect to where a monitor listens. With `pid`, a UNIX path is looked up in that process's root and directory.

    Raises:
        OSError: nobody listens there (any more), or it may not be reached.
    """
    if not address.path:
        return socket.create_connection((address.host, address.port), timeout=timeout)
    if address.path.startswith("@"):
        return connect_unix("\0" + address.path[1:], timeout=timeout)
    return connect_unix(path_in(pid, address.path), timeout=timeout)


def path_in(pid: int | None, path: str) -> str:
    """`path` as the process `pid` sees it, as a path that we can open."""
    if pid is None:
        return path
    return f"/proc/{pid}/root{path}" if path.startswith("/") else f"/proc/{pid}/cwd/{path}"


def connect_unix(path: str, *, timeout: float = 2.0) -> socket.socket:
    """Connect to a UNIX stream socket, also where the path is longer than sun_path's 107 bytes.

    Raises:
        TimeoutError: its queue of waiting clients is full. OSError.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    # not settimeout: a socket that does not block gives up at once where the queue is full (QEMU's has two places)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(timeout), int(timeout % 1 * 1e6)))
    try:
        if path.startswith("\0") or len(os.fsencode(path)) < 108:
            sock.connect(path)
        else:
            directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                sock.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
            finally:
                os.close(directory)
    except BaseException as error:
        sock.close()
        if isinstance(error, BlockingIOError):
            raise TimeoutError(f"{path}: nobody is accepted within {timeout:g} s") from None
        raise
    sock.settimeout(timeout)
    return sock


def negotiate(
    sock: socket.socket,
    name: str,
    *,
    timeout: float = GREETING_SECONDS,
    attend: Attend = None,
    first: Sequence[first_words.Command] = (),
) -> Monitor:
    """Take a connected socket through greeting and negotiation. The socket belongs to the monitor from here on.

    `attend` is called again and again while an answer is awaited, here and later; what it raises ends the wait. `first`
    are commands that are sent together with the negotiation; their replies are in `Monitor.first_replies`.

    Raises:
        MonitorHeld: nobody greets: QEMU serves one client a monitor, so somebody else is being served, or it hangs.
        MonitorError: it hung up or talks nonsense.
    """
    client = _Client()
    replies: list[dict[str, Any]] = []
    try:
        if first:
            replies = first_words.speak(sock, first, timeout=timeout, attend=attend)
            client.await_greeting = client.negotiate = False
        sock.setblocking(False)
        _loop.run(client.connect(sock), timeout, attend)
    except TimeoutError:
        sock.close()
        raise MonitorHeld(
            name,
            f"connected, but no greeting within {timeout:g} s: another client holds this monitor, or QEMU hangs",
            hint="end the other client's session, or give the guest a second QMP socket",
        ) from None
    except (ConnectError, QMPError, OSError, EOFError, ValueError, TypeError, KeyError, RecursionError) as error:
        sock.close()
        raise MonitorError(name, f"does not speak QMP: {_words(error)}") from None
    except BaseException:
        sock.close()
        raise
    monitor = Monitor(client, name, attend)
    monitor.first_replies = replies
    return monitor


def connect(address: MonitorAddress, pid: int | None = None, *, timeout: float = GREETING_SECONDS) -> Monitor:
    """Connect and negotiate. Raises `MonitorError` (`MonitorHeld` where another client is served)."""
    try:
        sock = open_socket(address, pid)
    except TimeoutError:
        raise MonitorHeld(str(address), "its queue of waiting clients is full", hint="somebody holds it") from None
    except OSError as error:
        raise MonitorError(str(address), f"cannot connect: {error.strerror or error}") from None
    return negotiate(sock, str(address), timeout=timeout)


def try_connect(
    addresses: Collection[MonitorAddress], pid: int | None = None, *, timeout: float = GREETING_SECONDS
) -> Iterator[Monitor | MonitorError]:
    """Each address in turn: the monitor, or why not."""
    for address in addresses:
        try:
            yield connect(address, pid, timeout=timeout)
        except MonitorError as error:
            yield error
