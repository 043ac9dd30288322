"""The tracer: a small process of its own that stops a process and makes system calls in it, and outlives its caller.

    Tracer ── length, pickled list of operations ──► helper       Attach, Batch, Keep, Exec, Detach ...
           ◄── length, pickled Reply, one for each operation ──

It is started before the pause, finds out beforehand what takes time, and waits. After an operation that failed it
undoes what was done, lets the process run, and ends: with it the kernel lets go of threads that did not stop in time.
So it does when its caller is gone, which it sees before each operation and each system call. After an Exec nothing is
undone: the new program runs.

If the helper itself is killed, the process goes on (tracee.py).

Out of scope: which calls to make.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from cpr.errors import Blocked, CprError, PrivilegeError
from cpr.linux import follow, ours, rebind, stub
from cpr.linux.process import Process, open_process

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cpr.linux.births import Birth
    from cpr.linux.tracee import Call, Tracee

_PROGRAM = "from cpr.linux.tracer import main; main()"
_LENGTH = struct.Struct("=Q")
START_SECONDS = 30.0
"""Of a Python, on a host that is busy or emulated."""
END_SECONDS = 10.0
DONE_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attach:
    """Stop all threads, within `timeout` seconds. `thread` makes the calls."""

    thread: int | None = None
    timeout: float = 1.0


@dataclass(frozen=True, slots=True)
class Batch:
    """Make system calls, until one fails."""

    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Exec:
    """Execute a path, or a descriptor of the process; it stands before its first instruction until Detach."""

    program: str | int
    argv: tuple[str, ...]
    environ: tuple[str, ...]
    """NAME=value."""


@dataclass(frozen=True, slots=True)
class Detach:
    """Undo, or after Exec let the new program begin; all threads run."""


@dataclass(frozen=True, slots=True)
class Follow:
    """After Exec, instead of Detach: let the new program begin, and its threads get the ids that they should have, its
    listeners those that were kept (follow.py). The reply comes at once; it ends at the next operation if not before."""

    after: dict[str, Birth]
    """{name of a thread, or births.FIRST: the one that is born next}."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Before Exec: keep these listeners of the process for where the new program binds their addresses (rebind.py)."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Look:
    """Find out, while the process runs, what Attach would find out: after an Exec, once the program has begun."""


Operation = Attach | Batch | Keep | Exec | Detach | Follow | Look


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of one operation. `results` are a Batch's, or the thread of an Attach.

    `number` is an errno, 0 where all is well.
    """

    results: tuple[int, ...] = ()
    number: int = 0
    text: str = ""
    ability: str = ""
    ours: bool = False
    """Not an OSError: PrivilegeError where `ability` is missing, else Blocked."""

    def raise_error(self) -> None:
        if self.ability:
            raise PrivilegeError(self.text, ability=self.ability)
        if self.ours:
            raise Blocked(self.text)
        if self.number:
            raise OSError(self.number, self.text)


class CallerGone(Exception):
    """Nobody is left to work for."""


class Tracer:
    """The caller's side: a helper for one process. Closing it, or our end, lets that process run as before."""

    def __init__(self, helper: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self._helper = helper
        self._socket = sock
        self._owed = 0
        """Replies to what was posted."""

    @classmethod
    def start(cls, process: Process) -> Self:
        """Start the helper and wait until it is ready; the process is not touched yet.

        Raises:
            OSError: no helper can be started. ProcessLookupError, PermissionError: as seen by the helper.
        """
        here, there = socket.socketpair()
        with there:
            helper = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(process.pid), str(process.start_time)],
                stdin=there.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=None if os.environ.get("CPR_DEBUG") else subprocess.DEVNULL,
                start_new_session=True,
                env=ours.environment(PYTHONDONTWRITEBYTECODE="1"),
            )
        tracer = cls(helper, here)
        try:
            here.settimeout(START_SECONDS)
            tracer._reply().raise_error()
        except BaseException:
            tracer.close()
            raise
        return tracer

    @property
    def pid(self) -> int:
        """The helper's."""
        return self._helper.pid

    def post(self, operation: Operation) -> None:
        """Have it done, and do not wait; what comes of it is told to whoever asks for the next one.

        Raises:
            ConnectionError: the helper died.
        """
        _send(self._socket, (operation,))
        self._owed += 1

    def events(self, *operations: Operation) -> Iterator[Reply]:
        """Do them; a reply as each is done. The first that failed is the last reply.

        Raises:
            TimeoutError: no answer for DONE_SECONDS. ConnectionError: the helper died; the process runs.
        """
        self._socket.settimeout(DONE_SECONDS)
        _send(self._socket, operations)
        while self._owed:
            self._owed -= 1
            self._reply().raise_error()
        for _ in operations:
            reply = self._reply()
            yield reply
            if reply.number or reply.ours:
                return

    def run(self, *operations: Operation) -> list[tuple[int, ...]]:
        """Do them; the results of each.

        Raises:
            What the operation that failed raises in Tracee: everything is undone and the process runs. As `events`.
        """
        results = []
        for reply in self.events(*operations):
            reply.raise_error()
            results.append(reply.results)
        return results

    def _reply(self) -> Reply:
        reply = _receive(self._socket)
        if reply is None:
            raise ConnectionResetError(errno.ECONNRESET, "the tracer died")
        assert isinstance(reply, Reply)
        return reply

    def kill(self) -> None:
        """End the helper at once, without anything undone, and wait until its threads are let go."""
        self._helper.kill()
        self._helper.wait()

    def close(self) -> None:
        """Have everything undone, and wait until the helper is gone."""
        self._socket.close()
        try:
            self._helper.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _send(sock: socket.socket, message: object) -> None:
    data = pickle.dumps(message)
    sock.sendall(_LENGTH.pack(len(data)) + data)


def _receive(sock: socket.socket) -> object:
    """None: the other side is gone."""
    try:
        head = _read(sock, _LENGTH.size)
        return pickle.loads(_read(sock, *_LENGTH.unpack(head)))  # noqa: S301 - our own parent, our own child
    except (EOFError, ConnectionError):
        return None


def _read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


# the helper's side -------------------------------------------------------------------------------------------


class Helper:
    """Does what it is told to one process."""

    def __init__(self, sock: socket.socket, process: Process) -> None:
        self._socket = sock
        self._process = process
        self._room = stub.find_room(process.pid)
        self._tracee: Tracee | None = None
        self._begun: Follow | None = None
        """While the new program is to be followed."""
        self._doors: rebind.Doors | None = None
        self._gone = select.poll()
        self._gone.register(sock, select.POLLRDHUP)

    def work(self) -> None:
        """Until the caller is gone."""
        while isinstance(operations := _receive(self._socket), tuple):
            if not self._do_all(operations):
                return
            if self._begun is not None:
                self._follow(self._begun)
                self._begun = None

    def _follow(self, begun: Follow) -> None:
        """Raises TimeoutError: the end of ours is what lets the program go on."""
        told = select.poll()
        told.register(self._socket, select.POLLIN | select.POLLRDHUP)

        def asked() -> bool:
            return [seen for _, seen in told.poll(0)] == [select.POLLIN]

        with contextlib.suppress(ProcessLookupError):
            follow.follow(self._process.pid, begun.after, self._doors, asked, lambda: bool(self._gone.poll(0)))
        self.undo()

    def undo(self) -> None:
        if self._doors is not None:
            if self._tracee is not None and not self._tracee.executed:
                with contextlib.suppress(OSError):
                    self._tracee.call("close", self._doors.theirs)
            self._doors.close()
            self._doors = None
        if self._tracee is not None:
            self._tracee.detach()
            self._tracee = None

    def _do_all(self, operations: Sequence[Operation]) -> bool:
        """False: one failed."""
        for operation in operations:
            try:
                self._check_caller()
                reply = Reply(self._do(operation))
            except (CprError, OSError, ValueError) as error:
                self.undo()
                _send(self._socket, _told(error))
                return False
            _send(self._socket, reply)
        return True

    def _do(self, operation: Operation) -> tuple[int, ...]:
        if isinstance(operation, Attach):
            from cpr.linux.tracee import Tracee

            if self._tracee is not None:
                raise ValueError("it is attached already")
            self._tracee = Tracee.attach(
                self._process, thread=operation.thread, room=self._room, timeout=operation.timeout
            )
            return (self._tracee.thread,)
        if isinstance(operation, Detach):
            self.undo()
        elif isinstance(operation, Follow):
            if self._tracee is None or not self._tracee.executed:
                raise ValueError("nothing was executed")
            self._begun = operation
        elif isinstance(operation, Look):
            self._room = self._room or stub.find_room(self._process.pid)
        elif self._tracee is None:
            raise ValueError("nothing is attached")
        elif isinstance(operation, Keep):
            self._doors = rebind.Doors.take(self._tracee, self._process, operation.numbers)
        elif isinstance(operation, Batch):
            return tuple(self._tracee.batch(operation.calls, self._check_caller))
        else:
            self._tracee.execve(operation.program, operation.argv, operation.environ)
            self._room = None  # looked for again in the new program
        return ()

    def _check_caller(self) -> None:
        if self._gone.poll(0):
            raise CallerGone


def _told(error: CprError | OSError | ValueError) -> Reply:
    if isinstance(error, CprError):
        return Reply(text=error.message, ability=getattr(error, "ability", ""), number=errno.EPERM, ours=True)
    if isinstance(error, OSError):
        return Reply(number=error.errno or errno.EIO, text=error.strerror or str(error))
    return Reply(number=errno.EINVAL, text=str(error))


def main() -> None:
    """The helper itself. It ends by the end of its socket only: nothing is to interrupt it half way."""
    ours.outlive((*ours.HANG_UPS, signal.SIGTERM))
    sock = socket.socket(fileno=os.dup(0))
    pid, start_time = (int(word) for word in sys.argv[1:3])
    try:
        helper = Helper(sock, open_process(pid, start_time))
        from cpr.linux import tracee

        _ = tracee.Tracee  # imported now, not within the pause
    except OSError as error:
        _send(sock, _told(error))
        return
    gc.freeze()
    gc.disable()
    with contextlib.suppress(ConnectionError):
        _send(sock, Reply())
        with contextlib.suppress(CallerGone, TimeoutError):
            helper.work()
    helper.undo()
    os._exit(0)
