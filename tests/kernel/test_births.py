"""Ids of a new program's threads, with a program of ours in a process of ours."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING

import pytest

from cpr.linux import stub
from cpr.linux.births import FIRST, Birth
from cpr.linux.proc import read_status, threads
from cpr.linux.process import open_process
from cpr.linux.tracer import Attach, Exec, Follow, Look, Tracer
from tests.kernel.support import can, child, eventually, free_id, trace_a_child

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

THREADS = 4
PROGRAM = """
import threading, time
for _ in range(4):
    threading.Thread(target=time.sleep, args=(1000,)).start()
    time.sleep(0.1)
"""
ARGV = (sys.executable, "-c", PROGRAM)


def _set_last_pid() -> None:
    with open("/proc/sys/kernel/ns_last_pid", "r+b", buffering=0) as file:
        file.write(file.read())


pytestmark = [
    pytest.mark.skipif(stub.architecture() is None, reason="not on this architecture"),
    pytest.mark.skipif(not can(trace_a_child), reason="cannot trace here"),
]


@pytest.fixture
def pid() -> Iterator[int]:
    with child() as it:
        yield it


def followed(tracer: Tracer, after: Mapping[str, Birth]) -> None:
    tracer.run(Attach(), Exec(ARGV[0], ARGV, ("LC_ALL=C",)), Follow(dict(after)))


def all_run(pid: int) -> bool:
    there = [read_status(thread.tid) for thread in threads(pid)]
    return len(there) == THREADS + 1 and all(not status.tracer and status.state in "SR" for status in there)


@pytest.mark.skipif(not can(_set_last_pid), reason="CAP_CHECKPOINT_RESTORE is missing")
def test_the_second_thread_gets_the_id() -> None:
    """Somebody else on this host may be given it first; not five times."""
    for _ in range(5):
        with child() as pid, open_process(pid) as process, Tracer.start(process) as tracer:
            wanted = free_id()
            followed(tracer, {FIRST: Birth(wanted, "python")})
            eventually(lambda: all_run(pid), 20)
            if wanted in [thread.tid for thread in threads(pid)]:
                return
    raise AssertionError("it was never given")


@pytest.mark.parametrize("after", [0.0, 0.15])
@pytest.mark.parametrize("how", ["the tracer is killed", "the caller goes", "the next operation"])
def test_the_program_goes_on_whatever_ends_it(pid: int, how: str, after: float) -> None:
    """A thread is waited for that is never made."""
    with open_process(pid) as process:
        tracer = Tracer.start(process)
        followed(tracer, {"nobody": Birth(1, "nobody")})
        time.sleep(after)
        if how == "the tracer is killed":
            os.kill(tracer.pid, signal.SIGKILL)
        elif how == "the next operation":
            tracer.run(Look())
        else:
            tracer.close()
        eventually(lambda: all_run(pid), 20)
        tracer.close()
        assert process.alive()


def test_a_program_that_ends_at_once(pid: int) -> None:
    with open_process(pid) as process, Tracer.start(process) as tracer:
        tracer.run(Attach(), Exec("/bin/true", ("true",), ()), Follow({"nobody": Birth(1, "nobody")}))
        assert process.wait_dead(5)
        with pytest.raises(ProcessLookupError):
            tracer.run(Look())


def test_a_program_that_is_stopped(pid: int) -> None:
    """SIGSTOP takes hold, and the threads are let go."""
    with open_process(pid) as process, Tracer.start(process) as tracer:
        followed(tracer, {"nobody": Birth(1, "nobody")})
        time.sleep(0.1)
        os.kill(pid, signal.SIGSTOP)
        eventually(lambda: read_status(pid).state == "T" and not read_status(pid).tracer)
        os.kill(pid, signal.SIGCONT)
        eventually(lambda: all_run(pid), 20)
