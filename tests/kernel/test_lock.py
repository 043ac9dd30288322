"""The lock of a process: one holder, released by death, nothing planted is believed."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from cpr.linux.lock import LOOK, LockHeld, ProcessLock, holder_of, make_run_directory, patient_lock, process_lock
from tests.kernel.support import can, needs_other_users

if TYPE_CHECKING:
    from pathlib import Path

HOLDER = """
import sys, time
from cpr.linux.lock import process_lock
process_lock(sys.argv[1], 5, 77, boot_id="b", owner_uid=0, holder={"run": "r1", "command": "update"})
print("held", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def directory(tmp_path: Path) -> str:
    path = str(tmp_path / "cpr")
    make_run_directory(path)
    return path


def lock(directory: str, **more: Any) -> ProcessLock:
    return process_lock(
        directory, 5, 77, **{"boot_id": "b", "owner_uid": os.getuid(), "holder": {"run": "x"}, **more}
    )


def test_lock_and_release(directory: str) -> None:
    with lock(directory) as held:
        with open(held.path) as file:
            assert json.load(file)["run"] == "x"
        with pytest.raises(LockHeld) as caught:
            lock(directory)
        assert caught.value.holder["pid"] == os.getpid()
        with process_lock(directory, 5, 78, boot_id="b", owner_uid=0, holder={}):
            pass
    assert not os.path.exists(held.path)
    held.release()
    lock(directory).release()


def test_who_only_looks_is_waited_for(directory: str) -> None:
    def patient() -> ProcessLock:
        return patient_lock(directory, 5, 77, boot_id="b", owner_uid=os.getuid(), holder={})

    with lock(directory), pytest.raises(LockHeld):
        patient()
    looking = lock(directory, holder={"command": LOOK})
    timer = threading.Timer(0.1, looking.release)
    timer.start()
    patient().release()
    timer.join()


def test_who_holds_it_can_be_asked(directory: str) -> None:
    assert holder_of(directory, 5, 77) is None
    with lock(directory) as held:
        told = holder_of(directory, 5, 77)
        assert told is not None
        assert (told["run"], told["pid"]) == ("x", os.getpid())
        assert holder_of(directory, 5, 78) is None
    assert not os.path.exists(held.path)
    assert holder_of(directory, 5, 77) is None


@pytest.mark.parametrize("pid", [os.getpid(), 1 << 30, "nonsense"])
def test_a_file_that_is_left_over_is_held_by_nobody(directory: str, pid: object) -> None:
    with open(f"{directory}/locks/5-77", "w") as file:
        json.dump({"pid": pid, "run": "x"}, file)
    assert holder_of(directory, 5, 77) is None


def test_the_lock_falls_with_its_holder(directory: str) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, directory], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(LockHeld) as caught:
            lock(directory)
        assert caught.value.holder["pid"] == holder.pid
        assert caught.value.holder["command"] == "update"
    finally:
        holder.kill()
        holder.wait()
        if holder.stdout:
            holder.stdout.close()
    with lock(directory) as held, open(held.path) as file:
        assert json.load(file)["pid"] == os.getpid()


def test_contention_has_one_holder_at_a_time(directory: str) -> None:
    inside = 0
    most = 0
    got = 0
    count = threading.Lock()

    def work() -> None:
        nonlocal inside, most, got
        for _ in range(300):
            try:
                with lock(directory):
                    with count:
                        inside += 1
                        most = max(most, inside)
                        got += 1
                    with count:
                        inside -= 1
            except LockHeld:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert got > 0
    assert os.listdir(os.path.join(directory, "locks")) == []


@pytest.mark.parametrize("kind", ["symlink", "directory", "fifo", "hardlink", "dangling"])
def test_planted_files_are_refused(directory: str, tmp_path: Path, kind: str) -> None:
    path = os.path.join(directory, "locks", "5-77")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    match kind:
        case "symlink":
            os.symlink(victim, path)
        case "dangling":
            os.symlink(tmp_path / "nothing", path)
        case "directory":
            os.mkdir(path)
        case "fifo":
            os.mkfifo(path)
        case "hardlink":
            os.link(victim, path)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(PermissionError, match="planted"):
        lock(directory)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "nothing").exists()
    assert len(os.listdir("/proc/self/fd")) == before


@needs_other_users
def test_files_of_strangers_are_refused_and_of_the_owner_taken(directory: str) -> None:
    path = os.path.join(directory, "locks", "5-77")
    with open(path, "w"):
        pass
    os.chown(path, 4321, 4321)
    with pytest.raises(PermissionError, match="planted by uid 4321"):
        lock(directory, owner_uid=1234)
    lock(directory, owner_uid=4321).release()
    assert not os.path.exists(path)


@needs_other_users
def test_root_and_the_owner_lock_each_other_out(directory: str, tmp_path: Path) -> None:
    for parent in [tmp_path, *tmp_path.parents[:3]]:
        if str(parent) != "/tmp":
            os.chmod(parent, 0o755)

    def become(uid: int) -> None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)

    def owner_finds_it_held() -> None:
        become(1234)
        with pytest.raises(LockHeld) as caught:
            lock(directory, owner_uid=1234)
        assert caught.value.holder["run"] == "x"

    def owner_locks() -> None:
        become(1234)
        lock(directory, owner_uid=1234).release()

    def stranger_is_refused() -> None:
        become(4321)
        with pytest.raises(PermissionError):
            lock(directory, owner_uid=1234)

    with lock(directory, owner_uid=1234) as held:
        assert os.stat(held.path).st_uid == 1234
        assert can(owner_finds_it_held)
        assert can(stranger_is_refused)
    assert can(owner_locks)
    with open(os.path.join(directory, "locks", "5-77"), "w"):
        os.chown(os.path.join(directory, "locks", "5-77"), 1234, 1234)
    lock(directory, owner_uid=1234).release()  # with fs.protected_regular too


def test_run_directory(directory: str) -> None:
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o755
    for name in ("locks", "runs"):
        assert stat.S_IMODE(os.stat(os.path.join(directory, name)).st_mode) == 0o1777
    os.chmod(os.path.join(directory, "locks"), 0o777)
    make_run_directory(directory)
    assert stat.S_IMODE(os.stat(os.path.join(directory, "locks")).st_mode) == 0o1777


def test_run_directory_that_is_a_link(directory: str, tmp_path: Path) -> None:
    os.symlink(directory, tmp_path / "link")
    with pytest.raises(PermissionError, match="link"):
        make_run_directory(str(tmp_path / "link"))


@needs_other_users
def test_run_directory_of_a_stranger(directory: str, tmp_path: Path) -> None:
    os.chown(directory, 4321, 4321)
    with pytest.raises(PermissionError, match="4321"):
        make_run_directory(directory)

    def as_user() -> None:
        os.setgroups([])
        os.setresuid(1234, 1234, 1234)
        with pytest.raises(PermissionError, match="root makes it once"):
            make_run_directory("/run/cpr-test-nosuch")

    assert can(as_user)
