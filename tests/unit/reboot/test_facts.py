"""Facts for a reboot: of our own files and process, of a fake agent and of fake trees."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest

from cpr.linux.dax import storage_of
from cpr.model import Backing, BlockChain, GuestAgent, ProcessId
from cpr.qemu.answers import Answers
from cpr.reboot import facts
from tests.unit import values
from tests.unit.checks.facts import chardev, guest
from tests.unit.fake_agent import INFO, agent
from tests.unit.fake_monitor import FakeMonitor

if TYPE_CHECKING:
    from pathlib import Path

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
    path = tmp_path / "qga.sock"
    with FakeMonitor(path, agent({"guest-info": INFO})):
        assert facts.ask_agent(str(path)) == GuestAgent(path=str(path), version="10.0.2", can_suspend=True)
        assert facts.ask_agent(str(path), os.getpid()) is not None
    gone = facts.ask_agent(str(tmp_path / "gone"))
    assert gone is not None
    assert "cannot connect" in gone.error
    monkeypatch.setattr(facts, "AGENT_SECONDS", 0.2)
    with FakeMonitor(tmp_path / "deaf", agent({}, deaf_to=99)):
        deaf = facts.ask_agent(str(tmp_path / "deaf"))
    assert deaf is not None
    assert "no answer" in deaf.error
    assert facts.ask_agent("") is None


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
