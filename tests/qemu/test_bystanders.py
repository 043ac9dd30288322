"""Whoever does something to the guest while it is updated: it is followed, or the update is undone; nothing is lost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.lab import qemu
from tests.qemu.conftest import qemus_of
from tests.qemu.faults.fault import Fault, Stage
from tests.qemu.parties import Qmp, counted, unique
from tests.qemu.surveying import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.linux import LinuxLog
    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Guest, Lab
    from tests.qemu.conftest import Command, Result

    Builds = Callable[[str], QemuBuild]

full = pytest.mark.full


def checks(result: Result) -> set[str]:
    return {f["check"] for f in result.guest["findings"]}


def image(path: Path, size: str = "64M") -> Path:
    subprocess.run([qemu.qemu_img(), "create", "-q", "-f", "qcow2", path, size], check=True)
    return path


def content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def locked(path: Path) -> str:
    """What qemu-img says of an image that somebody writes to; empty if nobody does."""
    asked = subprocess.run([qemu.qemu_img(), "info", path], capture_output=True, text=True, check=False)
    return asked.stderr if asked.returncode else ""


def index_of(cpr: Command, guest: object, target: QemuBuild, step: str, *words: str, last: bool = False) -> int:
    """Where a step stands in the plan."""
    shown = cpr("update", guest, "--qemu", target.binary, "--dry-run", "--json", *words)
    assert shown.code == 0, str(shown)
    ids = [s["id"] for s in shown.guest["plan"]["steps"]]
    return len(ids) - 1 - ids[::-1].index(step) if last else ids.index(step)


@contextlib.contextmanager
def paused_at(
    lab: Lab, cpr: Command, guest: object, target: QemuBuild, at: str, *words: str
) -> Iterator[dict[str, Any]]:
    """An update that waits at a moment (`step:INDEX:doing`, ...) for the end of the block; then `result` is there."""
    found: dict[str, Any] = {}
    with Stage(lab.directory / "stage") as stage:
        environment = stage.environment([Fault(at=at, do="wait")])
        call = ("update", guest, "--qemu", target.binary, "-y", "--json", *words)
        with cpr.start(*call, **environment) as process:
            try:
                announcement = stage.wait()
                yield found
                announcement.go()
                out, err = process.communicate(timeout=60)
            finally:
                stage.close()
    assert out.startswith("{"), err
    (found["outcome"],) = json.loads(out)["guests"]
    found["code"] = process.returncode
    if found["outcome"]["pid_after"]:
        lab.adopt(found["outcome"]["pid_after"])


# -- disks


class Writing:
    """A Linux guest that writes its qcow2 disk and reads it back, and a manager's session beside the own monitor."""

    def __init__(self, lab: Lab, build: QemuBuild) -> None:
        self.base = image(lab.directory / "base.qcow2")
        self.second = lab.directory / "second"
        self.guest: Guest[LinuxLog] = lab.linux(
            build,
            *("-name", unique(lab), "-qmp", f"unix:{self.second},server=on,wait=off"),
            *("-drive", f"file={self.base},format=qcow2,if=virtio,id=disk0"),
        )
        self.writes()

    def writes(self) -> None:
        """It goes on writing, and what it reads is what it wrote."""
        so_far = self.guest.log.disk_ok
        self.guest.log.wait(lambda: self.guest.log.disk_ok >= so_far + 20, 60, "it does not write")
        assert self.guest.log.sound, self.guest.log.problems()


def snapshot(monitor: Qmp, overlay: Path) -> None:
    monitor.execute("blockdev-snapshot-sync", device="disk0", snapshot_file=str(overlay), format="qcow2")


def test_a_disk_is_written_by_one_qemu_at_a_time(lab: Lab, cpr: Command, builds: Builds) -> None:
    disk = image(lab.directory / "disk.qcow2")
    with counted(lab, builds("7.2"), "-drive", f"file={disk},format=qcow2,if=virtio") as guest:
        assert "lock" in locked(disk)
        result = cpr.update(guest.name, builds("11.1.a"))
        assert result.code == 0, str(result)
        assert not guest.process.alive
        assert "lock" in locked(disk)
        guest.check(rounds=0)
        pid = result.guest["pid_after"]
        guest.log.wait_ticks()
    new = lab.adopt(pid)
    new.kill()
    assert new.wait(10)
    assert locked(disk) == ""


@full
@pytest.mark.parametrize("route", ["11.1.a 11.1.b", "10.0 10.0", "7.2 7.2 7.2"])
def test_a_guest_writes_its_disk_all_the_time(lab: Lab, cpr: Command, builds: Builds, route: str) -> None:
    writing = Writing(lab, builds("7.2"))
    pid = writing.guest.pid
    for key in route.split():
        result = cpr.update(pid, builds(key))
        assert result.code == 0, str(result)
        pid = result.guest["pid_after"]
        writing.writes()
        assert "lock" in locked(writing.base)
    (left,) = (lab.adopt(pid) for pid in qemus_of(lab))
    left.kill()
    assert left.wait(10)
    checked = subprocess.run([qemu.qemu_img(), "check", writing.base], capture_output=True, text=True, check=False)
    assert "corrupt" not in checked.stdout + checked.stderr, checked


@full
def test_a_snapshot_before_the_check_is_named_and_committing_it_is_a_way_out(
    lab: Lab, cpr: Command, builds: Builds
) -> None:
    writing = Writing(lab, builds("7.2"))
    overlay = lab.directory / "overlay.qcow2"
    with Qmp(writing.guest.qmp) as monitor:
        snapshot(monitor, overlay)
    before = content(writing.base)
    result = cpr.update(writing.guest.pid, builds("11.1.a"))
    assert result.code == 3, str(result)
    assert "drift-chain" in checks(result)
    assert str(overlay) in result.guest["error"]
    writing.writes()
    assert content(writing.base) == before
    with Qmp(writing.guest.qmp) as monitor:
        monitor.execute("block-commit", device="disk0", job_id="commit")
        until(lambda: monitor.execute("query-block-jobs")[0]["ready"], 60)
        monitor.execute("block-job-complete", device="commit")
        until(lambda: monitor.execute("query-block-jobs") == [], 60)
    result = cpr.update(writing.guest.pid, builds("11.1.a"))
    assert result.code == 0, str(result)
    writing.writes()


@pytest.mark.parametrize(
    ("step", "state"),
    [
        ("CompareChains", "done"),
        *(
            pytest.param(*moment, marks=full)
            for moment in [
                ("OpenMonitor", "doing"),
                ("TakeDescriptors", "done"),
                ("StartNew", "doing"),
                ("StartNew", "done"),
                ("PrepareStream", "done"),
                ("PassClients", "done"),
            ]
        ),
    ],
)
def test_a_snapshot_between_check_and_switch(
    lab: Lab, cpr: Command, builds: Builds, step: str, state: str
) -> None:
    """By a manager who holds another monitor. The new QEMU would write into the base."""
    disk = image(lab.directory / "base.qcow2")
    second, overlay = lab.directory / "second", lab.directory / "overlay.qcow2"
    extra = ("-drive", f"file={disk},format=qcow2,if=virtio,id=disk0", "-qmp", f"unix:{second},server=on,wait=off")
    target = builds("11.1.a")
    with counted(lab, builds("7.2"), *extra) as guest:
        index = index_of(cpr, guest.name, target, step)
        with Qmp(second) as manager:
            words = ("--ignore", "monitor-client")
            with paused_at(lab, cpr, guest.name, target, f"step:{index}:{state}", *words) as run:
                snapshot(manager, overlay)
                before = content(disk)
            assert run["code"] == 6, run
            assert str(overlay) in run["outcome"]["error"]
            assert manager.execute("query-status")["status"] == "running"
            (drive,) = (d for d in manager.execute("query-block") if d["device"] == "disk0")
            assert drive["inserted"]["file"] == str(overlay)
        assert content(disk) == before
        assert qemus_of(lab) == [guest.process.pid]
        guest.check(rounds=1)


@full
def test_a_snapshot_of_a_disk_that_is_being_written(lab: Lab, cpr: Command, builds: Builds) -> None:
    """Also when it comes just before the guest is stopped."""
    writing = Writing(lab, builds("7.2"))
    target, overlay = builds("11.1.a"), lab.directory / "overlay.qcow2"
    index = index_of(cpr, writing.guest.pid, target, "MoveState")
    with Qmp(writing.second) as manager:
        words = ("--ignore", "monitor-client")
        with paused_at(lab, cpr, writing.guest.pid, target, f"step:{index}:doing", *words) as run:
            snapshot(manager, overlay)
            before = content(writing.base)
        assert run["code"] == 6, run
        writing.writes()
        assert content(writing.base) == before
        assert manager.execute("query-status")["status"] == "running"


@full
def test_a_snapshot_while_the_state_moves_is_too_late(lab: Lab, cpr: Command, builds: Builds) -> None:
    """The images belong to nobody for a moment; QEMU refuses, and the update goes on, or it was quicker and is seen."""
    writing = Writing(lab, builds("7.2"))
    target, overlay = builds("11.1.a"), lab.directory / "overlay.qcow2"
    index = index_of(cpr, writing.guest.pid, target, "CompareChains", last=True)
    with Qmp(writing.second) as manager:
        words = ("--ignore", "monitor-client")
        with paused_at(lab, cpr, writing.guest.pid, target, f"step:{index}:doing", *words) as run:
            try:
                snapshot(manager, overlay)
                taken = True
            except RuntimeError:
                taken = False
        assert run["code"] == (6 if taken else 0), run
    writing.writes()


@pytest.mark.parametrize("how", ["-snapshot", pytest.param("snapshot=on", marks=full)])
def test_writes_that_go_to_a_temporary_file_are_not_thrown_away(
    lab: Lab, cpr: Command, builds: Builds, how: str
) -> None:
    disk = image(lab.directory / "disk.qcow2")
    drive = f"file={disk},format=qcow2,if=virtio"
    extra = ("-drive", drive, "-snapshot") if how == "-snapshot" else ("-drive", f"{drive},snapshot=on")
    with counted(lab, builds("7.2"), *extra) as guest:
        result = cpr.update(guest.name, builds("11.1.a"))
        assert result.code == 3, str(result)
        assert "snapshot-mode" in checks(result)
        assert "drift-chain" not in checks(result)
        guest.log.wait_ticks()
        guest.check(rounds=0)


# -- others who do something meanwhile


@pytest.fixture
def managed(lab: Lab, builds: Builds) -> Iterator[Any]:
    """A counting guest with a manager's session on a second monitor."""
    second, disk = lab.directory / "second", image(lab.directory / "disk.qcow2")
    extra = (
        *("-qmp", f"unix:{second},server=on,wait=off", "-device", "qemu-xhci,id=usb"),
        *("-drive", f"file={disk},format=qcow2,if=virtio,id=disk0"),
    )
    with counted(lab, builds("7.2"), *extra) as guest:
        yield guest, second


def act(lab: Lab, cpr: Command, builds: Builds, managed: Any, action: Callable[[Qmp], None]) -> dict[str, Any]:
    """`action` by the manager, when the new QEMU stands ready."""
    guest, second = managed
    target = builds("11.1.a")
    index = index_of(cpr, guest.name, target, "PassClients")
    with Qmp(second) as manager:
        words = ("--ignore", "monitor-client")
        with paused_at(lab, cpr, guest.name, target, f"step:{index}:doing", *words) as run:
            action(manager)
        run["monitor"] = manager
    return run


@full
def test_a_device_that_is_plugged_in_meanwhile(lab: Lab, cpr: Command, builds: Builds, managed: Any) -> None:
    """The new QEMU has no place for its state, says so, and the guest goes on where it is."""
    guest, second = managed
    run = act(
        lab, cpr, builds, managed, lambda m: m.execute("device_add", driver="usb-mouse", id="late", bus="usb.0")
    )
    assert run["code"] == 6, run
    with Qmp(second) as manager:
        assert manager.execute("query-status")["status"] == "running"
    assert qemus_of(lab) == [guest.process.pid]
    guest.check(rounds=1)


@full
def test_a_guest_that_is_paused_meanwhile_stays_paused(lab: Lab, cpr: Command, builds: Builds, managed: Any) -> None:
    """Whoever stopped it had a reason: the update is undone, and nobody lets it go on."""
    guest, second = managed
    run = act(lab, cpr, builds, managed, lambda m: m.execute("stop"))
    assert run["code"] == 6, run
    with Qmp(second) as manager:
        assert manager.execute("query-status")["status"] == "paused"
        manager.execute("cont")
    assert qemus_of(lab) == [guest.process.pid]
    guest.check(rounds=1)


@full
def test_a_guest_that_is_ended_meanwhile_is_not_brought_back(
    lab: Lab, cpr: Command, builds: Builds, managed: Any
) -> None:
    def end(manager: Qmp) -> None:
        with contextlib.suppress(EOFError, OSError):
            manager.execute("quit")
        assert managed[0].process.wait(10)

    run = act(lab, cpr, builds, managed, end)
    assert run["code"] == 7, run
    assert "ended by itself" in run["outcome"]["where"]
    assert qemus_of(lab) == []


@full
def test_a_block_job_that_is_begun_meanwhile(lab: Lab, cpr: Command, builds: Builds) -> None:
    """It goes on in the old QEMU."""
    disk, copy = image(lab.directory / "disk.qcow2"), lab.directory / "copy.qcow2"
    second = lab.directory / "second"
    extra = ("-drive", f"file={disk},format=qcow2,if=virtio,id=disk0", "-qmp", f"unix:{second},server=on,wait=off")
    target = builds("11.1.a")
    with counted(lab, builds("7.2"), *extra) as guest:
        index = index_of(cpr, guest.name, target, "StartNew")
        with Qmp(second) as manager:
            words = ("--ignore", "monitor-client")
            with paused_at(lab, cpr, guest.name, target, f"step:{index}:done", *words) as run:
                manager.execute(
                    "drive-mirror", device="disk0", target=str(copy), format="qcow2", sync="full", job_id="mirror"
                )
            assert run["code"] == 6, run
            assert "mirror" in run["outcome"]["error"]
            (job,) = manager.execute("query-block-jobs")
            assert job["device"] == "mirror"
        assert qemus_of(lab) == [guest.process.pid]
        guest.check(rounds=1)


# -- RAM that its QEMU would throw away


@pytest.mark.parametrize("kind", [pytest.param("file", marks=full), "shm"])
def test_discard_data_leaves_the_ram_intact(lab: Lab, cpr: Command, builds: Builds, kind: str) -> None:
    """At its end the old QEMU would punch the pages out; the new one is told to do so at its own end."""
    path = lab.directory / "ram" if kind == "file" else Path("/dev/shm", unique(lab))
    backend = f"memory-backend-file,share=on,discard-data=on,mem-path={path}"
    try:
        with counted(lab, builds("7.2"), backend=backend) as guest:
            pid = guest.process.pid
            for key in ["11.1.a"] if kind == "shm" else ["11.1.a", "11.1.b"]:
                guest.log.wait_rounds(1)
                result = cpr.update(pid, builds(key))
                assert result.code == 0, str(result)
                pid = result.guest["pid_after"]
                guest.check(rounds=2)
                with Qmp(guest.qmp) as monitor:
                    assert monitor.execute("qom-get", path="/objects/ram0", property="discard-data") is True
            used = path.stat().st_blocks
            assert used
            with Qmp(guest.qmp) as monitor:
                monitor.execute("quit")
            assert lab.adopt(pid).wait(10)
            assert path.stat().st_blocks < used / 2
    finally:
        path.unlink(missing_ok=True)


@full
def test_discard_data_is_on_again_where_the_update_is_undone(lab: Lab, cpr: Command, builds: Builds) -> None:
    backend = f"memory-backend-file,share=on,discard-data=on,mem-path={lab.directory / 'ram'}"
    target = builds("11.1.a")
    with counted(lab, builds("7.2"), backend=backend) as guest, Stage(lab.directory / "stage") as stage:
        index = index_of(cpr, guest.name, target, "PassClients")
        result = cpr.update(guest.name, target, **stage.environment([Fault(at=f"step:{index}:done", do="fail")]))
        assert result.code == 6, str(result)
        with Qmp(guest.qmp) as monitor:
            assert monitor.execute("qom-get", path="/objects/ram0", property="discard-data") is True
        guest.check()
