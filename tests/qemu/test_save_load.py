"""`cpr save` and `cpr load`: a guest goes to a file and comes back, its RAM staying where it is."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.qemu.saving import DISK, Subject, shared_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab
    from tests.qemu.conftest import Command

    Builds = Callable[[str], QemuBuild]

full = pytest.mark.full


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("7.2", "11.1.a"),
        pytest.param("7.2", "7.2", marks=full),
        pytest.param("7.2", "10.0", marks=full),
        ("10.0", "10.0"),
        pytest.param("11.1.a", "11.1.a", marks=full),
    ],
)
def test_a_guest_goes_on(lab: Lab, cpr: Command, builds: Builds, old: str, new: str) -> None:
    subject = Subject.start(lab, cpr, builds(old))
    before = subject.guest.log.number
    document = subject.saved("--qemu", builds(new).binary)
    assert document["status"] == "saved"
    assert document["state_bytes"] < 4 << 20, "RAM is in it"
    assert stat.S_IMODE(subject.file.stat().st_mode) == 0o600
    outcome = subject.loaded()
    assert outcome["status"] == "updated"
    assert outcome["runstate"] == "running"
    assert outcome["binary_after"]["path"] == str(builds(new).binary)
    assert os.readlink(f"/proc/{subject.pid}/exe") == str(builds(new).binary)
    assert 0 < outcome["blackout_seconds"] < 60
    subject.counts_on(before)
    assert subject.result() == "restored"
    assert not subject.file.exists(), "a state that is void was left"


def test_ram_in_shared_memory_and_a_paused_guest(lab: Lab, cpr: Command, builds: Builds) -> None:
    with shared_memory(lab) as directory:
        subject = Subject.start(lab, cpr, builds("10.0"), ram=directory / "ram")
        subject.stop()
        before = subject.guest.log.number
        subject.saved()
        outcome = subject.loaded()
        assert outcome["runstate"] == "paused"
        assert outcome["blackout_seconds"] is None
        assert subject.status() == "paused"
        subject.cont()
        subject.counts_on(before)
