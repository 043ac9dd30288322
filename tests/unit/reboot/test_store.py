"""Where saved guests lie: directories of ours alone, the current one, copies of programs, one worker at a time."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cpr.errors import Busy, ManifestError, NotFound
from cpr.linux.process import open_process
from cpr.reboot import manifest as manifests
from cpr.reboot import store
from cpr.reboot.files import StateFile
from cpr.reboot.manifest import Phase, Restore, Result
from tests.unit.reboot.saved import guest, manifest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def base(tmp_path: Path) -> str:
    return str(tmp_path / "cpr")


def test_a_run_and_the_current_one(base: str) -> None:
    with pytest.raises(NotFound):
        store.current(base)
    first, second = store.make_run("r1", base), store.make_run("r2", base)
    assert stat.S_IMODE(os.stat(first).st_mode) == stat.S_IMODE(os.stat(base).st_mode) == 0o700
    store.make_current(first)
    store.make_current(second)
    assert store.current(base) == os.path.join(second, "manifest.json")
    store.drop_current(first)
    assert store.current(base), "that was another run's"
    store.drop_current(second)
    with pytest.raises(NotFound):
        store.current(base)


def test_a_directory_that_others_may_enter(base: str) -> None:
    os.mkdir(base, 0o755)
    with pytest.raises(ManifestError, match="ours alone"):
        store.make_run("r1", base)


def test_the_current_one_is_looked_for_below_only(base: str) -> None:
    """A link that leads elsewhere is not followed there."""
    directory = store.make_run("r1", base)
    os.symlink("../../../etc", os.path.join(os.path.dirname(directory), "current"))
    assert store.current(base) == os.path.join(base, "reboot", "etc", "manifest.json")


def test_one_at_a_time(tmp_path: Path) -> None:
    path = str(tmp_path / "manifest.json")
    with store.hold(path, "restore"), pytest.raises(Busy, match=f"restore .pid {os.getpid()}. is working"):
        store.hold(path, "load")
    store.hold(path, "load").release()
    assert os.listdir(tmp_path) == []


def test_the_copy_of_a_program(tmp_path: Path) -> None:
    """Of our own: the same bytes, which anybody could execute who is given it."""
    path = store.pin(os.getpid(), str(tmp_path / "old"))
    assert os.path.basename(path) == os.path.basename(os.readlink("/proc/self/exe"))
    with open(path, "rb") as copy, open("/proc/self/exe", "rb") as program:
        assert copy.read() == program.read()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o755
    assert store.pin(os.getpid(), str(tmp_path / "old")) == path, "it is not safe to repeat"


def test_what_is_of_use_is_kept(base: str) -> None:
    """Two guests of one old QEMU: with the first back its state goes; with the last also the copy."""
    directory = store.make_run("r1", base)
    store.make_current(directory)
    copy = os.path.join(directory, "old-0", "qemu-system-x86_64")
    os.mkdir(os.path.dirname(copy))
    states = [os.path.join(directory, f"{n}.state") for n in range(2)]
    for path in (copy, *states):
        with open(path, "w") as file:
            file.write("x")
    guests = [
        replace(guest(n + 1), state=StateFile(path=states[n], size=1, sha256=""), pinned_binary=copy) for n in range(2)
    ]
    known = manifest(*guests)
    path = manifests.write(directory, known)
    back = Restore(result=Result.RESTORED)
    known = manifests.with_restore(known, 1, back)
    store.clean(path, known)
    assert [os.path.exists(p) for p in (*states, copy)] == [False, True, True]
    assert store.current(base)
    store.clean(path, manifests.with_restore(known, 2, back))
    assert [os.path.exists(p) for p in (*states, copy)] == [False, False, False]
    with pytest.raises(NotFound):
        store.current(base)
    assert manifests.read(directory), "the record stays"


def test_a_save_that_was_undone_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "web1"
    store.pin(os.getpid(), str(tmp_path / "web1.old"))
    file.write_text("state")
    path = manifests.write_file(f"{file}.manifest", manifest())
    store.forget(path)
    assert os.listdir(tmp_path) == []


def put(base: str, run: str, phase: Phase = Phase.JUMPING, restore: Restore | None = None) -> str:
    """A run of one guest; its directory."""
    directory = store.make_run(run, base)
    saved = replace(guest(), restore=restore or Restore(result=Result.RESTORED, pid=1 << 30, start_time=1))
    manifests.write(directory, replace(manifest(saved), run=run, phase=phase))
    return directory


def test_old_records_go_and_whatever_somebody_waits_for_stays(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "KEPT_RUNS", 2)
    ours = open_process(os.getpid())
    ours.close()
    runs_on = Restore(result=Result.RESTORED, pid=ours.pid, start_time=ours.start_time)
    put(base, "01-back")
    put(base, "02-waiting", restore=Restore())
    put(base, "03-undone", Phase.UNDONE, Restore())
    put(base, "04-given-up", restore=Restore(result=Result.GIVEN_UP))
    put(base, "05-runs-on", restore=runs_on)
    store.make_current(put(base, "06-current"))
    os.mkdir(os.path.join(base, "reboot", "07-came-to-nothing"))
    damaged = os.path.join(put(base, "08-damaged"), manifests.NAME)
    with open(damaged, "r+b") as file:
        file.truncate(100)
    for run in ("09", "10"):
        put(base, run)
    names = [os.path.basename(os.path.dirname(path)) for path in store.runs(base)]
    assert names == ["02-waiting", "05-runs-on", "06-current", "08-damaged", "09", "10"]


def test_no_runs(base: str) -> None:
    assert store.runs(base) == ()
    store.prune(base)


def test_who_works_on_a_manifest(tmp_path: Path) -> None:
    path = str(tmp_path / "manifest.json")
    assert store.working_on(path) == ""
    with store.hold(path, "restore"):
        assert store.working_on(path) == f"restore (pid {os.getpid()})"
    assert store.working_on(path) == ""


def test_guests_saved_by_hand(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known by run and unit, the oldest first; those that are over go when there are many."""
    monkeypatch.setattr(store, "KEPT_RUNS", 1)
    assert store.by_hand(base) == ()
    order: list[str] = []

    def put_file(name: str, restore: Restore, unit: str = "") -> str:
        path = str(tmp_path / f"{name}.manifest")
        saved = replace(guest(), unit=unit, restore=restore)
        known = replace(manifest(saved), run=name, release="", phase=Phase.COMMITTED)
        manifests.write_file(path, known)
        store.note_by_hand(path, known, base)
        link = os.path.join(base, "saved", f"{name}@{unit}")
        order.append(name)
        os.utime(link, ns=(len(order), len(order)), follow_symlinks=False)
        return path

    waits = put_file("save-9", Restore(), "vm@web1.service")
    put_file("save-5", Restore(result=Result.RESTORED, pid=1 << 30, start_time=1))
    gone = put_file("save-4", Restore())
    os.unlink(gone)
    put_file("save-3", Restore())
    last = put_file("save-1", Restore())
    assert store.by_hand(base) == (("vm@web1.service", waits), ("", str(tmp_path / "save-3.manifest")), ("", last))


def test_a_state_that_was_cut_short_is_removed_with_its_guest(base: str, tmp_path: Path) -> None:
    """It was never sealed: where it lies was written down before its first byte, in a directory of --save-ram maybe."""
    directory = store.make_run("r1", base)
    cut, wanted = (tmp_path / name for name in ("cut", "wanted"))
    for path in (cut, wanted):
        path.write_text("state")
    gone_on = replace(guest(), state=None, state_path=str(cut), restore=Restore(result=Result.CONTINUED))
    waits = replace(guest(4343, "db1"), state=None, state_path=str(wanted))
    written = manifests.write(directory, manifest(gone_on, waits))
    store.clean(written, manifests.read(directory))
    assert (cut.exists(), wanted.exists()) == (False, True)


def test_a_directory_for_ram(tmp_path: Path) -> None:
    path = str(tmp_path / "not" / "there" / "yet")
    assert store.make_directory(path) == store.make_directory(path) == path
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    os.chmod(path, 0o750)
    with pytest.raises(ManifestError, match="ours alone"):
        store.make_directory(path)
    assert store.state_name("a/b", 7) == "a_b-7.state"
    assert store.state_name("", 7) == "guest-7.state"
