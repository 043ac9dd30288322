"""A process whose tracer is killed while it executes a program: in the end it is known which of the two it is.

The program is a file with a lease on it (fcntl(2), F_SETLEASE): whoever executes it waits until that is given up.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cpr.engines.execute import became
from cpr.engines.successor import MARK
from cpr.linux import stub
from cpr.linux.process import open_process
from cpr.linux.tracer import Attach, Exec, Tracer
from tests.kernel.support import can, child, eventually, free_id, trace_a_child

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.skipif(stub.architecture() is None, reason="not on this architecture"),
    pytest.mark.skipif(not can(trace_a_child), reason="cannot trace here"),
]

OURS = "run/1"
EXECVE = str(stub.X86_64.numbers["execve"])


class Leased:
    """A program in a memory file; `path` is executed when the lease is given up."""

    def __init__(self, program: bytes) -> None:
        writable = os.memfd_create("program")
        with open(writable, "wb") as file:
            file.write(program)
            self.number = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY)
        self.path = f"/proc/{os.getpid()}/fd/{self.number}"
        fcntl.fcntl(self.number, fcntl.F_SETSIG, signal.SIGURG)  # which is ignored: somebody wants it
        fcntl.fcntl(self.number, fcntl.F_SETLEASE, fcntl.F_WRLCK)

    def give_up(self) -> None:
        fcntl.fcntl(self.number, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    def close(self) -> None:
        os.close(self.number)


@pytest.fixture
def leased() -> Iterator[Leased]:
    with contextlib.closing(Leased(Path("/bin/sleep").read_bytes())) as it:
        yield it


@contextlib.contextmanager
def half_way(leased: Leased) -> Iterator[tuple[int, int]]:
    """(pid, thread) of a process that is in the middle of executing the program, and whose tracer was killed."""
    with child() as pid, open_process(pid) as process, Tracer.start(process) as tracer:
        ((thread,),) = tracer.run(Attach())
        tracer.post(Exec(leased.path, ("sleep", "1000"), (f"{MARK}={OURS}",)))
        eventually(lambda: syscall(pid) == EXECVE)
        tracer.kill()
        yield pid, thread


def syscall(pid: int) -> str:
    with open(f"/proc/{pid}/syscall") as file:
        return file.read().split()[0]


def test_one_that_executes_it_in_the_end(leased: Leased) -> None:
    with half_way(leased) as (pid, thread):
        later = threading.Timer(0.3, leased.give_up)
        later.start()
        assert became(pid, thread, OURS) is True
        later.join()


def test_one_of_which_nobody_can_tell(leased: Leased) -> None:
    with half_way(leased) as (pid, thread):
        assert became(pid, thread, OURS, seconds=0.2) is None
        leased.give_up()
        assert became(pid, thread, OURS) is True


def test_one_that_cannot_execute_it() -> None:
    with contextlib.closing(Leased(b"no program")) as leased, half_way(leased) as (pid, thread):
        leased.give_up()
        assert became(pid, thread, OURS) is False


def test_one_that_was_to_execute_nothing() -> None:
    with child() as pid, open_process(pid) as process, Tracer.start(process) as tracer:
        ((thread,),) = tracer.run(Attach())
        tracer.kill()
        assert became(pid, thread, OURS) is False


def test_one_that_never_waits() -> None:
    with child(("sh", "-c", "while :; do :; done")) as pid:
        assert became(pid, pid, OURS) is False


def test_another_thread_that_has_ended() -> None:
    with child() as pid:
        assert became(pid, free_id(), OURS) is False


def test_one_that_has_ended() -> None:
    with child() as pid:
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ProcessLookupError):
            became(pid, pid, OURS)
