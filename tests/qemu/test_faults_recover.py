"""Keepers that died at awkward moments, and what `cpr recover` makes of that; ways back that are barred for a while."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cpr import journal
from cpr.errors import Exit
from cpr.linux import proc
from cpr.linux.process import open_process
from cpr.model import Status
from tests.qemu.conftest import qemus_of
from tests.qemu.faults.fault import Announcement, Fault, Stage
from tests.qemu.faults.moments import Script
from tests.qemu.faults.subject import QUICK, Victim, killed
from tests.qemu.surveying import until

if TYPE_CHECKING:

    from tests.lab.start import Lab
    from tests.qemu.conftest import Command
    from tests.qemu.faults.subject import Before

SCRIPT = Script()
NAMES, at = SCRIPT.names, SCRIPT.at



def left(victim: Victim, stage: Stage, *faults: Fault) -> Announcement:
    """A run whose command and keeper were killed: by its last fault, or while that waits."""
    with victim.command(stage, *faults, bounds=QUICK) as command:
        for _ in faults:
            last = stage.wait()
        killed(command)
        try:
            victim.kill(last.keeper)
        except ProcessLookupError:
            pass  # it killed itself
    return last


def rolled_back(victim: Victim, cpr: Command, before: Before) -> None:
    """`cpr recover` goes back, once; all is well."""
    result = cpr("recover", "--json")
    assert (result.code, result.guest["status"]) == (Exit.ROLLED_BACK, "rolled_back"), str(result)
    victim.as_before(before, pause=120)
    assert cpr("recover", "--json").json["guests"] == []
    victim.can_be_updated()


# -- between the start of the new QEMU and the line that names it


@pytest.mark.full
@pytest.mark.parametrize("fact", ["settings", "starting", "new"])
def test_the_keeper_dies_before_it_wrote_down_what_it_started(
    victim: Victim, cpr: Command, stage: Stage, fact: str
) -> None:
    before = victim.before()
    left(victim, stage, Fault(at=f"fact:{fact}", do="kill_keeper"))
    rolled_back(victim, cpr, before)


def test_a_helper_that_is_no_qemu_yet_never_becomes_one(victim: Victim, cpr: Command, stage: Stage) -> None:
    """It was told everything, and is slow; its keeper is gone."""
    before = victim.before()
    helper = left(victim, stage, Fault(at="launching", do="kill_keeper")).helper
    with open_process(helper) as process:
        assert process.alive()
        assert cpr("recover", "--json").code == Exit.ROLLED_BACK
        assert not process.alive()
    victim.as_before(before, pause=120)
    victim.can_be_updated()


@pytest.mark.full
def test_a_helper_whose_keeper_is_gone_gives_up_by_itself(victim: Victim, cpr: Command, stage: Stage) -> None:
    before = victim.before()
    helper = left(victim, stage, Fault(at="launching", do="kill_keeper")).helper
    with open_process(helper) as process:
        os.kill(helper, signal.SIGCONT)
        assert process.wait_dead(10)
    assert qemus_of(victim.lab) == [victim.pid]
    rolled_back(victim, cpr, before)


class ExecGate:
    """Holds every exec of a program up, in the kernel, until it is closed (fanotify, FAN_OPEN_EXEC_PERM)."""

    CLASS_CONTENT, MARK_ADD, OPEN_EXEC_PERM, ALLOW = 0x4, 0x1, 0x40000, 1
    EVENT = struct.Struct("=IBBHQii")

    def __init__(self, path: str) -> None:
        """Raises OSError where the kernel cannot, or we may not."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.fanotify_init(self.CLASS_CONTENT, os.O_RDONLY | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "fanotify_init")
        mask = ctypes.c_uint64(self.OPEN_EXEC_PERM)
        if self._libc.fanotify_mark(self._fd, self.MARK_ADD, mask, -100, os.fsencode(path)) < 0:
            os.close(self._fd)
            raise OSError(ctypes.get_errno(), "fanotify_mark")

    def wait(self) -> int:
        """The pid of the next that wants to; it waits."""
        data = os.read(self._fd, self.EVENT.size)
        *_, number, pid = self.EVENT.unpack(data)
        os.close(number)
        return int(pid)

    def __enter__(self) -> ExecGate:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)  # the kernel lets everybody through then


@pytest.mark.full
def test_a_helper_in_the_very_act_of_becoming_a_qemu_is_found(victim: Victim, cpr: Command, stage: Stage) -> None:
    """It has told its keeper that it is ready, so that it does not hear any more that nobody is there."""
    before = victim.before()
    try:
        gate = ExecGate(victim.target.binary.path)
    except OSError as error:
        pytest.skip(f"no fanotify here: {error}")
    with gate, victim.command(stage, Fault(at="launching", do="resume_helper")) as command:
        announced = stage.wait()
        helper = gate.wait()
        assert helper == announced.helper
        killed(command)
        victim.kill(announced.keeper)
        with open_process(helper) as process:
            assert process.alive()
            assert cpr("recover", "--json").code == Exit.ROLLED_BACK
            assert not process.alive()
    victim.as_before(before, pause=120)
    victim.can_be_updated()


# -- on the way back

UNDOING = [
    pytest.param(name, state, id=f"{name}-{state}", marks=() if name == "MoveState" else pytest.mark.full)
    for name in ("MoveState", "PrepareStream", "StartNew", "KeepRamAtExit", "OccupyMonitors", "OpenMonitor")
    for state in ("undoing", "undone")
    if (name, state) != ("MoveState", "undone")
]


@pytest.mark.parametrize(("name", "state"), UNDOING)
def test_the_keeper_dies_while_it_undoes(
    victim: Victim, cpr: Command, stage: Stage, name: str, state: str
) -> None:
    before = victim.before()
    left(victim, stage, Fault(at=at("MoveClients", "done"), do="fail"), Fault(at=at(name, state), do="kill_keeper"))
    rolled_back(victim, cpr, before)


@pytest.mark.full
@pytest.mark.parametrize("state", ["undoing", "undone"])
def test_the_keeper_dies_while_it_undoes_a_commit_that_was_refused(
    victim: Victim, cpr: Command, stage: Stage, state: str
) -> None:
    """What the new QEMU was not told has not happened, whoever reads the journal."""
    before = victim.before()
    kill = Fault(at=at("Continue", "doing"), do="kill_new")
    left(victim, stage, kill, Fault(at=at("Continue", state), do="kill_keeper"))
    rolled_back(victim, cpr, before)


@pytest.mark.full
@pytest.mark.parametrize("name", ["StartNew", "PrepareStream", "MoveState", "MoveClients"])
def test_the_new_qemu_hangs_and_its_keeper_dies(victim: Victim, cpr: Command, stage: Stage, name: str) -> None:
    before = victim.before()
    left(victim, stage, Fault(at=at(name, "done"), do="stop_new_and_kill_keeper"))
    rolled_back(victim, cpr, before)


@pytest.mark.full
def test_the_old_qemu_is_blocked_by_one_that_hangs_and_the_keeper_dies(
    victim: Victim, cpr: Command, stage: Stage
) -> None:
    """Its migration thread writes into a full socket: only the new one's death frees its monitor."""
    before = victim.before()
    stop = Fault(at=at("MoveState", "doing"), do="stop_new")
    with victim.command(stage, stop, Fault(at="sent:migrate:old", do="go_on")) as command:
        stage.wait()
        keeper = stage.wait().keeper
        until(victim.stands_still)
        os.kill(keeper, signal.SIGKILL)
        killed(command)
    rolled_back(victim, cpr, before)


# -- behind the commit


def test_the_old_one_is_never_resumed_over_newer_ram(victim: Victim, cpr: Command, stage: Stage) -> None:
    """The new one ran for a while, nobody knows, and died: the guest has crashed, and recover says so."""
    before = victim.before()
    old = before.facts.process.pid
    new = left(victim, stage, Fault(at=at("Continue", "done"), do="wait")).new
    victim.lab.adopt(new)
    victim.guest.log.wait_ticks(50)
    ticks = len(victim.guest.log.ticks)
    victim.kill(new)
    until(victim.stands_still)
    result = cpr("recover", "--json")
    assert (result.code, result.guest["status"], result.guest["pid_after"]) == (7, "needs_attention", 0), str(result)
    assert "crashed" in result.guest["where"]
    assert "must never be resumed" in result.guest["where"]
    assert cpr("recover", "--json").json["guests"] == []
    assert cpr("update", old, "--qemu", victim.target.binary.path, "-y", "--json").code not in (0, 8)
    assert victim.state_of(old) != "running"
    assert len(victim.guest.log.ticks) < ticks + 50
    assert victim.stands_still()


@pytest.mark.full
def test_the_new_one_is_killed_with_cont_under_way(victim: Victim) -> None:
    """Whether it ran cannot be known, so it counts as if it had."""
    before = victim.before()
    outcome = victim.play(Fault(at="sent:cont:new", do="kill_new_and_go_on"))
    assert (outcome.exit_code, outcome.pid_after) == (Exit.NEEDS_ATTENTION, 0)
    assert "crashed" in outcome.where
    victim.closed()
    assert victim.state_of(before.facts.process.pid) != "running"


@pytest.mark.full
def test_the_new_one_hangs_for_good_after_the_commit(victim: Victim, cpr: Command) -> None:
    """The outcome says so; when it wakes up, it has the guest, and everything can be put in order."""
    victim.before()
    outcome = victim.play(Fault(at=at("Continue", "done"), do="stop_new"))
    assert (outcome.status, outcome.exit_code) == (Status.NEEDS_ATTENTION, Exit.NEEDS_ATTENTION)
    assert "does not answer" in outcome.where
    assert qemus_of(victim.lab) == [outcome.pid_after]
    os.kill(outcome.pid_after, signal.SIGCONT)
    victim.counts()
    victim.closed()
    victim.can_be_updated()


@pytest.mark.full
def test_recover_when_the_new_one_hangs_after_the_commit(victim: Victim, cpr: Command, stage: Stage) -> None:
    """It cannot be told to go on: as often as it is tried, until it can."""
    before = victim.before()
    new = left(victim, stage, Fault(at=at("Continue", "doing"), do="stop_new_and_kill_keeper")).new
    result = cpr("recover", "--json")
    assert (result.code, result.guest["status"]) == (Exit.NEEDS_ATTENTION, "needs_attention"), str(result)
    assert "tries again" in result.guest["hint"]
    os.kill(new, signal.SIGCONT)
    result = cpr("recover", "--json")
    assert (result.code, result.guest["status"]) == (Exit.OK, "updated"), str(result)
    victim.follow(result.guest["pid_after"])
    victim.in_the_new(before)
    victim.can_be_updated()


@pytest.mark.full
def test_a_guest_that_somebody_paused_meanwhile_stays_paused(victim: Victim, cpr: Command, stage: Stage) -> None:
    """RESUME was seen, both died, somebody paused the guest: that is not recover's to undo."""
    left(victim, stage, Fault(at=at("EndOld", "doing"), do="wait"))
    os.kill(victim.pid, signal.SIGKILL)
    with victim.session() as monitor:
        monitor.execute("stop")
    result = cpr("recover", "--json")
    assert (result.code, result.guest["runstate"]) == (Exit.DIFFERS, "paused"), str(result)
    with victim.session() as monitor:
        assert monitor.execute("query-status")["status"] == "paused"
        monitor.execute("cont")
    victim.follow(result.guest["pid_after"])
    victim.counts()


# -- the way back is barred


def image_lock(victim: Victim, do: str, moment: str) -> Fault:
    return Fault(at=moment, do=do, argument=str(victim.lab.directory / "guest.disk"))


def test_cont_is_refused_and_the_guest_goes_on_in_the_old_qemu(victim: Victim) -> None:
    """Somebody else has the image in the moment in which neither QEMU has it: nothing ran, the way back is open."""
    before = victim.before()
    outcome = victim.play(
        image_lock(victim, "lock", at("MoveState", "doing")), image_lock(victim, "unlock", at("Continue", "undoing"))
    )
    assert (outcome.status, outcome.exit_code) == (Status.ROLLED_BACK, Exit.ROLLED_BACK), outcome
    assert "lock" in outcome.error
    victim.as_before(before)
    victim.can_be_updated()


@pytest.mark.full
def test_an_undo_that_fails_is_tried_again_by_recover(victim: Victim, cpr: Command, stage: Stage) -> None:
    """The old QEMU cannot go on either, as long as somebody else has the image."""
    before = victim.before()
    image = victim.lab.directory / "guest.disk"
    with ImageLock(image) as lock:
        faults = Fault(at=at("MoveState", "doing"), do="wait"), Fault(at=at("MoveState", "done"), do="fail")
        handle = victim.handle(stage, *faults)
        announced = stage.wait()
        lock.take()
        announced.go()
        outcome = handle.outcome()
        assert (outcome.status, outcome.exit_code) == (Status.NEEDS_ATTENTION, Exit.NEEDS_ATTENTION), outcome
        assert "cpr recover" in outcome.where
        result = cpr("recover", "--json")
        assert (result.code, result.guest["status"]) == (Exit.NEEDS_ATTENTION, "needs_attention"), str(result)
        assert qemus_of(victim.lab) == [victim.pid]
    rolled_back(victim, cpr, before)


class ImageLock:
    """What another program does that has an image open for writing (QEMU's RAW_LOCK_SHARED_BASE + BLK_PERM_WRITE)."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR)

    def take(self) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 200 + 1, 1, 0))

    def __enter__(self) -> ImageLock:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


# -- journals


@pytest.mark.full
@pytest.mark.parametrize("lost", [1, 40, 400, 4000])
def test_the_end_of_the_journal_is_lost(victim: Victim, cpr: Command, stage: Stage, lost: int) -> None:
    """Before the commit's line was written; what it says up to there is enough, wherever it was cut."""
    before = victim.before()
    left(victim, stage, Fault(at=at("MoveClients", "done"), do="wait"))
    (path,) = journal.journal_files(str(victim.base))
    data = Path(path).read_bytes().split(b"\0")[0]
    header = data.index(b"\n") + 1
    Path(path).write_bytes(data[: max(header, len(data) - lost)])
    if b'"starting"' in Path(path).read_bytes():
        rolled_back(victim, cpr, before)
        return
    # as if nothing had been started: then nothing can be undone but by a person, and nothing is told to run
    assert cpr("recover", "--json").code in (Exit.ROLLED_BACK, Exit.NEEDS_ATTENTION)


@pytest.mark.full
def test_a_journal_without_a_header_is_not_acted_on(victim: Victim, cpr: Command, stage: Stage) -> None:
    left(victim, stage, Fault(at=at("StartNew", "done"), do="wait"))
    (path,) = journal.journal_files(str(victim.base))
    Path(path).write_bytes(Path(path).read_bytes()[:100])
    there = qemus_of(victim.lab)
    result = cpr("recover", "--json")
    assert result.code == Exit.NEEDS_ATTENTION
    assert qemus_of(victim.lab) == there
    assert len(there) == 2


@pytest.mark.full
def test_a_journal_of_another_boot_is_not_acted_on(victim: Victim, cpr: Command, stage: Stage) -> None:
    left(victim, stage, Fault(at=at("StartNew", "done"), do="wait"))
    (path,) = journal.journal_files(str(victim.base))
    text = Path(path).read_bytes()
    Path(path).write_bytes(text.replace(proc.boot_id().encode(), b"3f2504e0-4f89-41d3-9a0c-0305e82c3301"))
    there = qemus_of(victim.lab)
    result = cpr("recover", "--json")
    assert result.code == Exit.OK
    assert "booted since" in result.guest["where"]
    assert qemus_of(victim.lab) == there
    assert len(there) == 2


@pytest.mark.full
def test_recover_twice_at_once(victim: Victim, cpr: Command, stage: Stage) -> None:
    before = victim.before()
    left(victim, stage, Fault(at=at("MoveState", "done"), do="wait"))
    calls = [cpr.start("recover", "--json") for _ in range(4)]
    codes = []
    for call in calls:
        call.communicate(timeout=60)
        codes.append(call.returncode)
    assert codes.count(Exit.ROLLED_BACK) >= 1
    assert set(codes) <= {Exit.ROLLED_BACK, Exit.BUSY, Exit.OK}, codes
    victim.as_before(before, pause=120)
    victim.can_be_updated()


@pytest.mark.full
def test_a_keeper_that_dies_with_its_errand_done(victim: Victim) -> None:
    """It closed the journal and could not tell the command: that reads it there."""
    before = victim.before()
    outcome = victim.play(Fault(at="closed", do="kill_keeper"))
    assert (outcome.status, outcome.exit_code) == (Status.UPDATED, Exit.OK)
    assert outcome.blackout_seconds is not None
    victim.in_the_new(before)


# -- other guests


@pytest.mark.full
@pytest.mark.parametrize("pair", [("11.1.a", "11.1.b"), ("10.0", "10.0"), ("7.2", "7.2")], ids="-".join)
@pytest.mark.parametrize(
    ("moment", "do"),
    [
        ("MoveState:doing", "stop_new"),
        ("MoveState:doing", "kill_new"),
        ("MoveState:done", "fail"),
        ("MoveClients:done", "stop_new"),
        ("Continue:doing", "kill_new"),
    ],
)
def test_other_versions(lab: Lab, cpr: Command, stage: Stage, pair: tuple[str, str], moment: str, do: str) -> None:
    victim = Victim.start(lab, *pair, everything=False)
    names = [step.id for step in victim.plan("x").steps]
    name, _, state = moment.partition(":")
    before = victim.before()
    outcome = victim.play(Fault(at=f"step:{names.index(name)}:{state}", do=do))
    assert outcome.exit_code == Exit.ROLLED_BACK, outcome
    victim.as_before(before, pause=5)
    victim.can_be_updated()


PAUSED = [
    ("MoveState:done", "fail"), ("MoveState:done", "kill_new"), ("MoveClients:done", "stop_new"),
    ("Decide:doing", "kill_new"), ("MoveState:done", "both"), ("Decide:doing", "both"), ("EndOld:done", "both"),
]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize(("moment", "do"), PAUSED)
def test_a_paused_guest_stays_paused(
    victim: Victim, cpr: Command, stage: Stage, moment: str, do: str
) -> None:
    """Wherever it ends it does not run, and when it is told to it goes on as if nothing had been."""
    with victim.session() as monitor:
        monitor.execute("stop")
    until(victim.stands_still)
    old = victim.pid
    names = [step.id for step in victim.plan("x").steps]
    name, _, state = moment.partition(":")
    index = names.index(name)
    forward = index >= names.index("Decide") and do == "both"
    if do == "both":
        left(victim, stage, Fault(at=f"step:{index}:{state}", do="wait"))
        result = cpr("recover", "--json")
        assert result.code == (Exit.OK if forward else Exit.ROLLED_BACK), str(result)
        victim.follow(result.guest["pid_after"])
    else:
        outcome = victim.play(Fault(at=f"step:{index}:{state}", do=do))
        assert outcome.exit_code == Exit.ROLLED_BACK, outcome
        assert "paused as before" in outcome.where
    assert (victim.pid != old) is forward
    victim.alone()
    victim.closed()
    assert victim.stands_still()
    with victim.session() as monitor:
        assert monitor.execute("query-status")["running"] is False
        monitor.execute("cont")
    victim.counts()
    victim.can_be_updated()

