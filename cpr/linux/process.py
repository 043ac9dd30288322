"""Running a program to its end, and holding on to a process by pid, start time and pidfd.

Out of scope: starting a program in another's likeness (likeness.py).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from cpr.linux import procfile, syscalls
from cpr.linux.fds import Fd, open_pidfd
from cpr.linux.status import process_start_time

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SAID = 400
"""Characters of a failed program's own words that go into the message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A program that has ended: `status` is the exit status, negative for the signal that killed it."""

    argv: tuple[str, ...]
    status: int
    stdout: bytes
    stderr: bytes
    seconds: float


class RunFailed(Exception):
    """A program ended with another status than 0; `completed` has what it said."""

    def __init__(self, completed: Completed, what: str = "") -> None:
        self.completed = completed
        status = completed.status
        ended = f"was killed by {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
        said = (completed.stderr or completed.stdout).decode(errors="replace").strip()[-SAID:]
        super().__init__(f"{completed.argv[0]} {what or ended}" + (f": {said}" if said else ""))


class RunTimeout(RunFailed):
    """It was killed, with its process group, when the time was up."""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def run(
    argv: Sequence[str],
    *,
    timeout: float,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    check: bool = True,
) -> Completed:
    """Run a program in its own session, capture what it says, kill it with its group after `timeout` seconds.

    Raises:
        RunFailed: status not 0, where `check`. RunTimeout: time is up. OSError: it cannot be started.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        list(argv),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        cwd=cwd,
        start_new_session=True,
    )
    late = False
    try:
        try:
            out, err = process.communicate(stdin, timeout=timeout)
        except subprocess.TimeoutExpired:
            late = True
            _kill_group(process)
            try:
                # a grandchild that left the group may still hold the pipes
                out, err = process.communicate(timeout=1.0)
            except subprocess.TimeoutExpired as error:
                out, err = error.stdout or b"", error.stderr or b""
    except BaseException:
        _kill_group(process)
        raise
    finally:
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
    completed = Completed(
        argv=tuple(argv),
        status=process.wait(),
        stdout=out,
        stderr=err,
        seconds=time.monotonic() - began,
    )
    if late:
        raise RunTimeout(completed, f"did not end within {timeout:g} s and was killed")
    if check and completed.status != 0:
        raise RunFailed(completed)
    return completed


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """It is not reaped yet, so its pid is its own, and so is the group of that number."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def end_with_parent() -> None:
    """For a child between fork and exec: the kernel kills it when the thread that forked it ends, however that ends."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)


class HasPidfd(Protocol):
    """What `Process.of` takes: likeness.Launched."""

    @property
    def pid(self) -> int: ...
    @property
    def pidfd(self) -> Fd: ...
    @property
    def start_time(self) -> int: ...


class Process:
    """A process that cannot be mistaken for another: pid, start time and a pidfd that it owns."""

    __slots__ = ("pid", "pidfd", "start_time", "status")

    def __init__(self, pid: int, start_time: int, pidfd: Fd) -> None:
        self.pid = pid
        self.start_time = start_time
        """Clock ticks since boot."""
        self.pidfd = pidfd
        self.status: int | None = None
        """Once reaped by us: the exit status, negative for the signal that killed it."""

    @classmethod
    def of(cls, launched: HasPidfd) -> Self:
        """From what `likeness.launch` returns; owns its pidfd from now on."""
        return cls(launched.pid, launched.start_time, launched.pidfd)

    def alive(self) -> bool:
        """False once it has ended; a zombie has."""
        return not self._ended(0)

    def signal(self, number: int) -> None:
        """Raises ProcessLookupError where it is gone, PermissionError."""
        signal.pidfd_send_signal(self.pidfd.number, number)

    def kill(self) -> None:
        """SIGKILL; nothing happens if it is gone already. Raises PermissionError."""
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)

    def wait_dead(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for its end, and reap it if it is our child. False: it still lives.

        A pidfd tells of the end when all threads have let go of memory and descriptors (kernel/exit.c: exit_mm and
        exit_files come before exit_notify), so from True on nothing of it touches shared RAM.
        """
        if not self._ended(timeout):
            return False
        with contextlib.suppress(ChildProcessError):
            result = os.waitid(os.P_PIDFD, self.pidfd.number, os.WEXITED | os.WNOHANG)
            if result is not None:
                exited = result.si_code == os.CLD_EXITED
                self.status = result.si_status if exited else -result.si_status
        return True

    def _ended(self, timeout: float) -> bool:
        poll = select.poll()
        poll.register(self.pidfd.number, select.POLLIN)
        return bool(poll.poll(max(0.0, timeout) * 1000))

    def close(self) -> None:
        """Let go of the pidfd; the process is not touched."""
        self.pidfd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Process(pid={self.pid}, start_time={self.start_time})"


def open_process(pid: int, start_time: int | None = None) -> Process:
    """Hold on to a process.

    Raises:
        ProcessLookupError: it is gone, or another one has the pid now.
    """
    pidfd = open_pidfd(pid)
    try:
        found = process_start_time(pid)
        if start_time is not None and found != start_time:
            raise procfile.gone(pid)
        process = Process(pid, found, pidfd)
        if start_time is None and not process.alive():
            # it may have ended between the two calls above, and its pid been given away: believe the pidfd
            signal.pidfd_send_signal(pidfd.number, 0)
    except BaseException:
        pidfd.close()
        raise
    return process


def lives(pid: int, start_time: int) -> bool:
    """Whether this very process is still there, as far as we may look. One that has ended and is not reaped is not."""
    with contextlib.suppress(OSError), open_process(pid, start_time) as process:
        return process.alive()
    return False
