"""A process whose tracer is killed while it executes a program: in the end it is known which of the two it is.

The program is a file with a lease on it (fcntl(2), F_SETLEASE): whoever executes it waits until that is given up.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cpr.engines.execute import became
from cpr.engines.successor import MARK
from cpr.linux import stub
from cpr.linux.process import open_process
from cpr.linux.tracer import Attach, Exec, Tracer
from tests.kernel.support import can, child, eventually, free_id, in_call, leased, trace_a_child

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [
    pytest.mark.skipif(stub.architecture() is None, reason="not on this architecture"),
    pytest.mark.skipif(not can(trace_a_child), reason="cannot trace here"),
]

OURS = "run/1"


@dataclass
class Program:
    """An executable in a memory file, with a lease."""

    path: str
    give_up: Callable[[], object]


@contextlib.contextmanager
def held_back(code: bytes) -> Iterator[Program]:
    number = os.memfd_create("program")
    with open(number, "wb") as file:
        file.write(code)
        path = os.open(f"/proc/self/fd/{number}", os.O_PATH)
    try:
        name = f"/proc/{os.getpid()}/fd/{path}"
        with leased(name) as give_up:
            yield Program(name, give_up)
    finally:
        os.close(path)


@pytest.fixture
def program() -> Iterator[Program]:
    with held_back(Path("/bin/sleep").read_bytes()) as it:
        yield it


@contextlib.contextmanager
def half_way(program: Program) -> Iterator[tuple[int, int]]:
    """(pid, thread) of a process that is in the middle of executing the program, and whose tracer was killed."""
    with child() as pid, open_process(pid) as process, Tracer.start(process) as tracer:
        ((thread,),) = tracer.run(Attach())
        tracer.post(Exec(program.path, ("sleep", "1000"), (f"{MARK}={OURS}",)))
        eventually(lambda: in_call(pid, "execve"))
        tracer.kill()
        yield pid, thread


def test_one_that_executes_it_in_the_end(program: Program) -> None:
    with half_way(program) as (pid, thread):
        later = threading.Timer(0.3, program.give_up)
        later.start()
        assert became(pid, thread, OURS) is True
        later.join()


def test_one_of_which_nobody_can_tell(program: Program) -> None:
    with half_way(program) as (pid, thread):
        assert became(pid, thread, OURS, seconds=0.2) is None
        program.give_up()
        assert became(pid, thread, OURS) is True


def test_one_that_cannot_execute_it() -> None:
    with held_back(b"no program") as program, half_way(program) as (pid, thread):
        program.give_up()
        assert became(pid, thread, OURS) is False


def test_one_that_was_to_execute_nothing() -> None:
    with child() as pid, open_process(pid) as process, Tracer.start(process) as tracer:
        ((thread,),) = tracer.run(Attach())
        tracer.kill()
        assert became(pid, thread, OURS) is False


def test_one_that_is_traced_yet(program: Program) -> None:
    """What it does now may be the tracer's preparation."""
    with child() as pid, open_process(pid) as process, Tracer.start(process) as tracer:
        ((thread,),) = tracer.run(Attach())
        assert became(pid, thread, OURS, seconds=0.2) is None
        program.give_up()
        tracer.post(Exec(program.path, ("sleep", "1000"), (f"{MARK}={OURS}",)))
        assert became(pid, thread, OURS) is True


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
