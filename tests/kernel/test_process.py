"""Running programs, and holding on to a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from cpr.linux import proc
from cpr.linux import process as processes
from cpr.linux.process import RunFailed, RunTimeout, open_process, run
from tests.kernel.support import child, eventually


def test_run() -> None:
    done = run(["sh", "-c", "cat; echo err >&2"], timeout=10, stdin=b"in")
    assert (done.status, done.stdout, done.stderr) == (0, b"in", b"err\n")


def test_run_failing() -> None:
    with pytest.raises(RunFailed, match="sh ended with status 3: no way") as caught:
        run(["sh", "-c", "echo no way >&2; exit 3"], timeout=10)
    assert caught.value.completed.status == 3
    assert run(["false"], timeout=10, check=False).status == 1
    with pytest.raises(RunFailed, match="SIGKILL"):
        run(["sh", "-c", "kill -9 $$"], timeout=10)
    with pytest.raises(FileNotFoundError):
        run(["/nosuch"], timeout=1)


def test_run_kills_the_whole_group_when_time_is_up() -> None:
    began = time.monotonic()
    with pytest.raises(RunTimeout, match="did not end within") as caught:
        run(["sh", "-c", "sleep 1000 & echo $!; sleep 1000"], timeout=0.3)
    assert time.monotonic() - began < 3
    pid = int(caught.value.completed.stdout)
    eventually(lambda: not lives(pid))


def lives(pid: int) -> bool:
    try:
        return not proc.is_zombie(pid)
    except ProcessLookupError:
        return False


def test_run_when_a_daemon_keeps_the_pipes() -> None:
    """A grandchild in another session holds them open: we do not wait for it."""
    began = time.monotonic()
    with pytest.raises(RunTimeout) as caught:
        run(["sh", "-c", "setsid sleep 1000 & echo $!; sleep 1000"], timeout=0.3)
    assert time.monotonic() - began < 5
    with open_process(int(caught.value.completed.stdout)) as process:
        assert proc.read_argv(process.pid) == ("sleep", "1000")
        process.kill()
        assert process.wait_dead(5)


def test_open_process_kill_and_reap() -> None:
    started = subprocess.Popen(["sleep", "1000"])
    with open_process(started.pid, proc.process_start_time(started.pid)) as process:
        assert process.alive()
        assert not process.wait_dead(0.01)
        process.signal(signal.SIGSTOP)
        eventually(lambda: proc.read_stat(started.pid).state == "T")
        process.kill()
        assert process.wait_dead(5)
        assert process.status == -signal.SIGKILL
        assert not process.alive()
        process.kill()
        with pytest.raises(ProcessLookupError):
            process.signal(0)
        assert process.wait_dead(0)
        with pytest.raises(ChildProcessError):
            os.waitpid(started.pid, 0)
    started.returncode = -9


def test_wait_dead_of_somebody_elses_child() -> None:
    with child(argv=("sh", "-c", "sleep 1000; :")) as shell:
        eventually(lambda: bool(proc.children(shell)))
        (pid,) = proc.children(shell)
        with open_process(pid) as process:
            process.kill()
            assert process.wait_dead(5)
            assert process.status is None


def test_open_process_wants_the_very_process() -> None:
    with child() as pid:
        with pytest.raises(ProcessLookupError):
            open_process(pid, proc.process_start_time(pid) + 1)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ProcessLookupError):
            open_process(2**22 - 1)
        assert len(os.listdir("/proc/self/fd")) == before


def test_lives_is_asked_of_the_very_process() -> None:
    started = subprocess.Popen(["sleep", "1000"])
    start_time = proc.process_start_time(started.pid)
    assert processes.lives(started.pid, start_time)
    assert not processes.lives(started.pid, start_time + 1)
    started.kill()
    eventually(lambda: proc.is_zombie(started.pid))
    assert not processes.lives(started.pid, start_time), "one that nobody has reaped has ended"
    started.wait()
    assert not processes.lives(started.pid, start_time)


FORKER = """
import subprocess, sys, signal
from cpr.linux.process import end_with_parent
child = subprocess.Popen(["sleep", "1000"], preexec_fn=end_with_parent if sys.argv[1] == "ends" else None)
print(child.pid, flush=True)
signal.pause()
"""


@pytest.mark.parametrize("ends", [True, False])
def test_a_child_ends_with_its_parent(ends: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FORKER, "ends" if ends else "stays"], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        with open_process(int(parent.stdout.readline())) as grandchild:
            parent.kill()
            assert grandchild.wait_dead(5.0 if ends else 0.2) is ends
            grandchild.kill()
            assert grandchild.wait_dead(5)
