"""System calls in our own children: they notice nothing, whatever they wait in and whenever the tracer dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

import pytest

from cpr.errors import Blocked, CprError, PrivilegeError
from cpr.linux import proc, procfile, ptrace, stub, traceable
from cpr.linux.fds import descriptor_table
from cpr.linux.process import open_process
from cpr.linux.tracee import Call, Result, Tracee
from cpr.linux.tracer import Attach, Batch, Detach, Exec, Tracer
from tests.kernel.support import can, child, eventually, trace_a_child
from tests.kernel.tracees import (
    code_of,
    counting_child,
    deny_execve,
    kill,
    layout_of,
    send_queued,
    stopped,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from cpr.linux.tracer import Operation
    from tests.kernel.tracees import Child

AT_FDCWD = -100

pytestmark = [
    pytest.mark.skipif(stub.architecture() is None, reason="not on this architecture"),
    pytest.mark.skipif(not can(trace_a_child), reason="cannot trace here"),
]
needs_suspension = pytest.mark.skipif(
    not can(lambda: trace_a_child(ptrace.PTRACE_O_SUSPEND_SECCOMP)), reason="cannot suspend seccomp filters here"
)


def rounds(child: Child, count: int, calls: int = 3) -> None:
    room = stub.find_room(child.pid)
    for _ in range(count):
        with Tracee.attach(child.process, room=room) as tracee:
            for _ in range(calls):
                assert tracee.call("getpid") == child.pid


@pytest.mark.parametrize(
    ("threads", "count", "births"), [(1, 40, False), (9, 40, False), (33, 25, False), (9, 25, True)]
)
def test_nothing_is_noticed(threads: int, count: int, births: bool) -> None:
    """Every wait goes on to its proper end, no EINTR, and nobody stands still."""
    with counting_child(threads, births=births) as child:
        code, layout = code_of(child.pid), layout_of(child.pid)
        before = child.seen()
        rounds(child, count)
        after = child.seen()
        if threads > 1:
            child.wake()
            eventually(lambda: child.seen()["woken"] > before["woken"])
            eventually(lambda: child.seen()["ticks"] > after["ticks"])
        if births:
            eventually(lambda: child.seen()["born"] > after["born"])
        assert child.seen()["wrong"] == []
        assert (code_of(child.pid), layout_of(child.pid)) == (code, layout)


@pytest.mark.full
@pytest.mark.parametrize("threads", [1, 9, 33])
def test_nothing_is_noticed_three_hundred_times(threads: int) -> None:
    with counting_child(threads, births=threads > 1) as child:
        code, layout = code_of(child.pid), layout_of(child.pid)
        rounds(child, 300, 10)
        assert child.seen()["wrong"] == []
        assert (code_of(child.pid), layout_of(child.pid)) == (code, layout)


@pytest.mark.parametrize("threads", [1, 8])
def test_no_signal_is_lost(threads: int) -> None:
    with counting_child(threads, handle=True) as child:
        sent = dict.fromkeys(range(signal.SIGRTMIN, signal.SIGRTMIN + 3), 0)
        over = threading.Event()

        def storm() -> None:
            while not over.is_set():
                for number in sent:
                    sent[number] += send_queued(child.pid, number)
                os.kill(child.pid, signal.SIGUSR1)
                time.sleep(0.0005)

        storming = threading.Thread(target=storm)
        storming.start()
        rounds(child, 60, 5)
        over.set()
        storming.join()
        eventually(lambda: len(child.seen()["queued"]) == sum(sent.values()))
        seen = child.seen()
        assert {number: seen["queued"].count(number) for number in sent} == sent
        assert seen["handled"] > 0
        assert seen["wrong"] == []
        assert sum(sent.values()) > 60


def test_a_stopped_process_stays_stopped() -> None:
    with counting_child(8) as child:
        os.kill(child.pid, signal.SIGSTOP)
        eventually(lambda: stopped(child.pid))
        rounds(child, 5)
        eventually(lambda: stopped(child.pid))
        os.kill(child.pid, signal.SIGCONT)
        assert child.seen()["wrong"] == []


def test_stopped_while_it_works_for_us() -> None:
    with counting_child(8) as child:
        with Tracee.attach(child.process) as tracee:
            tracee.call("getpid")
            os.kill(child.pid, signal.SIGSTOP)
            assert [tracee.call("getpid") for _ in range(5)] == [child.pid] * 5
        eventually(lambda: stopped(child.pid))
        os.kill(child.pid, signal.SIGCONT)
        assert child.seen()["wrong"] == []


@pytest.fixture
def busy() -> Iterator[Child]:
    with counting_child(9) as child:
        yield child


def test_calls_are_real(busy: Child, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("words")
    with Tracee.attach(busy.process) as tracee:
        opened, *_, moved, _ = tracee.batch(
            [
                Call("openat", (AT_FDCWD, os.fsencode(path) + b"\0", os.O_RDONLY | os.O_CLOEXEC, 0)),
                Call("fcntl", (Result(0), fcntl.F_SETFD, 0)),
                Call("dup3", (Result(0), 90, os.O_CLOEXEC)),
                Call("close", (Result(0),)),
            ]
        )
        buffer = tracee.scratch(5)
        assert tracee.call("read", moved, buffer, 5) == 5
        assert tracee.read(buffer, 5) == b"words"
        assert tracee.read(tracee.put(b"y" * 200_000), 200_000) == b"y" * 200_000
        with pytest.raises(OSError, match="Bad file descriptor"):
            tracee.batch([Call("close", (77,)), Call("close", (90,))])
    table = {row.number: row for row in descriptor_table(busy.pid)}
    assert opened not in table
    assert table[90].target == str(path)
    assert table[90].close_on_exec
    assert busy.seen()["wrong"] == []


@pytest.mark.parametrize("thread", ["leader", "another"])
def test_execve_keeps_pid_start_time_and_descriptors(busy: Child, thread: str) -> None:
    born, number = proc.process_start_time(busy.pid), 80
    tids = sorted(t.tid for t in proc.threads(busy.pid))
    with Tracee.attach(busy.process, thread=tids[0] if thread == "leader" else tids[3]) as tracee:
        tracee.call("dup3", 0, number, os.O_CLOEXEC)
        tracee.call("dup3", 0, number + 1, os.O_CLOEXEC)
        tracee.call("fcntl", number, fcntl.F_SETFD, 0)
        tracee.execve("/bin/sleep", ["sleep", "1000"], ["A=b", "C=d"])
        assert tracee.executed
        assert "t" in proc.read_stat(busy.pid).state
    eventually(lambda: proc.read_argv(busy.pid) == ("sleep", "1000"))
    assert proc.read_environ(busy.pid) == (("A", "b"), ("C", "d"))
    assert proc.process_start_time(busy.pid) == born
    assert {0, 1, 2, number} <= (open_now := {row.number for row in descriptor_table(busy.pid)})
    assert number + 1 not in open_now
    assert len(proc.threads(busy.pid)) == 1
    assert blocked(busy.pid) == 0
    eventually(lambda: proc.read_stat(busy.pid).state == "S")


def blocked(pid: int) -> int:
    """But for those that the child blocks itself."""
    text = procfile.read_text(pid, "status")
    mask = next(int(line.split()[1], 16) for line in text.splitlines() if line.startswith("SigBlk:"))
    theirs = {int(signal.SIGUSR1), *range(signal.SIGRTMIN, signal.SIGRTMIN + 3)}
    return int(mask & ~sum(1 << (number - 1) for number in theirs))


def test_execve_of_a_descriptor(busy: Child) -> None:
    with Tracee.attach(busy.process) as tracee:
        fd = tracee.call("openat", AT_FDCWD, b"/bin/sleep\0", os.O_RDONLY, 0)
        tracee.execve(fd, ["sleep", "1000"], [])
    eventually(lambda: proc.read_argv(busy.pid) == ("sleep", "1000"))


def test_a_failed_execve_harms_nobody(busy: Child, tmp_path: Path) -> None:
    (tmp_path / "no-program").write_text("nothing")
    with Tracee.attach(busy.process) as tracee:
        with pytest.raises(FileNotFoundError):
            tracee.execve("/nosuch", ["x"], [])
        with pytest.raises(PermissionError):
            tracee.execve(str(tmp_path / "no-program"), ["x"], [])
        (tmp_path / "no-program").chmod(0o755)
        with pytest.raises(OSError, match="Exec format error"):
            tracee.execve(str(tmp_path / "no-program"), ["x"], [])
        assert tracee.call("getpid") == busy.pid
    assert busy.seen()["wrong"] == []
    rounds(busy, 3)


@needs_suspension
def test_a_seccomp_filter_is_suspended() -> None:
    with counting_child(4, prefix=deny_execve()) as child:
        assert traceable.why_not(child.pid) is None
        rounds(child, 3)
        with Tracee.attach(child.process) as tracee:
            tracee.execve("/bin/sleep", ["sleep", "1000"], [])
        eventually(lambda: proc.read_argv(child.pid) == ("sleep", "1000"))
        assert proc.read_status(child.pid).seccomp == 2


# the helper --------------------------------------------------------------------------------------------------


def job(busy: Child, calls: int = 10) -> tuple[Any, ...]:
    return Attach(), Batch((Call("getpid"),) * calls), Detach()


def test_the_helper_does_a_whole_job(busy: Child) -> None:
    with Tracer.start(busy.process) as tracer:
        for _ in range(3):
            attached, results, _ = tracer.run(*job(busy))
            assert str(*attached) in os.listdir(f"/proc/{busy.pid}/task")
            assert results == (busy.pid,) * 10
        assert busy.seen()["wrong"] == []
        assert proc.read_status(busy.pid).tracer == 0
        tracer.run(Attach(), Exec("/bin/sleep", ("sleep", "1000"), ("A=b",)), Detach())
    eventually(lambda: proc.read_argv(busy.pid) == ("sleep", "1000"))


def test_what_fails_in_the_helper_is_undone(busy: Child) -> None:
    with Tracer.start(busy.process) as tracer:
        with pytest.raises(FileNotFoundError):
            tracer.run(Attach(), Batch((Call("getpid"),)), Exec("/nosuch", ("x",), ()), Detach())
        assert proc.read_status(busy.pid).tracer == 0
    assert busy.seen()["wrong"] == []


STUCK = """
import ctypes, os, sys, threading, time
libc = ctypes.CDLL(None)
ticks = 0
def count():
    global ticks
    while True:
        ticks += 1
        time.sleep(0.001)
threading.Thread(target=count, daemon=True).start()
def spawn():  # the parent waits, deaf to everything, until the child that opens the FIFO execs
    actions, pid, argv = ctypes.create_string_buffer(512), ctypes.c_int(), (ctypes.c_char_p * 2)(b"true", None)
    libc.posix_spawn_file_actions_init(actions)
    libc.posix_spawn_file_actions_addopen(actions, 9, sys.argv[1].encode(), os.O_RDONLY, 0)
    libc.posix_spawn(ctypes.byref(pid), b"/bin/true", actions, None, argv, argv)
    os.wait()
    print("spawned", flush=True)
threading.Thread(target=spawn, daemon=True).start()
print("up", flush=True)
for line in sys.stdin:
    print(ticks, flush=True)
"""


def test_a_thread_that_does_not_stop(tmp_path: Path) -> None:
    """It is told of in time, the others run again, and so does that thread when it can."""
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    with subprocess.Popen(
        [sys.executable, "-c", STUCK, fifo], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as popen:
        assert popen.stdin is not None
        assert popen.stdout is not None
        assert popen.stdout.readline() == "up\n"
        eventually(lambda: any(proc.read_stat(t.tid).state == "D" for t in proc.threads(popen.pid)))
        with open_process(popen.pid) as process, Tracer.start(process) as tracer:
            with pytest.raises(TimeoutError, match="does not stop"):
                tracer.run(Attach(timeout=0.1))
        with open(fifo, "w"):
            assert popen.stdout.readline() == "spawned\n"
        ticks = []
        for _ in range(2):
            time.sleep(0.05)
            popen.stdin.write("tell\n")
            popen.stdin.flush()
            ticks.append(int(popen.stdout.readline()))
        assert ticks[0] < ticks[1]
        popen.kill()


def test_the_helper_does_not_start_for_another_process() -> None:
    with child() as pid, open_process(pid) as process:
        process.start_time += 1
        with pytest.raises(ProcessLookupError):
            Tracer.start(process)


def _killed_at(child: Child, after: float, calls: int = 30) -> None:
    with Tracer.start(child.process) as tracer:
        done = threading.Thread(target=lambda: _quietly(tracer, child, calls))
        done.start()
        time.sleep(after)
        kill(tracer.pid)
        done.join()


def _quietly(tracer: Tracer, child: Child, calls: int) -> None:
    operations: list[Operation] = [
        Attach(),
        Batch((*(Call("getpid"),) * calls, Call("dup", (0,)), Call("close", (Result(calls),)))),
    ]
    with contextlib.suppress(ConnectionError, FileNotFoundError):
        while True:
            tracer.run(*operations, Detach())


def wrong_after_death(child: Child) -> list[Any]:
    """Where nobody was left to have it restarted, epoll_wait says EINTR, as after SIGSTOP and SIGCONT (signal(7))."""
    return [row for row in child.seen()["wrong"] if row != ["epoll_wait", -1, errno.EINTR]]


def killed_at_random_moments(times: int, threads: int) -> list[float]:
    """The moments at which it did harm: the child died, stands still, or saw something wrong."""
    harmed = []
    moments = random.Random(times)  # noqa: S311
    with counting_child(threads, handle=True) as child:
        for _ in range(times):
            after = moments.uniform(0, 0.010)
            _killed_at(child, after)
            before = child.seen()
            os.kill(child.pid, signal.SIGUSR1)
            try:
                eventually(lambda before=before: child.seen()["handled"] > before["handled"])  # type: ignore[misc]
                eventually(lambda before=before: child.seen()["ticks"] > before["ticks"])  # type: ignore[misc]
                assert wrong_after_death(child) == []
            except (AssertionError, OSError, ValueError):
                harmed.append(after)
                break
    return harmed


def test_killing_the_helper_harms_nobody() -> None:
    assert killed_at_random_moments(8, 9) == []


@pytest.mark.full
@pytest.mark.parametrize("threads", [1, 9, 33])
def test_killing_the_helper_at_a_hundred_moments_harms_nobody(threads: int) -> None:
    assert killed_at_random_moments(100, threads) == []


STEPS = ("set_registers", "set_signal_mask", "resume_to_syscall", "poke", "interrupt", "resume", "poll", "detach")

def _die_at(name: str, when: str, count: int) -> None:
    """Arrange for the end of this process before or behind one of its requests."""
    real, left = getattr(ptrace, name), [count]

    def deadly(*words: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and when == "before":
            kill(os.getpid())
        result = real(*words)
        if left[0] == 0:
            kill(os.getpid())
        return result

    setattr(ptrace, name, deadly)


def _calls(child: Child, count: int) -> None:
    """The requests of a whole life."""
    tids = [thread.tid for thread in proc.threads(child.pid)]
    with Tracee.attach(child.process, thread=tids[count % len(tids)]) as tracee:
        tracee.put(b"word")
        assert [tracee.call("getpid") for _ in range(2)] == [child.pid] * 2
        with pytest.raises(FileNotFoundError):
            tracee.execve("/nosuch", ["x"], [])


def dies_at(child: Child, name: str, when: str, count: int, life: Callable[[], None] | None = None) -> bool:
    """A tracer, a fork of ours, is killed there. False: it was through before."""
    pid = os.fork()
    if pid == 0:
        try:
            _die_at(name, when, count)
            if life is not None:
                life()
            else:
                _calls(child, count)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def _let_go(child: Child) -> bool:
    """Whether it has finished what a tracer that died had asked of it."""
    try:
        Tracee.attach(child.process).detach()
    except Blocked:
        return False
    return True


def _dies_everywhere(threads: int, counts: range) -> int:
    deaths = 0
    with counting_child(threads, handle=True) as child:
        for name in STEPS:
            for when in ("before", "after"):
                for count in counts:
                    if not dies_at(child, name, when, count):
                        break
                    deaths += 1
                    eventually(lambda: _let_go(child))
                    before = child.seen()
                    os.kill(child.pid, signal.SIGUSR1)
                    eventually(lambda before=before: child.seen()["handled"] > before["handled"])  # type: ignore[misc]
                    assert wrong_after_death(child) == [], (name, when, count)
        with Tracee.attach(child.process) as tracee:
            assert tracee.call("getpid") == child.pid
    return deaths


@pytest.mark.parametrize("threads", [1, 9])
def test_death_right_before_and_after_any_request_harms_nobody(threads: int) -> None:
    """What random moments rarely meet: the first call, and each request before or behind which we die."""
    assert _dies_everywhere(threads, range(1, 30)) > 60


def _storm(pid: int, report: int) -> int:
    """A process that queues real-time signals until SIGTERM, then writes how many."""
    storm = os.fork()
    if storm:
        return storm
    over: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: over.append(number))
    sent = 0
    while not over:
        sent += sum(send_queued(pid, number) for number in range(signal.SIGRTMIN, signal.SIGRTMIN + 3))
        time.sleep(0.0003)
    os.write(report, str(sent).encode())
    os._exit(0)


@pytest.mark.full
@pytest.mark.parametrize("threads", [1, 9])
def test_no_signal_is_lost_when_the_tracer_dies(threads: int) -> None:
    """A thread that is about to execute a program hears what the first thread hears. If the tracer dies there and the
    program cannot be executed, it may handle a signal in the first one's stead: its own call says EINTR (signal(7)).
    """
    reading, writing = os.pipe()
    with counting_child(threads, handle=True) as child:
        storm = _storm(child.pid, writing)
        for name in STEPS:
            for when in ("before", "after"):
                for count in range(1, 30):
                    if not dies_at(child, name, when, count):
                        break
                    eventually(lambda: _let_go(child))
        os.kill(storm, signal.SIGTERM)
        os.waitpid(storm, 0)
        sent = int(os.read(reading, 100))
        eventually(lambda: len(child.seen()["queued"]) == sent)
        wrong = [row for row in wrong_after_death(child) if row[-1] not in (errno.EINTR, "too short")]
        assert wrong == []
    os.close(reading)
    os.close(writing)


EXEC_STEPS = ("set_registers", "set_signal_mask", "resume_to_syscall", "poll", "reap", "detach")


def _execs(child: Child, thread: int) -> None:
    with Tracee.attach(child.process, thread=thread) as tracee:
        tracee.execve("/bin/sleep", ["sleep", "1000"], [])


def _killed_in_execve(steps: Sequence[str], counts: Iterable[int], last: bool) -> tuple[int, int]:
    """(how often the old program went on, how often the new one began)."""
    old = new = 0
    for name in steps:
        for when in ("before", "after"):
            for count in counts:
                with counting_child(5) as child:
                    tid = [thread.tid for thread in proc.threads(child.pid)][-1 if last else 0]
                    if not dies_at(child, name, when, count, lambda c=child, t=tid: _execs(c, t)):  # type: ignore[misc]
                        break
                    eventually(lambda pid=child.pid: proc.read_status(pid).tracer == 0)  # type: ignore[misc]
                    time.sleep(0.02)
                    if proc.read_argv(child.pid) == ("sleep", "1000"):
                        eventually(lambda pid=child.pid: proc.read_stat(pid).state == "S")  # type: ignore[misc]
                        assert blocked(child.pid) == 0, (name, when, count)
                        new += 1
                    else:
                        assert wrong_after_death(child) == [], (name, when, count)
                        old += 1
    return old, new


def test_death_in_execve_leaves_the_old_program_or_the_new_one() -> None:
    old, new = _killed_in_execve(("resume_to_syscall", "detach"), (1, 6, 7, 8), last=False)
    assert new > 0
    assert old > 0


@pytest.mark.full
@pytest.mark.parametrize("last", [False, True])
def test_death_anywhere_in_execve_leaves_the_old_program_or_the_new_one(last: bool) -> None:
    old, new = _killed_in_execve(EXEC_STEPS, range(1, 16), last)
    assert new > 5
    assert old > 20


CALLER = """
import sys
from cpr.linux.process import open_process
from cpr.linux.tracee import Call
from cpr.linux.tracer import Attach, Batch, Tracer
tracer = Tracer.start(open_process(int(sys.argv[1])))
print(tracer.pid, flush=True)
if sys.argv[2] == "idle":
    tracer.run(Attach(), Batch((Call("getpid"),)))
    print("attached", flush=True)
    sys.stdin.read()
tracer.run(Attach(), Batch((Call("getpid"),) * 100000))
"""


@pytest.mark.parametrize("how", ["idle", "working"])
def test_when_the_caller_dies_the_helper_undoes_and_ends(busy: Child, how: str) -> None:
    layout = layout_of(busy.pid)
    code = code_of(busy.pid)
    with subprocess.Popen(
        [sys.executable, "-c", CALLER, str(busy.pid), how],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."},
    ) as caller:  # fmt: skip
        assert caller.stdout is not None
        helper = int(caller.stdout.readline())
        eventually(lambda: proc.read_status(busy.pid).tracer == helper)
        with open_process(helper) as process:
            caller.kill()
            assert process.wait_dead(5)
    assert busy.seen()["wrong"] == []
    assert (code_of(busy.pid), layout_of(busy.pid)) == (code, layout)


# refusals ----------------------------------------------------------------------------------------------------


def test_one_that_is_traced_already(busy: Child) -> None:
    assert traceable.why_not(busy.pid) is None
    with Tracer.start(busy.process) as tracer:
        tracer.run(Attach())
        refused = traceable.refusal(busy.pid)
        assert isinstance(refused, Blocked)
        assert f"traced by pid {tracer.pid}" in refused.message
        with Tracer.start(busy.process) as second, pytest.raises(PermissionError):
            second.run(Attach())
    assert busy.seen()["wrong"] == []


def test_one_of_another_user_without_the_capability() -> None:
    def refused() -> CprError | None:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        return traceable.refusal(os.getppid())

    def check() -> None:
        found = refused()
        assert isinstance(found, PrivilegeError)
        assert found.ability == "CAP_SYS_PTRACE"

    if not can(lambda: os.setresuid(65534, 65534, 65534)):
        pytest.skip("cannot become another user here")
    assert can(check)
