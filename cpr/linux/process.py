"""A process that is held: by pidfd, so that its pid cannot come to mean another; and one `run()` for programs.

Starting a process in another's likeness is `likeness.py`; reading /proc is `proc.py`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from typing import TYPE_CHECKING

from cpr.linux.fds import Fd
from cpr.linux.proc import process_start_time

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Process:
    """A process by pid, start time (clock ticks since boot) and pidfd."""

    __slots__ = ("pid", "pidfd", "start_time")

    def __init__(self, pid: int, start_time: int, pidfd: Fd) -> None:
        self.pid = pid
        self.start_time = start_time
        self.pidfd = pidfd

    def __repr__(self) -> str:
        return f"Process({self.pid})"

    def alive(self) -> bool:
        """Whether it runs; a zombie does not."""
        return not self._ended(0)

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd.number, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.signal(signal.SIGKILL)

    def wait_dead(self, timeout: float) -> bool:
        """Whether it ended within `timeout` seconds. If it is a child of ours, it is reaped."""
        if not self._ended(timeout):
            return False
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        return True

    def _ended(self, timeout: float) -> bool:
        poll = select.poll()
        poll.register(self.pidfd.number, select.POLLIN)
        return bool(poll.poll(max(0, int(timeout * 1000))))

    def close(self) -> None:
        self.pidfd.close()


def open_process(pid: int, start_time: int | None = None) -> Process:
    """Hold a process; with `start_time`, only if it is that one.

    Raises:
        ProcessLookupError: it has ended, or another process has its pid.
    """
    pidfd = Fd(os.pidfd_open(pid))
    try:
        now = process_start_time(pid)
        if start_time is not None and now != start_time:
            raise ProcessLookupError(f"pid {pid} belongs to another process now")
    except BaseException:
        pidfd.close()
        raise
    return Process(pid, now, pidfd)


class RunFailed(OSError):
    """A program ended with an error or did not end in time; `output` is what it said."""

    def __init__(self, command: Sequence[str], status: str, output: str) -> None:
        super().__init__(f"{command[0]} {status}" + (f": {output.strip()[-500:]}" if output.strip() else ""))
        self.command = tuple(command)
        self.status = status
        self.output = output


def run(
    command: Sequence[str], *, timeout: float = 30.0, check: bool = True, env: Mapping[str, str] | None = None
) -> str:
    """Run a program to its end and return what it printed; killed with its group after `timeout` seconds.

    Raises:
        RunFailed: it failed, or took too long.
        FileNotFoundError: there is no such program.
    """
    with subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=dict(env) if env is not None else None,
    ) as process:
        began = time.monotonic()
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            status = f"did not end within {time.monotonic() - began:.0f} s"
            raise RunFailed(command, status, output.decode(errors="replace")) from None
    text = output.decode(errors="replace")
    if check and process.returncode:
        raise RunFailed(command, f"failed with status {process.returncode}", text)
    return text
