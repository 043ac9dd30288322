"""Children to look at, and probes of what we may do here."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from cpr.linux import ptrace, stub
from cpr.linux import syscalls as sc
from cpr.linux.likeness import Likeness, likeness_of
from cpr.linux.proc import read_argv

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SLEEP = os.path.realpath("/bin/sleep")
FOREVER = ("sleep", "1000")


def identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def eventually(true: Callable[[], bool], seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.005)


@contextlib.contextmanager
def leased(path: str) -> Iterator[Callable[[], object]]:
    """Whoever executes this file waits until what is yielded is called, or at the end (fcntl(2), F_SETLEASE).

    Raises BlockingIOError: somebody has it open.
    """
    with open(path, "rb") as file:
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)  # which is ignored: somebody wants it
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield lambda: fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def in_call(pid: int, name: str) -> bool:
    """Whether its first thread is in this system call (stub.Architecture.numbers)."""
    with open(f"/proc/{pid}/syscall") as file:
        return file.read().split()[0] == str(stub.X86_64.numbers[name])


def trace_a_child(options: int = 0) -> None:
    """What tracing needs, with ptrace's `options`; see `can`."""
    pid = os.fork()
    if pid == 0:
        signal.pause()
    try:
        ptrace.seize(pid, options)
    finally:
        os.kill(pid, signal.SIGKILL)


def free_id() -> int:
    """One that nobody has: that of a child that has ended."""
    it = os.fork()
    if it == 0:
        os._exit(0)
    os.waitpid(it, 0)
    return it


@contextlib.contextmanager
def child(
    argv: Sequence[str] = FOREVER, prepare: Callable[[], None] | None = None, **more: object
) -> Iterator[int]:
    """A running child, prepared between fork and exec; it is seen to have exec'ed, and killed at the end."""
    process = subprocess.Popen(
        list(argv),
        preexec_fn=prepare,  # noqa: PLW1509 - no threads of ours hold locks then
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        **more,  # type: ignore[call-overload]
    )
    try:
        eventually(lambda: read_argv(process.pid) == tuple(argv))
        yield process.pid
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def python(code: str, **more: object) -> Iterator[subprocess.Popen[str]]:
    """A Python child with pipes for its standard input and output."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **more,  # type: ignore[call-overload]
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            pipe.close()


def can(do: Callable[[], object]) -> bool:
    """Whether a child of ours may do this."""
    pid = os.fork()
    if pid == 0:
        try:
            do()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def needs(what: str, do: Callable[[], object]) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not can(do), reason=f"cannot {what} here")


def _become_nobody() -> None:
    os.setgroups([1])
    os.setresuid(65534, 65534, 65534)


needs_other_users = needs("become another user", _become_nobody)
needs_namespaces = needs(
    "make namespaces", lambda: sc.unshare(sc.CLONE_NEWNS | sc.CLONE_NEWNET | sc.CLONE_NEWPID)
)
needs_user_namespaces = needs("make user namespaces", lambda: sc.unshare(sc.CLONE_NEWUSER))


def me() -> Likeness:
    return likeness_of(os.getpid())


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
