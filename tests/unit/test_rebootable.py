"""What stands in the way of a jump, in a fake world: the host asked once, every guest, and who would be lost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cpr import app
from cpr.errors import Exit, NotFound, UsageError
from cpr.model import Backing, RamDirectory, Storage
from tests.unit import values
from tests.unit.checks import facts
from tests.unit.fake_world import FakeHost

VOLATILE = (replace(values.ram(), shared=False, backing=Backing.ANONYMOUS),)
ON_DISK = Storage(kind=Backing.DISK_FILE, path="/vm/ram", filesystem="ext4", disks=("sda",))
SAVABLE = (replace(values.ram(), backing=Backing.DISK_FILE, storage=ON_DISK),)


def test_a_jump_asks_the_host_once_and_every_guest() -> None:
    host = FakeHost(kernel=facts.next_kernel(restores_by_itself=False))
    host.add("disk", ram=SAVABLE)
    host.add("plain", ram=VOLATILE)
    found = app.check_kexec([], app.Choices(), app.Jump(), world=host.world())
    assert [f.check for f in found.host] == ["restore-not-enabled"]
    first, second = found.guests
    assert (first.error, [f.check for f in first.findings]) == (None, ["ram-on-disk"])
    assert [f.check for f in second.blockers] == ["ram-volatile-over-kexec"]
    assert (found.possible, app.worst(found.exit_codes)) == (False, Exit.BLOCKED)
    assert host.rehearsed == ["disk", "plain"]
    assert host.kernels[-1] == {
        "state_directory": "/var/lib/cpr", "image": "", "initrd": "", "append": "", "reuse": True, "unsaved": (),
        "save_ram": "", "timeout": 120.0,
    }  # fmt: skip


def test_a_guest_that_nobody_saves_stands_in_the_way() -> None:
    host = FakeHost()
    host.add("disk", ram=SAVABLE)
    host.add("plain", ram=VOLATILE)
    found = app.check_kexec(["disk"], app.Choices(), app.Jump(), world=host.world())
    assert [(f.check, f.subject) for f in found.host] == [("guest-not-saved", "plain (pid 4243)")]
    assert not found.possible
    for names in (["disk"], []):
        found = app.check_kexec(names, app.Choices(), app.Jump(abandon=("plain",)), world=host.world())
        assert (found.possible, [e.label for e in found.guests]) == (True, ["disk"])
        assert [c.name for c in found.abandoned] == ["plain"]
    with pytest.raises(UsageError, match="both"):
        app.check_kexec(["disk"], app.Choices(), app.Jump(abandon=("disk",)), world=host.world())
    with pytest.raises(NotFound):
        app.check_kexec([], app.Choices(), app.Jump(abandon=("nobody",)), world=host.world())


def test_what_of_a_jump_can_be_ignored() -> None:
    host = FakeHost(kernel=facts.next_kernel(restores_by_itself=False))
    host.add("disk", ram=SAVABLE)
    found = app.check_kexec([], app.Choices(ignore=("restore-not-enabled",)), app.Jump(), world=host.world())
    assert found.possible
    assert "(ignored as asked)" in found.host[0].message
    host.kernel = facts.next_kernel(obstacles=("lockdown",))
    with pytest.raises(UsageError, match="cannot be ignored"):
        app.check_kexec([], app.Choices(ignore=("kexec-impossible",)), app.Jump(), world=host.world())


def test_the_next_command_line() -> None:
    host = FakeHost()
    for jump, reuse in (
        (app.Jump(append="ro"), False),
        (app.Jump(append="quiet", reuse=True), True),
        (app.Jump(kernel="/k", initrd="/i", reuse=True), True),
    ):
        app.check_kexec([], app.Choices(), jump, world=host.world())
        asked = host.kernels[-1]
        assert (asked["image"], asked["initrd"], asked["append"]) == (jump.kernel, jump.initrd, jump.append)
        assert asked["reuse"] is reuse


def test_ram_that_is_copied_is_counted_over_all_guests() -> None:
    """The directory has room for each of them, and not for both; the guest whose RAM is kept writes nothing."""
    copy = RamDirectory(path="/srv/ram", free=3 << 29, rate=1e9)
    host = FakeHost(kernel=facts.next_kernel(save_ram=copy))
    host.add("disk", ram=SAVABLE)
    host.add("one", ram=VOLATILE, resident=1 << 28)
    jump = app.Jump(save_ram="/srv/ram")
    found = app.check_kexec([], app.Choices(timeout=60), jump, world=host.world())
    assert (host.kernels[-1]["save_ram"], host.kernels[-1]["timeout"]) == ("/srv/ram", 60)
    assert found.possible
    assert [f.check for f in found.host] == ["save-ram-time"]
    assert "256 MiB to 1 GiB of RAM are written" in found.host[0].message
    assert [[f.check for f in e.findings] for e in found.guests] == [["ram-on-disk"], ["save-ram"]]
    host.add("other", ram=VOLATILE)
    found = app.check_kexec([], app.Choices(), jump, world=host.world())
    assert not found.possible
    assert [f.check for f in found.host] == ["save-ram-space", "save-ram-time"]
    found = app.check_kexec([], app.Choices(ignore=("save-ram-space",)), jump, world=host.world())
    assert found.possible
