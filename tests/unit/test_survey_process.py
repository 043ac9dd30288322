"""What is found out about a process that is to keep living, on our own children."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cpr import survey_process
from cpr.errors import Blocked, PrivilegeError
from cpr.linux import proc, procfile, traceable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PARENT = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None)
def child(name):
    pid = os.fork()
    if not pid:
        libc.prctl(15, name.encode())
        time.sleep(60)
    return pid
me = os.getpid()
pids = [child(f"cleanup/{me}"), child(f"cleanup/{me}"), child("cleanup/1"), child("qemu-system-x86")]
dead = os.fork()
if not dead:
    libc.prctl(15, f"cleanup/{me}".encode())
    os._exit(0)
os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT)
print(*pids, dead, flush=True)
time.sleep(60)
"""


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as child:
        yield child
        child.kill()


def test_a_process_of_ours_can_be_traced(sleeper: subprocess.Popen[bytes]) -> None:
    assert (survey_process.untraceable(sleeper.pid) is None) is (traceable.refusal(sleeper.pid) is None)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PrivilegeError("pid 1: no", ability="CAP_X", hint="needs CAP_X"), ("pid 1: no", "CAP_X", "needs CAP_X")),
        (Blocked("pid 1 is traced by pid 2", hint="end it"), ("pid 1 is traced by pid 2", "", "end it")),
        (PermissionError(13, "no", "/proc/1/mem"), ("/proc/1/mem cannot be read", "CAP_SYS_PTRACE", "run cpr as root")),
    ],
)
def test_a_refusal_becomes_a_fact(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: tuple[str, str, str]
) -> None:
    def refusal(pid: int) -> Exception:
        if isinstance(error, OSError):
            raise error
        return error

    monkeypatch.setattr(traceable, "refusal", refusal)
    found = survey_process.untraceable(1)
    assert found is not None
    assert (found.why, found.ability, found.way_out) == expected


def test_a_zombie_is_gone(sleeper: subprocess.Popen[bytes]) -> None:
    os.kill(sleeper.pid, signal.SIGKILL)
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert proc.is_zombie(sleeper.pid)
    with pytest.raises(ProcessLookupError):
        survey_process.untraceable(sleeper.pid)
    assert survey_process.teardown_helpers(sleeper.pid) == ()


def test_helpers_of_async_teardown() -> None:
    """Those that are named after this process and alive; not another's, not a child like any other, not a zombie."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children: list[int] = []
        try:
            children = [int(word) for word in parent.stdout.readline().split()]
            for pid in children[:2]:
                while not procfile.read_text(pid, "comm").startswith("cleanup/"):
                    continue
            assert survey_process.teardown_helpers(parent.pid) == tuple(sorted(children[:2]))
            assert survey_process.teardown_helpers(children[0]) == ()
        finally:
            for pid in children[:4]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            parent.kill()


def test_a_pid_file(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    pid, file = sleeper.pid, tmp_path / "pid"
    asked = [(str(file), "/"), ("pid", str(tmp_path))]
    contents = {f"{pid}\n": True, f" {pid} ": True, f"{pid}0": False, "": False, "x" * 100: False}
    for content, expected in contents.items():
        file.write_text(content)
        assert [survey_process.pidfile_holds_pid(pid, *where) for where in asked] == [expected] * 2
    file.unlink()
    assert not survey_process.pidfile_holds_pid(pid, str(file), "/")
    assert not survey_process.pidfile_holds_pid(pid, "", "/")


def test_a_pid_file_that_is_none(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """No link is followed, nothing blocks, and no name is too odd."""
    (tmp_path / "real").write_text(str(sleeper.pid))
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "closed").write_text("x")
    for name in ("link", "fifo", ".", "no/such", "a\0b", "x" * 5000, "closed/x", "../" * 40 + "dev/zero"):
        assert not survey_process.pidfile_holds_pid(sleeper.pid, str(tmp_path / name), "/"), name
