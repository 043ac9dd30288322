"""Finding QEMUs among the processes of this host."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cpr import discover, survey
from cpr.errors import AmbiguousGuest, GuestVanished, MonitorError, MonitorHeld, NoSuchGuest, NotQemu
from cpr.linux import elf, proc
from cpr.model import MonitorAddress
from cpr.qemu import qmp
from tests.lab.start import MARK
from tests.qemu.surveying import KEYS, await_listening, bare, candidate, start, surveyed, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.model import Candidate, Guest
    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab

UUID = "3fa85f64-5717-4562-b3fc-2c963f66afa6"


@pytest.mark.parametrize("key", KEYS)
def test_a_guest_is_found_by_name_uuid_and_pid(lab: Lab, builds: Callable[[str], QemuBuild], key: str) -> None:
    name = f"web,{os.getpid()}"
    build = builds(key)
    orphan = start(lab, build, "-name", f"guest={name.replace(',', ',,')},debug-threads=on", "-uuid", UUID.upper())
    for wanted in (name, UUID, UUID.upper(), str(orphan.pid)):
        found = discover.find(wanted)
        assert found.process.pid == orphan.pid
    assert (found.name, found.uuid) == (name, UUID)
    assert found.binary.path == str(build.binary)
    assert found.binary.build_id == build.build_id
    assert found.binary.identity == (build.binary.stat().st_dev, build.binary.stat().st_ino)
    assert not found.binary.deleted
    assert not found.binary.replaced
    assert found.unreadable == ()
    with pytest.raises(NoSuchGuest):
        discover.find(name[:-1])


def test_two_guests_of_one_name_are_an_error(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    name = f"twin-{os.getpid()}"
    for file in ("one", "two"):
        start(lab, builds("7.2"), "-name", name, name=file)
    with pytest.raises(AmbiguousGuest) as raised:
        discover.find(name)
    assert len(raised.value.candidates) == 2


def test_another_program_is_not_a_guest() -> None:
    with pytest.raises(NotQemu):
        discover.find(str(os.getpid()))
    with pytest.raises(NoSuchGuest):
        discover.find("999999999")


@pytest.mark.parametrize("key", KEYS)
def test_monitors_are_those_that_listen(lab: Lab, builds: Callable[[str], QemuBuild], key: str) -> None:
    """UNIX, TCP, an inherited descriptor, an abstract name; not readline ones, clients, or telnet."""
    with socket.socket(socket.AF_UNIX) as inherited, socket.socket() as probe, socket.socket() as other:
        inherited.bind(str(lab.directory / "inherited"))
        inherited.listen()
        probe.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, telnet = probe.getsockname()[1], other.getsockname()[1]
        probe.close()
        other.close()
        abstract = f"cpr-test-{os.getpid()}"
        orphan = start(
            lab,
            builds(key),
            *("-chardev", f"socket,id=a,path={lab.directory}/a,server=on,wait=off", "-mon", "chardev=a,mode=control"),
            *("-chardev", f"socket,id=r,path={lab.directory}/r,server=on,wait=off", "-mon", "chardev=r"),
            *("-chardev", f"socket,id=t,host=127.0.0.1,port={port},server=on,wait=off", "-mon", "t,mode=control"),
            *("-chardev", f"socket,id=f,fd={inherited.fileno()},server=on,wait=off", "-mon", "f,mode=control"),
            *("-chardev", f"socket,id=n,path={abstract},abstract=on,server=on,wait=off", "-mon", "n,mode=control"),
            *("-qmp", f"telnet:127.0.0.1:{telnet},server=on,wait=off"),
            pass_fds=[inherited.fileno()],
        )
    until(lambda: any(m.label == "compat_monitor0" for m in candidate(orphan).monitors))  # the inherited one was first
    found = candidate(orphan)
    assert {m.label: str(m) for m in found.monitors} == {
        "compat_monitor0": str(lab.directory / "guest.qmp"),
        "a": str(lab.directory / "a"),
        "t": f"127.0.0.1:{port}",
        "f": str(lab.directory / "inherited"),
        "n": f"@{abstract}",
    }
    for address in found.monitors:
        with qmp.connect(address, orphan.pid) as monitor:
            assert survey.survey(found, monitor).monitor == address


def test_a_path_that_somebody_else_listens_on_is_no_monitor(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    orphan = start(lab, builds("7.2"))
    path = lab.directory / "guest.qmp"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(str(path))
        stranger.listen()
        # the guest's own listener is still there, under the same name, and cannot be reached
        with pytest.raises(MonitorError):
            surveyed(orphan)


@pytest.mark.parametrize("key", KEYS)
def test_readconfig(lab: Lab, builds: Callable[[str], QemuBuild], key: str) -> None:
    path = lab.directory / "guest.conf"
    socket_path = lab.directory / "conf.qmp"
    path.write_text(
        f'[chardev "cfg"]\n  backend = "socket"\n  path = "{socket_path}"\n  server = "on"\n  wait = "off"\n'
        '[mon "m"]\n  chardev = "cfg"\n  mode = "control"\n[name]\n  guest = "configured"\n'
    )
    orphan = lab.start([*bare(builds(key)), "-readconfig", str(path)], name="guest")
    await_listening(lab, orphan)
    found = candidate(orphan)
    assert [str(m) for m in found.monitors] == [str(socket_path)]
    guest = survey.survey(found)
    assert guest.config_files == ((str(path), path.read_text()),)
    assert guest.changed_files == ()
    os.utime(path, (2**31 - 1, 2**31 - 1))
    assert surveyed(orphan).changed_files == (str(path),)
    path.unlink()
    assert str(path) in surveyed_by_path(orphan.pid, socket_path).unreadable


def surveyed_by_path(pid: int, path: Path) -> Guest:
    """Survey through a monitor that the command line does not tell any more."""
    with qmp.connect(MonitorAddress(label="", path=str(path)), pid) as monitor:
        return survey.survey(discover.candidate(pid), monitor)


@pytest.mark.parametrize("key", KEYS)
def test_daemonize_gives_one_guest_at_any_time(lab: Lab, builds: Callable[[str], QemuBuild], key: str) -> None:
    pidfile = lab.directory / "pid"
    command = [*bare(builds(key)), "-daemonize", "-pidfile", str(pidfile)]
    command += ["-name", "daemon", "-qmp", f"unix:{lab.directory}/d.qmp,server=on,wait=off"]
    seen: set[int] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            now = {c.process.pid for c in discover.candidates() if str(lab.directory) in " ".join(c.argv)}
            assert len(now) <= 1
            seen.update(now)

    with subprocess.Popen(command, env={**os.environ, **lab.environment}) as parent:
        watcher = threading.Thread(target=watch)
        watcher.start()
        parent.wait(30)
    until(pidfile.exists)
    done.set()
    watcher.join()
    pid = int(pidfile.read_text())
    lab.adopt(pid)
    assert parent.pid not in seen
    found = discover.candidate(pid)
    guest = survey.survey(found)
    assert guest.supervisors == ()
    assert guest.pidfile == str(pidfile)
    assert [f.owner for f in guest.open_files if f.target == str(pidfile)] in ([], ["pidfile"])


def test_a_waiting_parent_is_a_supervisor(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    command = [*bare(builds("10.0")), "-qmp", f"unix:{lab.directory}/p.qmp,server=on,wait=off"]
    with subprocess.Popen(command, env={**os.environ, **lab.environment}) as child:
        try:
            until(lambda: any(c.process.pid == child.pid and c.monitors for c in discover.candidates()))
            (supervisor,) = survey.survey(discover.candidate(child.pid)).supervisors
        finally:
            child.kill()
    assert supervisor.kind == "parent"
    assert str(os.getpid()) in supervisor.who


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_the_binary_is_gone_or_another_one(lab: Lab, builds: Callable[[str], QemuBuild], how: str) -> None:
    build = builds("10.0")
    copy = lab.directory / "bin" / "qemu-system-x86_64"
    copy.parent.mkdir()
    shutil.copy(build.binary, copy)
    (copy.parent / "qemu-bundle").symlink_to(build.binary.parent / "qemu-bundle")
    command = [str(copy), *bare(build)[1:], "-qmp", f"unix:{lab.directory}/b.qmp,server=on,wait=off"]
    orphan = lab.start(command, name="guest")
    await_listening(lab, orphan)
    copy.unlink()
    if how == "replaced":
        other = builds("11.1.a")
        shutil.copy(other.binary, copy)
    found = candidate(orphan)
    assert found.binary.path == str(copy)
    assert found.binary.build_id == build.build_id
    assert (found.binary.deleted, found.binary.replaced) == (how == "deleted", how == "replaced")
    guest = survey.survey(found)
    if how == "replaced":
        assert guest.installed is not None
        assert guest.installed.build_id == other.build_id
        assert guest.installed.path == str(copy)
    else:
        assert guest.installed is None or guest.installed.path != str(copy)


def test_a_rehearsal_and_a_question_are_no_guests(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    words = ["-qmp", f"unix:{lab.directory}/x.qmp,server=on,wait=off"]
    pending = lab.start([*bare(builds("7.2")), *words], name="p", environment={"CPR_RUN_PENDING": "1"})
    asked = lab.start([*bare(builds("7.2")), "-M", "none"], name="q")
    until((lab.directory / "x.qmp").exists)
    pids = {c.process.pid for c in discover.candidates()}
    assert not pids & {pending.pid, asked.pid}


def test_a_new_qemu_is_no_guest_while_the_old_one_lives(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    old = start(lab, builds("7.2"), name="old")
    words = ["-qmp", f"unix:{lab.directory}/new.qmp,server=on,wait=off"]
    new = lab.start([*bare(builds("10.0")), *words], name="new", environment={"CPR_RUN": f"x/{old.pid}"})
    until((lab.directory / "new.qmp").exists)
    assert {c.process.pid for c in discover.candidates()} & {old.pid, new.pid} == {old.pid}
    assert discover.candidate(new.pid).process.pid == new.pid
    old.kill()
    assert old.wait(10)
    until(lambda: {c.process.pid for c in discover.candidates()} & {old.pid, new.pid} == {new.pid})


def test_a_held_monitor(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    second = lab.directory / "second"
    orphan = start(lab, builds("7.2"), "-qmp", f"unix:{second},server=on,wait=off")
    found = candidate(orphan)
    with qmp.connect(found.monitors[0], orphan.pid):
        with survey.open_monitor(found) as free:
            assert free.address == str(second)
            with pytest.raises(MonitorHeld) as raised:
                survey.open_monitor(found)
    assert str(second) in str(raised.value)
    assert str(lab.directory / "guest.qmp") in str(raised.value)


def test_no_monitor_at_all(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    orphan = start(lab, builds("7.2"), monitor=False)
    with pytest.raises(MonitorError, match="no QMP socket"):
        surveyed(orphan)


@pytest.mark.parametrize("moment", ["before", "stopped", "between"])
def test_a_guest_that_vanishes(lab: Lab, builds: Callable[[str], QemuBuild], moment: str) -> None:
    orphan = start(lab, builds("10.0"))
    found = candidate(orphan)
    with contextlib.ExitStack() as held:
        monitor = held.enter_context(survey.open_monitor(found)) if moment != "before" else None
        if moment == "between":
            killer = threading.Timer(0.01, orphan.kill)
            held.callback(killer.join)
            killer.start()
            with pytest.raises(GuestVanished):
                while True:
                    survey.survey(found, monitor)
            return
        orphan.kill()
        assert orphan.wait(10)
        with pytest.raises((GuestVanished, MonitorError)):
            survey.survey(found, monitor)


LIST = """
import json, os, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
from cpr import discover
found = [c for c in discover.candidates() if c.process.pid == int(sys.argv[1])]
print(json.dumps([[c.name, c.binary.path, [str(m) for m in c.monitors], list(c.unreadable)] for c in found]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_listing_without_privileges(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    orphan = start(lab, builds("10.0"), "-name", "secret")
    os.chmod(lab.directory, 0o755)
    listed = subprocess.run(
        # the modules are imported while it may still read them, wherever they lie
        [sys.executable, "-c", "import cpr.discover, psutil\n" + LIST, str(orphan.pid)],
        stdout=subprocess.PIPE,
        check=True,
    )
    ((name, path, monitors, unreadable),) = json.loads(listed.stdout)
    assert name == "secret"
    assert path.endswith("qemu-system-x86_64")
    assert monitors == [str(lab.directory / "guest.qmp")]
    assert unreadable == [f"/proc/{orphan.pid}/{what}" for what in ("environ", "fd", "exe")]


@pytest.mark.parametrize("key", KEYS)
def test_the_helper_of_async_teardown_is_no_guest(lab: Lab, builds: Callable[[str], QemuBuild], key: str) -> None:
    options = {"7.2": ["-async-teardown"]}.get(key, ["-run-with", "async-teardown=on"])
    orphan = start(lab, builds(key), *options)
    helpers = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{name}/comm").read_text().strip() == f"cleanup/{orphan.pid}":
                helpers.append(int(name))
    assert len(helpers) == 1
    lab.adopt(helpers[0])
    mine = [c.process.pid for c in discover.candidates() if str(lab.directory) in " ".join(c.argv)]
    assert mine == [orphan.pid]


def test_a_stopped_qemu_is_listed_and_cannot_be_asked(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    orphan = start(lab, builds("7.2"))
    found = candidate(orphan)
    orphan.kill(signal.SIGSTOP)
    try:
        assert candidate(orphan) == found
        with pytest.raises(MonitorHeld):
            survey.open_monitor(found)
    finally:
        orphan.kill(signal.SIGCONT)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare")
@pytest.mark.parametrize("key", KEYS)
def test_a_container(lab: Lab, builds: Callable[[str], QemuBuild], key: str) -> None:
    """A QEMU in pid, network and mount namespaces of its own, with a file system that only it sees."""
    pid_namespace = ["unshare", "--pid", "--fork", "--net", "--mount", "--mount-proc"]
    inside = "mount -t tmpfs none /mnt && exec \"$@\""
    command = [*pid_namespace, "sh", "-c", inside, "sh", *bare(builds(key))]
    command += ["-smp", "2", "-object", "iothread,id=io0", "-qmp", "unix:/mnt/qmp,server=on,wait=off"]
    command += ["-qmp", "tcp:127.0.0.1:4444,server=on,wait=off"]
    command += ["-chardev", "socket,id=s,path=/mnt/s,server=on,wait=off", "-serial", "chardev:s"]
    wrapper = lab.start(command, name="container")

    def mine() -> list[Candidate]:
        return [c for c in discover.candidates() if dict(environ(c.process.pid)).get(MARK) == str(lab.directory)]

    until(lambda: [c for c in mine() if c.monitors])
    (found,) = mine()
    assert found.process.pid != wrapper.pid
    assert [str(m) for m in found.monitors] == ["/mnt/qmp"], "the port is another network's"
    guest = survey.survey(found)
    tasks = {int(t) for t in os.listdir(f"/proc/{found.process.pid}/task")}
    assert {v.thread_id for v in guest.vcpus} | {tid for _, tid in guest.iothreads} <= tasks
    assert "container" in {s.kind for s in guest.supervisors}
    assert all(f.owner for f in guest.open_files if f.kind == "listener")
    assert {c.label: c.listener for c in guest.chardevs}["s"] is not None


def environ(pid: int) -> tuple[tuple[str, str], ...]:
    try:
        return proc.read_environ(pid)
    except ProcessLookupError:
        return ()


def test_build_id_is_that_of_the_file(builds: Callable[[str], QemuBuild]) -> None:
    build = builds("11.1.a")
    assert discover.build_id(str(build.binary)) == elf.elf_facts(str(build.binary)).build_id == build.build_id
