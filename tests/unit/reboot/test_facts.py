"""Facts for a reboot: of our own files and process, of a fake agent and of fake trees."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest

from cpr.linux import kexec, tun
from cpr.linux.dax import storage_of
from cpr.model import Backing, BlockChain, GuestAgent, OpenFile, ProcessId
from cpr.qemu.answers import Answers
from cpr.reboot import facts
from tests.unit import values
from tests.unit.checks.facts import chardev, guest
from tests.unit.fake_agent import INFO, agent
from tests.unit.fake_monitor import FakeMonitor

if TYPE_CHECKING:
    from pathlib import Path

    from cpr.model import Guest

PORT = ("-device", "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0,id=p0")


def test_where_the_agent_listens() -> None:
    port = chardev("qga0", filename="disconnected:unix:/run/a,b.qga,server=on")
    other = chardev("serial0")
    assert facts.agent_socket(guest(*PORT, chardevs=(other, port))) == "/run/a,b.qga"
    busy = replace(port, filename="unix:/run/qga,server=on", connected=True)
    assert facts.agent_socket(guest(*PORT, chardevs=(busy,))) == "/run/qga"
    assert facts.agent_socket(guest(chardevs=(port,))) == "", "no port leads to it"
    assert facts.agent_socket(guest(*PORT, chardevs=(replace(port, filename="pty:/dev/pts/3"),))) == ""
    assert facts.agent_socket(guest("-no-such-option", *PORT, chardevs=(port,))) == ""


def test_what_the_agent_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(path: Path, **changes: Any) -> Guest:
        port = chardev("qga0", filename=f"disconnected:unix:{path},server=on", **changes)
        return guest(*PORT, chardevs=(port,), process=ProcessId(os.getpid(), 1))

    path = tmp_path / "qga.sock"
    with FakeMonitor(path, agent({"guest-info": INFO})):
        assert facts.ask_agent(of(path)) == GuestAgent(path=str(path), version="10.0.2", can_suspend=True)
        idle = facts.ask_agent(of(path, frontend_open=False))
        assert idle is not None
        assert "no program in the guest has opened its port" in idle.error
    gone = facts.ask_agent(of(tmp_path / "gone"))
    assert gone is not None
    assert "cannot connect" in gone.error
    monkeypatch.setattr(facts, "AGENT_SECONDS", 0.2)
    with FakeMonitor(tmp_path / "deaf", agent({}, deaf_to=99)):
        deaf = facts.ask_agent(of(tmp_path / "deaf"))
    assert deaf is not None
    assert "no answer" in deaf.error
    assert facts.ask_agent(guest()) is None


def test_storage_of_ram_goes_by_descriptor(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(b"x")
    fd = os.memfd_create("ram")
    try:
        chain = BlockChain(device="d", node="n", files=(str(image), "nbd://h/x", "/gone"), read_only=False)
        of = guest(
            process=ProcessId(os.getpid(), 1),
            ram=(replace(values.ram("a"), fd=fd), replace(values.ram("b"), fd=None), replace(values.ram("c"), fd=9999)),
            chains=(chain, chain),
        )
        found = facts.with_reboot_facts(of)
    finally:
        os.close(fd)
    first, second, third = found.ram
    assert first.storage is not None
    assert first.storage.kind is Backing.MEMFD
    assert (second.storage, third.storage) == (None, None)
    assert [(s.path, s.size) for s in found.disks] == [(str(image), 1)]
    assert found.agent is None


class FakeAnswers:
    """QOM of a machine with one property."""

    def __init__(self, kind: str, value: Any) -> None:
        self.kind, self.value = kind, value

    def children(self, path: str) -> tuple[tuple[str, str], ...]:
        assert path == "/machine/unattached"
        return (("device[0]", "qemu64-x86_64-cpu"), ("device[7]", self.kind))

    def qom_get(self, path: str, name: str, parse: Any, default: Any) -> Any:
        assert (path, name) == ("/machine/unattached/device[7]", "disable_s3")
        return default if self.value is None else parse(self.value)


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [("ICH9-LPC", 1, True), ("ICH9-LPC", 0, False), ("PIIX4_PM", True, True), ("PIIX4_PM", None, None), ("x", 1, None)],
)
def test_s3(kind: str, value: Any, expected: bool | None) -> None:
    assert facts.s3_disabled(cast("Answers", FakeAnswers(kind, value))) is expected


@pytest.fixture
def root(tmp_path: Path) -> str:
    for name, text in {
        "boot/vmlinuz-6.12.8": "", "boot/initrd.img-6.12.8": "", "boot/vmlinuz-7.2.1": "", "boot/initrd.img-7.2.1": "",
        "proc/cmdline": "BOOT_IMAGE=/vmlinuz ro memmap=1G!4G\n", "proc/sys/kernel/kexec_load_disabled": "1\n",
    }.items():  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(tmp_path)


def test_the_next_kernel(root: str) -> None:
    newest = facts.next_kernel(root=root, state_directory=root + "/var/lib/cpr", append="quiet", unsaved=["db1"])
    assert (newest.release, newest.image, newest.initrd) == (
        "7.2.1", f"{root}/boot/vmlinuz-7.2.1", f"{root}/boot/initrd.img-7.2.1",
    )  # fmt: skip
    assert newest.command_line == "ro memmap=1G!4G quiet"
    assert (newest.missing, newest.unsaved, newest.live_update) == ((), ("db1",), False)
    assert "kexec_load_disabled" in newest.obstacles[0]
    assert newest.state_directory_free


def test_a_named_kernel(root: str, tmp_path: Path) -> None:
    older = facts.next_kernel(root=root, image=f"{root}/boot/vmlinuz-6.12.8", state_directory=root)
    assert (older.release, os.path.basename(older.initrd)) == ("6.12.8", "initrd.img-6.12.8")
    own = facts.next_kernel(root=root, image="/nowhere", initrd="/gone", append="x", reuse=False, state_directory=root)
    assert (own.release, own.missing, own.command_line) == ("", ("/nowhere", "/gone"), "x")
    bare = tmp_path / "bare"
    (bare / "proc").mkdir(parents=True)
    (bare / "proc/cmdline").write_text("ro")
    assert facts.next_kernel(root=str(bare), state_directory=root).image == ""


def test_state_on_tmpfs_is_said(root: str) -> None:
    if storage_of("/dev/shm").kind is not Backing.TMPFS:
        pytest.skip("/dev/shm is no tmpfs here")
    assert "RAM of this kernel" in facts.next_kernel(root=root, state_directory="/dev/shm/x").state_directory_volatile


def test_ram_whose_file_was_deleted_or_replaced(tmp_path: Path) -> None:
    """The descriptor is the RAM; but after the boot there is nothing but the path."""
    file = tmp_path / "ram"
    for change in ("kept", "deleted", "replaced"):
        file.write_bytes(b"x")
        fd = os.open(file, os.O_RDWR)
        try:
            if change != "kept":
                file.unlink()
            if change == "replaced":
                file.write_bytes(b"x")
            storage = facts.ram_storage(os.getpid(), replace(values.ram(), fd=fd))
        finally:
            os.close(fd)
        assert storage is not None
        assert storage.path == str(file)
        assert ("was deleted or leads elsewhere" in storage.volatile) is (change != "kept"), change


def test_namespaces_that_are_not_ours() -> None:
    ours = {name: os.stat(f"/proc/self/ns/{name}").st_ino for name in ("mnt", "net", "pid_for_children")}
    with_us = guest(namespaces=tuple(ours.items()))
    assert facts.own_namespaces(with_us) == ()
    elsewhere = guest(namespaces=(("mnt", ours["mnt"]), ("net", 7), ("pid_for_children", 8), ("newer", 9)))
    assert facts.own_namespaces(elsewhere) == ("net",)


def test_the_other_end_of_a_connection(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(path))
        server.listen()
        client.connect(str(path))
        inode = os.fstat(client.fileno()).st_ino
        entry = OpenFile(number=client.fileno(), target=f"socket:[{inode}]", kind="socket", owner="", inode=inode)
        made = chardev("tpm", server=False, listener=None, client=client.fileno(), filename="unix:")
        known = guest(process=ProcessId(os.getpid(), 1), open_files=(entry,))
        with server.accept()[0]:
            assert facts.peer_of(known, made) == str(path)
        assert facts.peer_of(known, replace(made, client=None)) == ""
        assert facts.peer_of(known, chardev("served")) == "", "whoever is connected to us is nobody whom we dial"
    tcp = replace(made, filename="tcp:127.0.0.1:5 <-> 10.0.0.1:99")
    assert facts.peer_of(known, tcp) == "10.0.0.1:99"


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake systemctl, first on the path: it says what `said` has, and exits 1 where there is nothing."""
    program = tmp_path / "systemctl"
    program.write_text(f'#!/bin/sh\ncat "{tmp_path}/said" 2>/dev/null\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "said"


@pytest.mark.parametrize(
    ("state", "condition", "expected"),
    [
        ("enabled", "", True),
        ("static", "", True),
        ("enabled", "{ path=/usr/bin/cpr ; argv[]=cpr may-start --unit web1.service ; ignore_errors=no }", False),
        ("enabled", "{ path=/bin/true ; argv[]=true }", True),
        ("disabled", "", False),
        ("masked", "", False),
        ("transient", "", False),
        ("", "", False),
    ],
)
def test_services_that_would_start_again(systemctl: Path, state: str, condition: str, expected: bool) -> None:
    systemctl.write_text(f"UnitFileState={state}\nExecCondition={condition}\n")
    assert facts.unguarded("web1.service") is expected


@pytest.mark.parametrize(
    ("booted", "state", "expected"),
    [(True, "enabled", True), (True, "static", False), (True, "", False), (False, "enabled", False)],
)
def test_whether_guests_are_restored_by_themselves(
    systemctl: Path, monkeypatch: pytest.MonkeyPatch, booted: bool, state: str, expected: bool
) -> None:
    """By a systemd that runs: a systemctl that is only there reads the same files."""
    monkeypatch.setattr(kexec, "systemd_runs", lambda: booted)
    if state:
        systemctl.write_text(f"{state}\n")
    assert facts.restores_by_itself() is expected


def test_nothing_restores_without_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not facts.restores_by_itself()
    assert not facts.unguarded("web1.service")


@pytest.mark.parametrize(("flags", "expected"), [("0x1802\n", True), ("0x1002\n", False), ("x", False), (None, False)])
def test_taps_that_stay(tmp_path: Path, flags: str | None, expected: bool) -> None:
    if flags is not None:
        (tmp_path / "sys/class/net/tap0").mkdir(parents=True)
        (tmp_path / "sys/class/net/tap0/tun_flags").write_text(flags)
    assert tun.persistent("tap0", root=str(tmp_path)) is expected
