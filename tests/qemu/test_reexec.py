"""An update in place: the process is the same to everybody who knows it, and everybody who is connected stays so."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cpr.engines import fdmap, ptys
from cpr.engines.relay import HIDDEN_WHILE_LOADING
from cpr.errors import Exit
from cpr.linux.proc import read_environ
from cpr.linux.process import open_process
from cpr.qemu.clients import descriptor_targets
from tests.qemu.conftest import Command, qemus_of
from tests.qemu.faults.fault import PATIENCE, Fault
from tests.qemu.faults.moments import Script
from tests.qemu.faults.subject import killed
from tests.qemu.managers import Flood
from tests.qemu.moving import backend, untouched
from tests.qemu.parties import Qmp, Wire, counted
from tests.qemu.surveying import until
from tests.qemu.test_connections import rfb, server, typing
from tests.qemu.test_survey_process import traced

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab
    from tests.qemu.faults.fault import Stage

    Builds = Callable[[str], QemuBuild]

USER = 54321
SCRIPT = Script("reexec")
FIELDS = "Name|PPid|Uid|Gid|Groups|NSpid|Cap|NoNewPrivs|Seccomp:|Cpus_allowed_list|Umask|SigBlk|SigIgn"


@pytest.fixture
def cpr(lab: Lab) -> Command:
    return Command(lab, "reexec")


def identity(pid: int) -> dict[str, Any]:
    """What whoever knows the process knows it by."""
    proc = Path(f"/proc/{pid}")
    stat = (proc / "stat").read_text().rpartition(")")[2].split()
    names = FIELDS.split("|")
    return {
        "start time": stat[19],
        "parent, group, session": stat[1:4],
        "status": [row for row in (proc / "status").read_text().splitlines() if row.startswith(tuple(names))],
        "namespaces": {name: os.readlink(proc / "ns" / name) for name in os.listdir(proc / "ns")},
        "cgroup": (proc / "cgroup").read_text(),
        "limits": [row for row in (proc / "limits").read_text().splitlines() if "open files" not in row],
        "directories": [os.readlink(proc / name) for name in ("cwd", "root")],
        "oom": (proc / "oom_score_adj").read_text(),
        "standard": [os.readlink(proc / "fd" / str(number)) for number in (0, 1, 2)],
    }


def sockets(pid: int) -> set[tuple[str, int]]:
    """Path and inode of each UNIX socket that it has with a name: listeners, and connections that came there."""
    rows = (line.split() for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:])
    paths = {int(row[6]): row[7] for row in rows if len(row) > 7}
    inodes = [int(t[8:-1]) for t in descriptor_targets(pid).values() if t.startswith("socket:[")]
    return {(paths[inode], inode) for inode in inodes if inode in paths}


@pytest.mark.parametrize(
    "route",
    ["7.2 11.1.a 7.2", pytest.param("10.0 11.1.b 11.1.a", marks=pytest.mark.full)],
)
def test_the_process_is_the_same_and_everybody_stays_connected(
    lab: Lab, cpr: Command, builds: Builds, route: str
) -> None:
    """At once: a console client in mid-stream, a log file, a VNC listener, a chardev where nobody is, a pid file."""
    first, *rest = route.split()
    pidfile, idle, vnc = (lab.directory / name for name in ("pidfile", "idle", "vnc"))
    extra = (
        *("-chardev", server("idle", idle), "-serial", "chardev:idle"),
        *("-vnc", f"unix:{vnc}", "-vga", "std", "-pidfile", str(pidfile)),
    )
    with counted(lab, builds(first), *extra) as guest:
        pid = guest.process.pid
        before, connected = identity(pid), sockets(pid)
        assert {Path(path).name for path, _ in connected} >= {"idle", "vnc", Path(str(guest.qmp)).name}
        for key in rest:
            with typing(guest):
                result = cpr.update(guest.name, builds(key))
                assert (result.code, result.guest["pid_after"]) == (0, pid), str(result)
                assert result.guest["engine"] == "reexec"
            assert identity(pid) == before
            assert sockets(pid) == connected
            assert os.path.realpath(f"/proc/{pid}/exe") == os.path.realpath(builds(key).binary)
            assert pidfile.read_text().strip() == str(pid)
            assert rfb(vnc).startswith(b"RFB ")
            with Wire(idle) as wire:
                assert not wire.ended
            with Qmp(guest.qmp) as monitor:
                assert monitor.version == builds(key).version
            assert qemus_of(lab) == [pid]
        guest.check()


@pytest.mark.parametrize(
    ("route", "times"), [("7.2 11.1.a", 1), pytest.param("11.1.a 11.1.b", 50, marks=pytest.mark.full)]
)
@pytest.mark.timeout(1200)
def test_a_manager_keeps_its_session_and_gets_every_answer(
    lab: Lab, cpr: Command, builds: Builds, route: str, times: int
) -> None:
    """It holds a second QMP socket and sends commands of 3 KB without a pause."""
    keys = route.split()
    second = lab.directory / "second"
    with counted(lab, builds(keys[0]), "-qmp", f"unix:{second},server=on,wait=off") as guest:
        with Flood(second) as manager:
            until(lambda: manager.answered > 20)
            for number in range(times):
                key = keys[(number + 1) % len(keys)]
                result = cpr.update(guest.name, builds(key))
                assert (result.code, result.guest["pid_after"]) == (0, guest.process.pid), str(result)
                answered = manager.answered
                until(lambda: manager.answered > answered + 20 or manager.error is not None)  # noqa: B023 - at once
                manager.check()
        manager.check()
        assert not set(manager.events) & HIDDEN_WHILE_LOADING
        with Qmp(second) as monitor:
            assert monitor.version == builds(keys[times % len(keys)]).version
        guest.check(rounds=0)


def test_a_paused_guest_stays_paused(lab: Lab, cpr: Command, builds: Builds) -> None:
    with counted(lab, builds("7.2")) as guest:
        with Qmp(guest.qmp) as monitor:
            monitor.execute("stop")
        result = cpr.update(guest.name, builds("11.1.a"))
        assert (result.code, result.guest["runstate"]) == (0, "paused"), str(result)
        with Qmp(guest.qmp) as monitor:
            assert monitor.execute("query-status")["status"] == "paused"
            monitor.execute("cont")
        guest.log.wait_ticks(20)
        guest.check()


@pytest.mark.parametrize("harm", ["gone", pytest.param("no program", marks=pytest.mark.full)])
def test_a_program_that_cannot_be_executed(
    lab: Lab, cpr: Command, stage: Stage, builds: Builds, tmp_path: Path, harm: str
) -> None:
    """It answers when it is asked, and the execve fails in the pause: the old one goes on, in its own process."""
    program = tmp_path / "qemu-system-x86_64"
    program.symlink_to(builds("11.1.a").binary)
    with counted(lab, builds("7.2")) as guest:
        number = guest.process.pid
        moment = Fault(at=SCRIPT.at("ExecNew", "doing"), do="wait")
        words = ("update", "--restart", guest.name, "--qemu", program, "-y", "--json", "--engine", "reexec")
        process = cpr.start(*words, **stage.environment([moment]))
        try:
            announced = stage.wait()
            program.unlink()
            if harm != "gone":
                program.write_bytes(b"\x7fELF and nothing more")
                program.chmod(0o755)
            announced.go()
            out, _ = process.communicate(timeout=PATIENCE)
        finally:
            if process.poll() is None:
                killed(process)
        (outcome,) = json.loads(out)["guests"]
        assert (outcome["exit_code"], outcome["status"]) == (Exit.ROLLED_BACK, "rolled_back"), outcome
        assert ("No such file" if harm == "gone" else "Exec format error") in outcome["error"]
        assert (outcome["pid_before"], outcome["pid_after"]) == (number, number)
        guest.log.wait_ticks(20)
        guest.check()
        assert qemus_of(lab) == [number]
        assert cpr.update(number, builds("11.1.a")).guest["status"] == "updated"
        guest.log.wait_ticks(20)
        guest.check()


def test_one_that_somebody_traces_is_refused(lab: Lab, cpr: Command, builds: Builds) -> None:
    """By name, with the other engine offered, and before anything is touched; without the tracer it is updated."""
    guest = lab.counting(builds("7.2"), backend=backend(builds("7.2"), lab))
    with traced(guest.pid) as tracer, untouched(lab, guest):
        result = cpr.update(guest.pid, builds("11.1.a"))
        assert result.code == Exit.BLOCKED, str(result)
        (found,) = (f for f in result.guest["findings"] if f["severity"] == "blocker")
        assert found["check"] == "ptrace"
        assert str(tracer) in found["message"]
        assert "--engine handover" in found["hint"]
    assert cpr.update(guest.pid, builds("11.1.a")).guest["status"] == "updated"


PLANTED = {
    "CPR_FD_serial0": "7,8",
    "CPR_RUN": "planted",
    "QEMU_FD_ram": "3",
    "QEMU_CPR_ram": "3",
    "QEMU_START_FREEZE": "1",
}


def test_the_map_in_the_environment(lab: Lab, cpr: Command, builds: Builds) -> None:
    """What was planted there is removed, and told; what stands there after an update is true, and not told."""
    odd = {**PLANTED, "CPR_OF_MINE": "kept"}
    with counted(lab, builds("7.2"), environment=odd) as guest:
        pid = guest.process.pid
        for key, told in (("11.1.a", ["CPR_FD_serial0, QEMU_CPR_ram, QEMU_FD_ram, QEMU_START_FREEZE"]), ("11.1.b", [])):
            result = cpr.update(guest.name, builds(key))
            assert (result.code, result.guest["pid_after"]) == (0, pid), str(result)
            found = result.guest["findings"]
            assert [f["subject"] for f in found if f["check"] == "foreign-variables"] == told
            environ = dict(read_environ(pid))
            assert environ["CPR_OF_MINE"] == "kept"
            assert not PLANTED.items() & environ.items()
            known = fdmap.decode(environ.items())
            assert known.run.endswith(f"/{pid}")
            assert fdmap.STATE in known.entries
            verified = fdmap.verify(pid, known)
            assert "chardev" in {name.partition(":")[0] for name in verified.good}, verified
        guest.check(rounds=0)


def test_a_pty_stays_open(lab: Lab, cpr: Command, builds: Builds) -> None:
    """Whoever has its other end open goes on, over two updates; for the second QEMU calls it by a wrong name."""
    extra = ("-chardev", "pty,id=p0", "-serial", "chardev:p0")
    with counted(lab, builds("7.2"), *extra) as guest:
        with Qmp(guest.qmp) as monitor:
            (name,) = (c["filename"] for c in monitor.execute("query-chardev") if c["label"] == "p0")
        slave = os.open(name.removeprefix("pty:"), os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        try:
            before = masters_of(guest.process.pid)
            for key in ("11.1.a", "11.1.b"):
                result = cpr.update(guest.name, builds(key))
                assert result.code == 0, str(result)
                assert masters_of(guest.process.pid) == before
            os.write(slave, b"x")  # EIO where nobody has the master
            with pytest.raises(BlockingIOError):
                os.read(slave, 1)  # nothing, and no end
        finally:
            os.close(slave)
        guest.check(rounds=0)


def masters_of(pid: int) -> list[int]:
    """N of /dev/pts/N of each master that a process has."""
    with open_process(pid) as process:
        return sorted(ptys.masters(process))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_guest_in_a_sandbox_under_another_user(lab: Lab, cpr: Command, builds: Builds) -> None:
    """Its filter forbids execve; it has no capability, and a mount namespace of its own."""
    lab.directory.chmod(0o777)
    disk = lab.directory / f"{lab.directory.name}.disk"
    disk.touch()
    os.chown(disk, USER, USER)
    sandbox = ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
    user = (f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all")
    with counted(lab, builds("7.2"), *sandbox, prefix=("unshare", "--mount", "setpriv", *user)) as guest:
        before = identity(guest.process.pid)
        for number, key in enumerate(("11.1.a", "11.1.b")):
            result = cpr.update(guest.name, builds(key))
            assert result.code == 0, str(result)
            found = [f["check"] for f in result.guest["findings"]]
            assert ("seccomp-filters" in found) is (number > 0)  # they pile up, and it is told
            now = identity(guest.process.pid)
            assert now == before
        guest.check(rounds=0)


NAMESPACES = {
    "net": ("unshare", "--net"),
    "pid": ("unshare", "--pid", "--fork", "--kill-child"),
    "user": ("unshare", "--user", "--map-root-user", "--net"),
}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make them")
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.full) for kind in NAMESPACES])
def test_a_guest_in_namespaces_of_its_own(lab: Lab, cpr: Command, builds: Builds, kind: str) -> None:
    """Twice: what the first update has left is understood by the second."""
    with counted(lab, builds("7.2"), prefix=NAMESPACES[kind]) as guest:
        (pid,) = qemus_of(lab)
        before = identity(pid)
        assert before["namespaces"][kind] != os.readlink(f"/proc/self/ns/{kind}")
        for key in ("11.1.a", "11.1.b"):
            with typing(guest):
                result = cpr.update(pid, builds(key))
                assert (result.code, result.guest["pid_after"]) == (0, pid), str(result)
            assert identity(pid) == before
        guest.check(rounds=0)
