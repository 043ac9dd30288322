"""The new QEMU is what the old one was: user, limits, namespaces, cgroups, threads, directory, environment, options."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.lab import cache, counting
from tests.qemu.conftest import Command, qemus_of
from tests.qemu.parties import Qmp, comm_of, counted, descriptors, unique
from tests.qemu.surveying import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab
    from tests.qemu.conftest import Result

    Builds = Callable[[str], QemuBuild]

full = pytest.mark.full
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")

STATUS = (
    *("Uid", "Gid", "Groups", "Umask", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp"),
    *("Cpus_allowed_list", "Mems_allowed_list"),
)
INTERNAL = (1 << 31) | (1 << 32)
"""Signals 32 and 33, which glibc keeps for itself and posix_spawn has ignored."""
NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
USER, GROUP, MORE_GROUPS = 54321, 54322, (54323, 54324)


@pytest.fixture
def cpr(lab: Lab) -> Command:
    """A pid file would make it choose re-exec, which has nothing to imitate."""
    return Command(lab, "handover")


def identity(pid: int) -> dict[str, object]:
    """Everything that the kernel says a process is, as against what it does."""
    proc = Path("/proc", str(pid))
    lines = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
    found: dict[str, object] = {name: lines.get(name) for name in STATUS}
    found |= {f"ns/{name}": os.readlink(proc / "ns" / name) for name in NAMESPACES}
    found["ignored signals"] = int(str(lines["SigIgn"]), 16) & ~INTERNAL
    limits = (proc / "limits").read_text()
    found["limits"] = re.sub(r"(?m)^(Max open files) +\d+", r"\1", limits)  # QEMU raises the soft one
    found["cgroup"] = (proc / "cgroup").read_text()
    found["oom_score_adj"] = (proc / "oom_score_adj").read_text()
    found["nice"] = os.getpriority(os.PRIO_PROCESS, pid)
    found["scheduler"] = os.sched_getscheduler(pid)
    found["cwd"] = os.readlink(proc / "cwd")
    found["root"] = os.readlink(proc / "root")
    found["stdio"] = [os.readlink(proc / "fd" / str(number)) for number in (0, 1, 2)]
    return found


def environ(pid: int) -> list[bytes]:
    """Without what an update says of itself."""
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return sorted(w for w in words if w and not w.startswith((b"CPR_RUN=", b"CPR_PIDFILE=")))


def argv(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="surrogateescape").split("\0")[:-1]


def updated(cpr: Command, guest: object, target: QemuBuild, *words: object) -> Any:
    result = cpr.update(guest, target, *words)
    assert result.code == 0, str(result)
    return result.guest


def checks(result: Result) -> set[str]:
    return {f["check"] for f in result.guest["findings"]}


def shell(script: str) -> list[str]:
    """A prefix: a script that execs what follows."""
    return ["/bin/sh", "-ec", f'{script}\nexec "$@"', "sh"]


def end_all(lab: Lab) -> None:
    """So that their cgroups can be removed."""
    for pid in qemus_of(lab):
        orphan = lab.adopt(pid)
        orphan.kill()
        orphan.wait(10)


# -- who it is


def reachable() -> str:
    """Shell words that let anybody into the lab's cache, in a mount namespace: what is in the way is covered."""
    place = Path(os.environ.get("CPR_LAB_CACHE") or cache.root()).resolve()
    shut = [parent for parent in reversed(place.parents) if not parent.stat().st_mode & stat.S_IXOTH]
    if not shut:
        return ""
    cache_, cover = shlex.quote(str(place)), shlex.quote(str(shut[0]))
    return (
        "mount --make-rprivate /; mount -t tmpfs -o mode=755 cpr-lab /mnt; mkdir /mnt/cache\n"
        f"mount --bind {cache_} /mnt/cache; mount -t tmpfs -o mode=755 cpr-lab {cover}\n"
        f"mkdir -p {cache_}; mount --bind /mnt/cache {cache_}; umount /mnt/cache; umount /mnt"
    )


@contextlib.contextmanager
def cgroups(name: str) -> Iterator[list[Path]]:
    """Cgroups of our own: in the v1 hierarchies that let us, or in v2."""
    made: list[Path] = []
    places = [Path("/sys/fs/cgroup", kind) for kind in ("pids", "freezer", "cpu", "unified", ".")]
    try:
        for place in places:
            with contextlib.suppress(OSError):
                if (place / "cgroup.procs").exists():
                    directory = place / name
                    directory.mkdir()
                    made.append(directory)
        if not made:
            pytest.skip("no cgroup can be made here")
        yield made
    finally:
        for directory in reversed(made):
            until(lambda d=directory: not (d / "cgroup.procs").read_text())  # type: ignore[misc]
            for child in [d for d in directory.iterdir() if d.is_dir()]:
                child.rmdir()
            directory.rmdir()


@as_root
@pytest.mark.parametrize("route", ["11.1.a", pytest.param("11.1.a 11.1.b 11.1.a", marks=full)])
def test_another_user_in_namespaces_and_cgroups_with_limits(
    lab: Lab, cpr: Command, builds: Builds, route: str
) -> None:
    """No capability, own mounts, network, ipc and host name, low limits, niceness: all of it is there afterwards."""
    groups = ",".join(map(str, MORE_GROUPS))
    os.chown(lab.directory, USER, GROUP)
    lab.directory.chmod(0o755)
    with cgroups(unique(lab)) as mine, contextlib.ExitStack() as stack:
        stack.callback(end_all, lab)
        enter = "\n".join(f"echo $$ > {shlex.quote(str(d / 'cgroup.procs'))}" for d in mine)
        prefix = [
            *shell(enter),
            *("unshare", "--mount", "--net", "--ipc", "--uts"),
            *shell(f"hostname cpr-lab\n{reachable()}\numask 0027\necho 321 > /proc/self/oom_score_adj"),
            *("nice", "-n", "7", "prlimit", "--nofile=3000:4000", "--core=0", "--memlock=1000000:2000000"),
            *("setpriv", f"--reuid={USER}", f"--regid={GROUP}", f"--groups={groups}", "--no-new-privs"),
            *("--bounding-set=-all", "--inh-caps=-all"),
        ]
        disk = lab.directory / f"{unique(lab)}.disk"
        disk.touch()
        os.chown(disk, USER, GROUP)
        guest = stack.enter_context(counted(lab, builds("7.2"), prefix=prefix))
        before = identity(guest.process.pid)
        assert str(before["Uid"]).split() == [str(USER)] * 4
        assert str(before["CapBnd"]).strip("0") == ""
        assert before["ns/net"] != os.readlink("/proc/self/ns/net")
        assert before["nice"] == os.getpriority(os.PRIO_PROCESS, 0) + 7
        pid = guest.process.pid
        for key in route.split():
            outcome = updated(cpr, pid, builds(key))
            assert outcome["notes"] == []
            pid = outcome["pid_after"]
            assert identity(pid) == before
        guest.check(rounds=1)


@as_root
def test_threads_are_where_their_predecessors_were(lab: Lab, cpr: Command, builds: Builds) -> None:
    """vCPU and I/O threads by number: affinity, policy, and a cgroup of each thread (v1), as libvirt places them."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("one CPU: there is nothing to choose")
    extra = ("-smp", "2", "-object", "iothread,id=io0")
    with cgroups(unique(lab)) as mine, contextlib.ExitStack() as stack:
        stack.callback(end_all, lab)
        guest = stack.enter_context(counted(lab, builds("7.2"), *extra))
        threaded = next((d for d in mine if (d / "tasks").exists()), None)

        def threads() -> list[int]:
            with Qmp(guest.qmp) as monitor:
                found = sorted((c["cpu-index"], c["thread-id"]) for c in monitor.execute("query-cpus-fast"))
                return [tid for _, tid in found] + [t["thread-id"] for t in monitor.execute("query-iothreads")]

        def placement(tid: int) -> tuple[object, ...]:
            return os.sched_getaffinity(tid), os.sched_getscheduler(tid), Path(f"/proc/{tid}/cgroup").read_text()

        for number, tid in enumerate(threads()):
            os.sched_setaffinity(tid, {cpus[number % 2]})
            if number == 1:
                os.sched_setscheduler(tid, os.SCHED_BATCH, os.sched_param(0))
            if threaded is not None:
                (threaded / f"thread{number}").mkdir()
                (threaded / f"thread{number}" / "tasks").write_text(str(tid))
        before = [placement(tid) for tid in threads()]
        assert len(set(map(str, before))) == 3
        pid = guest.process.pid
        for key in ("11.1.a", "11.1.b"):
            pid = updated(cpr, pid, builds(key))["pid_after"]
            assert [placement(tid) for tid in threads()] == before
            assert os.sched_getaffinity(pid) == set(cpus)
        guest.check(rounds=0)


def test_a_relative_command_line_and_an_odd_environment(lab: Lab, cpr: Command, builds: Builds) -> None:
    """Image, sockets, RAM and pid file by paths relative to the working directory; bytes that are no text."""
    odd = {
        "ODD": "\udcff\udc80 two\nlines \x01",
        "EMPTY": "",
        "CPR_OF_MINE": "kept",
        "QEMU_AUDIO_DRV": "none",
        "CPR_FD_serial0": "7,8", "CPR_RUN": "planted", "QEMU_FD_ram": "3", "QEMU_START_FREEZE": "1",
    }
    disk = counting.disk(lab.directory / "rel.disk", hz=100, pace=40)
    name = unique(lab)
    words = [
        *f"-name {name} -nodefaults -display none -accel tcg -m 32M -machine q35,memory-backend=ram0".split(),
        *("-object", "memory-backend-file,id=ram0,size=32M,share=on,mem-path=rel.ram"),
        *("-chardev", "socket,id=console,path=rel.con,server=on,wait=off", "-serial", "chardev:console"),
        *("-qmp", "unix:rel.qmp,server=on,wait=off", "-pidfile", "rel.pid"),
        *("-drive", f"file={disk.name},format=raw,if=ide"),
    ]
    console = lab.directory / "rel.con"
    with counted(lab, builds("7.2"), words=words, console=console, bound="rel.con", environment=odd) as guest:
        pid = guest.process.pid
        stale = {b"CPR_FD_serial0=7,8", b"CPR_RUN=planted", b"QEMU_FD_ram=3", b"QEMU_START_FREEZE=1"}
        before = [w for w in environ(pid) if w not in stale]
        assert b"ODD=" + os.fsencode(odd["ODD"]) in before
        was = identity(pid)
        for key, planted in (("11.1.a", ["CPR_FD_serial0, QEMU_FD_ram, QEMU_START_FREEZE"]), ("11.1.b", [])):
            done = updated(cpr, pid, builds(key))
            assert [f["subject"] for f in done["findings"] if f["check"] == "foreign-variables"] == planted
            pid = done["pid_after"]
            assert environ(pid) == before
            assert identity(pid) == was
            assert (lab.directory / "rel.pid").read_text() == f"{pid}\n"
            assert f"file={disk.name}" in " ".join(argv(pid))
        guest.check(rounds=0)


# -- what it was started with


@pytest.mark.parametrize("route", ["11.1.a", pytest.param("11.1.a 11.1.b", marks=full)])
def test_daemonize_and_pidfile(lab: Lab, cpr: Command, builds: Builds, route: str) -> None:
    pidfile = lab.directory / "guest.pid"
    with counted(lab, builds("7.2"), "-daemonize", "-pidfile", str(pidfile), pidfile=pidfile) as guest:
        pid = guest.process.pid
        before = identity(pid)
        for key in route.split():
            new = updated(cpr, pid, builds(key))["pid_after"]
            assert new != pid
            pid = new
            assert pidfile.read_text() == f"{pid}\n"
            assert identity(pid) == before
            assert "-daemonize" not in argv(pid)
        guest.check(rounds=0)


@full
@pytest.mark.parametrize("how", ["another pid", "symlink", "gone", "directory", "more than a pid"])
def test_a_pidfile_that_is_not_the_guests_is_left_alone(lab: Lab, cpr: Command, builds: Builds, how: str) -> None:
    pidfile, other = lab.directory / "guest.pid", lab.directory / "other"
    with counted(lab, builds("7.2"), "-pidfile", str(pidfile)) as guest:
        pid = guest.process.pid
        pidfile.unlink()
        match how:
            case "another pid":
                pidfile.write_text("1\n")
            case "symlink":
                other.write_text(f"{pid}\n")
                pidfile.symlink_to(other)
            case "directory":
                pidfile.mkdir()
            case "more than a pid":
                pidfile.write_text(f"{pid}\nkeep this\n")
        result = cpr.update(guest.name, builds("11.1.a"))
        assert result.code in (0, 8), str(result)  # 8: it is told that the file could not be written
        match how:
            case "another pid":
                assert pidfile.read_text() == "1\n"
            case "symlink":
                assert other.read_text() == f"{pid}\n"
                assert pidfile.is_symlink()
            case "gone":
                assert not pidfile.exists()
            case "directory":
                assert pidfile.is_dir()
            case _:
                assert pidfile.read_text() == f"{pid}\nkeep this\n"
        guest.check(rounds=0)


@pytest.mark.parametrize("begun", [pytest.param("-S", marks=full), ""])
def test_a_paused_guest_stays_paused_and_can_be_continued(
    lab: Lab, cpr: Command, builds: Builds, begun: str
) -> None:
    with counted(lab, builds("7.2"), *begun.split(), running=not begun) as guest:
        with Qmp(guest.qmp) as monitor:
            if begun:
                monitor.execute("cont")
                guest.log.wait(lambda: guest.log.ticks, 30)
            monitor.execute("stop")
        pid = guest.process.pid
        for key in ("11.1.a", "11.1.b") if begun else ("11.1.a",):
            outcome = updated(cpr, pid, builds(key))
            assert outcome["runstate"] == "paused"
            pid = outcome["pid_after"]
            with Qmp(guest.qmp) as monitor:
                assert monitor.execute("query-status")["status"] == "paused"
        count = len(guest.log.ticks)
        assert not guest.process.alive
        with Qmp(guest.qmp) as monitor:
            monitor.execute("cont")
        guest.log.wait(lambda: len(guest.log.ticks) > count + 20, 20)
        guest.check(rounds=1)


@full
def test_a_guest_that_was_never_let_go(lab: Lab, cpr: Command, builds: Builds) -> None:
    """-S and nothing else yet: there is no state to move, which is said; or it is moved and can be started."""
    with counted(lab, builds("7.2"), "-S", running=False) as guest:
        result = cpr.update(guest.name, builds("11.1.a"))
        assert result.code == 3, str(result)
        assert "guest-state" in checks(result)
        with Qmp(guest.qmp) as monitor:
            monitor.execute("cont")
        guest.log.wait(lambda: guest.log.ticks, 30)
        guest.check(rounds=0)


@full
@pytest.mark.parametrize("key", ["7.2", "10.0", "11.1.a"])
def test_async_teardown_leaves_nothing(lab: Lab, cpr: Command, builds: Builds, key: str) -> None:
    """The helper shares the address space, RAM with it: neither the old one nor its helper outlives the update."""
    option = ["-async-teardown"] if key == "7.2" else ["-run-with", "async-teardown=on"]
    with counted(lab, builds(key), *option) as guest:
        pid = guest.process.pid
        assert len(helpers(lab)) == 1
        for target in ("11.1.a", "11.1.b"):
            new = updated(cpr, pid, builds(target))["pid_after"]
            until(lambda n=new: [comm_of(h) for h in helpers(lab)] == [f"cleanup/{n}"], 20)  # type: ignore[misc]
            pid = new
        guest.check(rounds=1)
        lab.adopt(pid).kill()
        until(lambda: helpers(lab) == [], 20)


def helpers(lab: Lab) -> list[int]:
    """Pids of async teardown's helpers in a lab."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            mine = str(lab.directory).encode() in Path("/proc", name, "cmdline").read_bytes()
            if mine and comm_of(int(name)).startswith("cleanup/"):
                found.append(int(name))
    return found


# -- nothing piles up


@pytest.mark.parametrize("route", [pytest.param(["11.1.a", "11.1.b"], marks=full), ["11.1.a"]])
def test_nothing_grows_over_ten_updates(lab: Lab, cpr: Command, builds: Builds, route: list[str]) -> None:
    """Command line, environment, descriptors, mappings and threads after the second update and after the tenth."""
    second = lab.directory / "second"
    extra = (
        *("-qmp", f"unix:{second},server=on,wait=off", "-pidfile", str(lab.directory / "guest.pid")),
        *("-vnc", f"unix:{lab.directory}/vnc", "-device", "virtio-serial-pci"),
        *("-chardev", f"socket,id=port,path={lab.directory}/port,server=on,wait=off"),
        *("-device", "virtserialport,chardev=port,name=port0"),
        *("-chardev", f"file,id=log,path={lab.directory}/com2.log", "-serial", "chardev:log"),
        *("-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0,romfile="),
    )
    with counted(lab, builds("7.2"), *extra) as guest:
        pid, seen = guest.process.pid, []
        for number in range(10):
            pid = updated(cpr, pid, builds(route[number % len(route)]))["pid_after"]
            seen.append((words_of(pid), len(environ(pid)), kinds(pid)))
        same = [facts for number, facts in enumerate(seen) if number >= 2 and number % 2 == 0]
        assert same == same[:1] * 4
        odd = [facts for number, facts in enumerate(seen) if number >= 2 and number % 2 == 1]
        assert odd == odd[:1] * 4
        assert len(qemus_of(lab)) == 1
        guest.check(rounds=1)


def words_of(pid: int) -> list[str]:
    """The command line, without the program."""
    return argv(pid)[1:]


def kinds(pid: int) -> dict[str, int]:
    """How many descriptors of each kind."""
    found: dict[str, int] = {}
    for target in descriptors(pid).values():
        kind = re.sub(r"\d+", "N", target)
        found[kind] = found.get(kind, 0) + 1
    return found
