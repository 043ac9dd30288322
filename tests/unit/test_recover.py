"""Journals that nobody closed, of every kind: what is believed of them, and what is done to the processes they name.

The processes are children that sleep, so that none answers on a monitor. With real QEMUs: tests/qemu/test_faults*.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cpr import journal
from cpr.engines.successor import MARK, run_mark
from cpr.errors import Exit, JournalError, NotFound
from cpr.linux import proc
from cpr.linux.lock import make_run_directory, process_lock
from cpr.linux.process import open_process
from cpr.model import MonitorAddress, Outcome, Status, Step
from cpr.recover import recover
from tests.unit import values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cpr.model import Plan, ProcessId

Lines = list[dict[str, Any]]


class Prepare(Step):
    def describe(self) -> str:
        return "prepare"


class Go(Step):
    def describe(self) -> str:
        return "go"


@pytest.fixture
def child() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    children: list[subprocess.Popen[bytes]] = []

    def start(**environ: str) -> subprocess.Popen[bytes]:
        children.append(subprocess.Popen(["sleep", "60"], env={**os.environ, **environ}))
        return children[-1]

    yield start
    for process in children:
        process.kill()
        process.wait()


class Left:
    """A run directory with a journal that its keeper left."""

    def __init__(self, base: Path, old: subprocess.Popen[bytes], run: str = "run-1") -> None:
        self.base = base
        make_run_directory(str(base))
        with open_process(old.pid) as process:
            guest = values.guest(process.pid, process.start_time)
        guest = replace(guest, monitor=MonitorAddress(label="mon0", path=f"{base}/nobody"))
        self.plan: Plan = replace(values.plan(Prepare(), Go(commit=True), Prepare()), guest=guest)
        self.journal = journal.Journal(self.plan, run, directory=str(base))
        self.path = Path(self.journal.path)

    @property
    def guest(self) -> ProcessId:
        return self.plan.guest.process

    def lines(self) -> Lines:
        text = self.path.read_bytes().split(b"\0")[0]
        return [json.loads(line) for line in text.splitlines()]

    def rewrite(self, lines: Lines) -> None:
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def header(self, **changes: Any) -> None:
        """Change it; a name with a dot is one of the guest's."""
        lines = self.lines()
        for name, value in changes.items():
            inside = lines[0]["guest"] if name.startswith("guest_") else lines[0]
            key = name.removeprefix("guest_")
            if value is None:
                del inside[key]
            else:
                inside[key] = value
        self.rewrite(lines)

    def starting(self, new: subprocess.Popen[bytes] | None = None) -> str:
        """The new QEMU is being started, or is there; the mark that it has."""
        self.journal.step(0, "doing")
        self.journal.fact("starting", run="run-1")
        if new is not None:
            with open_process(new.pid) as process:
                self.journal.fact("new", pid=process.pid, start_time=process.start_time)
        return run_mark("run-1", self.guest.pid)

    def commit(self) -> None:
        settings = {
            "capabilities": {}, "parameters": {}, "discarding": [], "stats_polling": [], "threads": {}, "pidfile": "",
            "cwd": "/", "hand_back": [],
        }  # fmt: skip
        self.journal.fact("settings", value=settings)
        self.journal.step(1, "doing")

    def recover(self, run: str | None = None) -> list[Outcome]:
        return [outcome for _, outcome in recover(run, base=str(self.base))]

    @property
    def open(self) -> bool:
        return journal.read(str(self.path)).open


@pytest.fixture
def left(tmp_path: Path, child: Callable[..., subprocess.Popen[bytes]]) -> Left:
    return Left(tmp_path / "run", child())


def alive(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is None


# -- what is no journal


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0" * 4096, b"garbage\n", b"{}\n", b"[]\n", b"null\n", b"1\n", b'"x"\n', b"\xff\xfe\n",
        b'{"format": "cpr.journal/1"}\n', b'{"format": "cpr.journal/9", "run": "x"}\n',
        b'{"format": "cpr.journal/1", "run": 1, "boot_id": 2, "guest": [], "steps": 3}\n',
        b'{"format": "cpr.journal/1", "run": "x"', b"[" * 100000 + b"\n",
    ],
)  # fmt: skip
def test_what_is_no_journal_is_left_alone(left: Left, content: bytes) -> None:
    left.path.write_bytes(content)
    (outcome,) = left.recover()
    assert outcome.exit_code == Exit.NEEDS_ATTENTION
    assert "the guest was left as it is" in outcome.where
    assert str(left.path) in outcome.error
    assert left.path.read_bytes() == content


MISSING = ["run", "boot_id", "steps", "guest", *(f"guest_{name}" for name in (
    "pid", "start_time", "uid", "name", "uuid", "runstate", "monitor", "capabilities", "parameters", "discarding",
    "pidfile", "cwd"
))]  # fmt: skip


@pytest.mark.parametrize("name", MISSING)
@pytest.mark.parametrize("value", [None, 3.5], ids=["missing", "nonsense"])
def test_a_header_that_lacks_something_is_not_acted_on(
    left: Left, child: Callable[..., subprocess.Popen[bytes]], name: str, value: object
) -> None:
    new = child()
    left.starting(new)
    left.header(**{name: value})
    (outcome,) = left.recover()
    assert outcome.exit_code == Exit.NEEDS_ATTENTION
    assert "cannot be read" in outcome.where
    assert alive(new)


@pytest.mark.parametrize("kind", ["fifo", "directory", "link", "huge"])
def test_what_is_planted_is_not_read(left: Left, kind: str) -> None:
    """Everybody may put things there: none may block, lead elsewhere, or fill our memory."""
    left.path.unlink()
    if kind == "fifo":
        os.mkfifo(left.path)
    elif kind == "directory":
        left.path.mkdir()
    elif kind == "link":
        left.path.symlink_to("/etc/passwd")
    else:
        with open(left.path, "wb") as file:
            file.truncate(1 << 40)
    began = time.monotonic()
    (outcome,) = left.recover()
    assert outcome.exit_code == Exit.NEEDS_ATTENTION
    with pytest.raises(JournalError):  # of somebody who is believed: what was done to the guest is not known
        journal.open_journal_of(left.guest, str(left.base), owner_uid=0)
    assert time.monotonic() - began < 5
    if os.geteuid() == 0:
        os.chown(left.path, 65534, 65534, follow_symlinks=False)
        assert journal.open_journal_of(left.guest, str(left.base), owner_uid=0) is None


def test_one_that_cannot_be_read_does_not_stop_the_others(
    left: Left, child: Callable[..., subprocess.Popen[bytes]]
) -> None:
    left.path.write_bytes(b"garbage\n")
    other = Left(left.base, child(), "run-2")
    other.header(boot_id="another")
    first, second = left.recover()
    assert (first.exit_code, second.exit_code) == (Exit.NEEDS_ATTENTION, Exit.OK)
    assert not other.open


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_a_strangers_journal_is_not_acted_on(left: Left, child: Callable[..., subprocess.Popen[bytes]]) -> None:
    new = child()
    left.starting(new)
    os.chown(left.path, 12345, 12345)
    (outcome,) = left.recover()
    assert outcome.exit_code == Exit.NEEDS_ATTENTION
    assert "whose guest this is not" in outcome.error
    assert alive(new)
    assert journal.open_journal_of(left.guest, str(left.base), owner_uid=0) is None
    assert journal.open_journal_of(left.guest, str(left.base), owner_uid=12345) is not None


# -- what is one


def test_another_boots_is_closed_and_not_acted_on(left: Left, child: Callable[..., subprocess.Popen[bytes]]) -> None:
    new = child()
    left.starting(new)
    left.header(boot_id="3f2504e0-4f89-41d3-9a0c-0305e82c3301")
    (outcome,) = left.recover()
    assert outcome.exit_code == Exit.OK
    assert "booted since" in outcome.where
    assert alive(new)
    assert not left.open
    assert left.recover() == []


def test_a_cut_line_is_not_believed_and_the_outcome_comes_in_its_place(left: Left) -> None:
    left.journal.step(0, "doing")
    left.header(boot_id="another")
    text = left.path.read_bytes()
    left.path.write_bytes(text + b'{"step":1,"state":"doi')
    left.recover()
    assert [line.get("step") for line in left.lines()] == [None, 0, None]
    assert left.lines()[-1]["outcome"]["exit_code"] == Exit.OK


def test_closed_ones_are_nothing_to_recover(left: Left) -> None:
    left.header(boot_id="another")
    left.recover()
    assert left.recover() == []
    assert left.recover("run-1") == []


def test_a_run_that_nobody_knows(left: Left) -> None:
    with pytest.raises(NotFound):
        left.recover("run-9")


def test_a_keeper_at_work_is_left_alone(left: Left, child: Callable[..., subprocess.Popen[bytes]]) -> None:
    new = child()
    left.starting(new)
    holder = {"run": "run-1", "command": "update"}
    with process_lock(
        str(left.base), left.guest.pid, left.guest.start_time, boot_id=proc.boot_id(), owner_uid=0, holder=holder
    ):
        (outcome,) = left.recover()
    assert (outcome.status, outcome.exit_code) == ("busy", Exit.BUSY)
    assert "run-1" in outcome.error
    assert str(os.getpid()) in outcome.error
    assert alive(new)
    assert left.open


def test_everything_with_the_runs_mark_dies_and_nothing_else(
    left: Left, child: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """The keeper died before it knew a pid; and a new QEMU may have helpers, which have its environment."""
    mark = left.starting()
    mine = [child(**{MARK: mark}) for _ in range(3)]
    others = [child(**{MARK: "run-2/1"}), child(**{MARK: f"{mark}1"}), child()]
    for process in (*mine, *others):
        until_running(process)
    (outcome,) = left.recover()
    assert not any(alive(process) for process in mine)
    assert all(alive(process) for process in others)
    # its monitor answers nobody: the journal stays open, to try again
    assert outcome.exit_code == Exit.NEEDS_ATTENTION
    assert outcome.hint == "cpr recover run-1 tries again"
    assert left.open


def test_a_pid_that_belongs_to_another_process_by_now_is_not_killed(
    left: Left, child: Callable[..., subprocess.Popen[bytes]]
) -> None:
    innocent = child()
    left.starting()
    left.journal.fact("new", pid=innocent.pid, start_time=1)
    left.recover()
    assert alive(innocent)


def test_what_rehearsed_dies_and_who_has_its_pid_by_now_does_not(
    left: Left, child: Callable[..., subprocess.Popen[bytes]]
) -> None:
    rehearsing, other = child(), child()
    starts = [proc.process_start_time(process.pid) for process in (rehearsing, other)]
    left.journal.step(0, "doing")
    left.journal.fact("rehearsing", processes=[[rehearsing.pid, starts[0]], [other.pid, starts[1] - 1]])
    left.journal.abandon()
    left.recover()
    assert not alive(rehearsing)
    assert alive(other)


def test_a_guest_that_ended_meanwhile(left: Left) -> None:
    left.starting()
    os.kill(left.guest.pid, signal.SIGKILL)
    wait_dead(left.guest)
    (outcome,) = left.recover()
    assert outcome.exit_code == Exit.NEEDS_ATTENTION
    assert "ended by itself" in outcome.where
    assert not left.open


def test_behind_the_commit_the_old_one_is_never_resumed(
    left: Left, child: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """The new one died: the guest has crashed, and that is all that can be said."""
    new = child()
    left.starting(new)
    left.commit()
    new.kill()
    new.wait()
    (outcome,) = left.recover()
    assert (outcome.exit_code, outcome.pid_after) == (Exit.NEEDS_ATTENTION, 0)
    assert "must never be resumed" in outcome.where
    assert not left.open


def test_behind_the_commit_the_old_one_is_ended_and_the_new_one_stays(
    left: Left, child: Callable[..., subprocess.Popen[bytes]]
) -> None:
    new = child()
    left.starting(new)
    left.commit()
    (outcome,) = left.recover()
    wait_dead(left.guest)
    assert alive(new)
    # it cannot be told to go on: to be tried again, as often as somebody likes
    assert (outcome.exit_code, outcome.pid_after) == (Exit.NEEDS_ATTENTION, new.pid)
    assert left.open
    assert left.recover()[0].exit_code == Exit.NEEDS_ATTENTION
    assert alive(new)


def test_what_a_journal_said_is_told_again(left: Left) -> None:
    outcome = Outcome(
        guest="web1",
        uuid="",
        status=Status.UPDATED,
        exit_code=8,
        where="the guest runs in the new QEMU",
        engine="handover",
        pid_before=left.guest.pid,
        pid_after=7,
        runstate="running",
        binary_before=values.binary(),
        blackout_seconds=0.004,
        total_seconds=1.5,
        error="differs",
        notes=("a", "b"),
    )
    left.journal.close(outcome)
    told = journal.read(str(left.path)).result()
    assert journal.outcome_json(told) == journal.outcome_json(outcome)


def test_a_full_disk_is_no_reason_not_to_close_it(left: Left, child: Callable[..., subprocess.Popen[bytes]]) -> None:
    """What was allocated in advance is used, and the file never needs more room than it has."""
    size = left.path.stat().st_size
    left.starting()
    os.kill(left.guest.pid, signal.SIGKILL)
    wait_dead(left.guest)
    watcher = subprocess.run(
        [sys.executable, "-c", UNDER_LIMIT, str(left.base), str(size)], capture_output=True, text=True, check=False
    )
    assert watcher.returncode == 0, watcher.stderr
    assert not left.open


UNDER_LIMIT = """
import resource, sys
from cpr.recover import recover
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
assert len(list(recover(base=sys.argv[1]))) == 1
"""


def until_running(process: subprocess.Popen[bytes]) -> None:
    """It has exec'ed, and has its own environment."""
    end = time.monotonic() + 10
    while proc.read_argv(process.pid) != ("sleep", "60"):
        assert time.monotonic() < end
        time.sleep(0.002)


def wait_dead(process: ProcessId) -> None:
    try:
        with open_process(process.pid, process.start_time) as it:
            assert it.wait_dead(10)
    except ProcessLookupError:
        pass
