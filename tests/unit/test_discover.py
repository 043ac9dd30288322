"""Which processes are guests, where their monitors are, and which one is meant."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

from cpr import discover, supervisors
from cpr.errors import AmbiguousGuest, NoSuchGuest, NotQemu
from cpr.linux.proc import ProcessEntry
from cpr.model import Binary, Candidate, ProcessId
from cpr.qemu import cmdline as cl
from cpr.qemu.sockets import Endpoint
from cpr.supervisors import Surroundings

if TYPE_CHECKING:
    from pathlib import Path

ANY = "0.0.0.0"  # noqa: S104 (nothing is bound)
UUID = "3fa85f64-5717-4562-b3fc-2c963f66afa6"


def entry(
    *argv: str,
    exe: str | None = "/usr/bin/qemu-system-x86_64",
    comm: str = "qemu-system-x86",
    pid: int = 100,
    start_time: int = 1000,
    ppid: int = 1,
    zombie: bool = False,
) -> ProcessEntry:
    return ProcessEntry(
        pid=pid,
        start_time=start_time,
        ppid=ppid,
        exe=exe,
        argv=argv or ("qemu-system-x86_64",),
        comm=comm,
        uid=0,
        zombie=zombie,
    )


@pytest.mark.parametrize(
    "program",
    [
        "/usr/bin/qemu-system-x86_64",
        "/usr/bin/qemu-system-aarch64 (deleted)",
        "/usr/libexec/qemu-kvm",
        "/usr/bin/kvm",
        "/opt/qemu/bin/qemu-system-x86_64-9.1",
    ],
)
def test_qemus(program: str) -> None:
    assert discover.is_qemu(entry(program, exe=program))
    assert discover.is_qemu(entry(program.removesuffix(" (deleted)"), exe=None))


@pytest.mark.parametrize(
    "other",
    [
        entry(comm="cleanup/99"),
        entry(zombie=True),
        entry(exe="/usr/bin/qemu-img"),
        entry("qemu-system-x86_64", exe="/bin/bash"),
        entry("vim", "qemu-system-x86_64", exe=None),
        entry("qemu-system-x86_64", "-machine", "none"),
        entry("qemu-system-x86_64", "-S", "-M", "none,accel=kvm:tcg", "-qmp", "stdio"),
        entry("qemu-system-x86_64", "-version"),
        entry("qemu-system-x86_64", "-machine", "help"),
        ProcessEntry(pid=1, start_time=1, ppid=0, exe=None, argv=(), comm="kvm", uid=0, zombie=False),
    ],
)
def test_what_is_no_guest(other: ProcessEntry) -> None:
    assert not discover.is_qemu(other)


def test_an_option_that_nobody_knows_does_not_hide_a_guest() -> None:
    assert discover.is_qemu(entry("qemu-system-x86_64", "-vendor-option", "-name", "a"))


def test_waiting_parents() -> None:
    """The one that waits is in its starter's session, also where nobody leads that; a daemon is alone in its own."""
    ours = entry("qemu-system-x86_64", "-daemonize", pid=os.getpid(), ppid=os.getppid())
    assert discover.is_waiting_parent(ours)
    assert not discover.is_waiting_parent(dataclasses.replace(ours, argv=("qemu-system-x86_64",)))
    words = "sleep 60 & echo $$ $!; wait"
    leader = subprocess.Popen(["sh", "-c", words], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert leader.stdout is not None
    shell, child = map(int, leader.stdout.readline().split())
    try:
        member = entry("qemu-system-x86_64", "-daemonize", pid=child, ppid=shell)
        assert discover.is_waiting_parent(member)
        leader.kill()
        leader.wait()
        daemon = entry("qemu-system-x86_64", "-daemonize", pid=child, ppid=1)
        assert not discover.is_waiting_parent(daemon)
        assert discover.is_waiting_parent(dataclasses.replace(daemon, ppid=child))  # a parent of the same session
    finally:
        leader.kill()
        leader.wait()
        os.kill(child, signal.SIGKILL)
        leader.stdout.close()


def test_uncommitted() -> None:
    new = entry(pid=200, start_time=5000)
    started = {100: 1000, 200: 5000, 300: 9000}
    assert discover.is_uncommitted(new, {"CPR_RUN_PENDING": "1"}, started)
    assert discover.is_uncommitted(new, {"CPR_RUN": "20261120T101500-3f2a/100"}, started)
    assert not discover.is_uncommitted(new, {"CPR_RUN": "x/99"}, started), "the old one is gone"
    assert not discover.is_uncommitted(new, {"CPR_RUN": "x/300"}, started), "its pid belongs to a later QEMU"
    assert not discover.is_uncommitted(new, {"CPR_RUN": "x/200"}, started), "re-exec keeps the pid"
    assert not discover.is_uncommitted(new, {"CPR_RUN": "x/"}, started)
    assert not discover.is_uncommitted(new, {"CPR_RUN": "x"}, started)
    assert not discover.is_uncommitted(new, {}, started)
    assert not discover.is_uncommitted(new, None, started)


# -- monitors


def unix(number: int, path: str) -> Endpoint:
    return Endpoint(number=number, inode=number, family=socket.AF_UNIX, path=path, listening=True)


def tcp(number: int, host: str, port: int) -> Endpoint:
    return Endpoint(number=number, inode=number, family=socket.AF_INET, local=(host, port), listening=True)


def monitors(words: list[str], table: list[Endpoint] | None) -> dict[str, str]:
    command = cl.CommandLine.parse(["qemu", *words])
    return {m.label: str(m) for m in discover.monitor_addresses(command, table)}


def test_monitors_in_all_spellings() -> None:
    words = ["-qmp", "unix:/run/a,server=on,wait=off", "-qmp-pretty", "tcp::4444,server,nowait"]
    words += ["-chardev", "socket,id=m,fd=9,server=on,wait=off", "-mon", "m,mode=control"]
    words += ["-chardev", "socket,id=n,path=name,abstract=on,server=on,wait=off", "-mon", "n,mode=control"]
    words += ["-monitor", "unix:/run/hmp,server=on,wait=off", "-chardev", "socket,id=c,path=/run/c"]
    table = [unix(5, "/run/a"), tcp(6, ANY, 4444), unix(9, "/run/inherited"), unix(10, "@name"), unix(11, "/run/hmp")]
    assert monitors(words, table) == {
        "compat_monitor0": "/run/a",
        "compat_monitor1": "127.0.0.1:4444",
        "m": "/run/inherited",
        "n": "@name",
    }
    assert monitors(words, []) == {}, "none of them is its own"
    assert monitors(words, None) == {
        "compat_monitor0": "/run/a",
        "compat_monitor1": "127.0.0.1:4444",
        "n": "@name",
    }, "without privileges argv is believed"


def test_the_port_that_qemu_took() -> None:
    words = ["-qmp", "tcp:127.0.0.1:4444,server=on,wait=off,to=4450"]
    assert monitors(words, [tcp(5, "127.0.0.1", 4446)]) == {"compat_monitor0": "127.0.0.1:4446"}
    assert monitors(words, [tcp(5, "127.0.0.1", 4451)]) == {}


def test_monitors_that_cannot_be_used() -> None:
    table = [tcp(5, ANY, 4444), unix(6, "/run/t")]
    assert monitors(["-qmp", "telnet:127.0.0.1:4444,server=on,wait=off"], table) == {}
    assert monitors(["-qmp", "stdio"], table) == {}
    assert monitors(["-qmp", "unix:/run/t"], table) == {}, "it is the client"
    tls = ["-chardev", "socket,id=m,host=0,port=4444,server=on,wait=off,tls-creds=t", "-mon", "m,mode=control"]
    assert monitors(tls, table) == {}


# -- which one is meant


def found(pid: int, name: str = "", uuid: str = "") -> Candidate:
    return Candidate(
        process=ProcessId(pid, 1), argv=(), name=name, uuid=uuid, binary=Binary(path="/q"), monitors=()
    )


@pytest.fixture
def guests(monkeypatch: pytest.MonkeyPatch) -> None:
    known = (found(11, "web1", UUID), found(12, "web2"), found(13, "web2"), found(14, "15"), found(15), found(16))
    monkeypatch.setattr(discover, "candidates", lambda: known)


@pytest.mark.usefixtures("guests")
def test_find() -> None:
    assert discover.find("web1").process.pid == 11
    assert discover.find(UUID.upper()).process.pid == 11
    assert discover.find("16").process.pid == 16
    for ambiguous in ("web2", "15"):
        with pytest.raises(AmbiguousGuest):
            discover.find(ambiguous)
    with pytest.raises(NoSuchGuest) as raised:
        discover.find("web")
    assert raised.value.candidates == ("web1 (pid 11)", "web2 (pid 12)", "web2 (pid 13)")
    with pytest.raises(NoSuchGuest) as raised:
        discover.find("zzz")
    assert len(raised.value.candidates) == 6
    with pytest.raises(NotQemu):
        discover.find(str(os.getpid()))
    for nobody in ("", "0", "-1", "4194305", "99999999999999999999", "½"):
        with pytest.raises(NoSuchGuest):
            discover.find(nobody)


def test_config_texts_are_read_where_the_guest_sees_them(tmp_path: Path) -> None:
    path = tmp_path / "conf"
    path.write_text("[machine]\n")
    command = cl.CommandLine.parse(["qemu", "-readconfig", str(path), "-readconfig", "/no/such", "-readconfig", "/dev"])
    assert discover.config_texts(os.getpid(), command) == {str(path): "[machine]\n"}


# -- who watches


def around(**more: object) -> Surroundings:
    values: dict[str, object] = {
        "pid": 100,
        "argv": ("qemu-system-x86_64",),
        "cgroups": ("/user.slice/user-0.slice/session-1.scope",),
        "ns_pids": (100,),
        "parent": 1,
        "parent_comm": "systemd",
        "parent_ns_pids": (1,),
    }
    return Surroundings(**(values | more))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "kinds"),
    [
        (around(), []),
        (around(unit="vm.service", main_pid=100), ["systemd"]),
        (around(unit="vm.service", main_pid=99), []),
        (around(unit="vm.service", main_pid=0), []),
        (around(unit="vm.service", main_pid=None), ["systemd"]),
        (around(cgroups=("/machine.slice/machine-qemu\\x2d1\\x2dweb.scope/libvirt/emulator",)), ["libvirt"]),
        (around(cgroups=("/machine/qemu-1-web.libvirt-qemu/emulator",)), ["libvirt"]),
        (around(argv=("-object", "secret,file=/var/lib/libvirt/qemu/domain-1-web/master-key.aes")), ["libvirt"]),
        (around(argv=("qemu", "-drive", "file=/var/lib/libvirt/images/a.img")), []),
        (around(ns_pids=(5000, 1)), ["container"]),
        (around(ns_pids=(5000, 7)), []),
        (around(parent=50, parent_comm="bash", parent_ns_pids=(50,)), ["parent"]),
        (around(parent=50, parent_comm="systemd", parent_ns_pids=(50,)), []),
        (around(parent=50, parent_comm="sh", parent_ns_pids=(50, 1)), []),
        (around(parent=0, parent_comm="", parent_ns_pids=()), []),
        (around(parent=1, parent_comm="bash"), []),
    ],
)
def test_supervisors(facts: Surroundings, kinds: list[str]) -> None:
    assert [s.kind for s in supervisors.supervisors(facts)] == kinds


def test_this_process_is_watched_by_its_parent_or_nobody() -> None:
    facts = supervisors.gather(os.getpid(), ())
    assert facts.parent == os.getppid()
    assert all(s.who for s in supervisors.supervisors(facts))
