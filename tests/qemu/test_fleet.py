"""Every guest of a host in one command: none is lost, and one that cannot go does not keep the others."""

from __future__ import annotations

import subprocess
from collections import Counter
from typing import Any

import pytest

from cpr.errors import Exit
from tests.qemu import fleet

UNSHARE = ["unshare", "--pid", "--mount-proc", "--fork", "true"]
pytestmark = pytest.mark.skipif(
    subprocess.run(UNSHARE, capture_output=True, check=False).returncode != 0,
    reason="needs a process namespace of its own (root)",
)


def assert_well(found: dict[str, Any], count: int) -> None:
    """All guests are there, each once, have lost nothing, and run what the document says."""
    guests = found["document"]["guests"]
    assert len(guests) == count, found
    assert Counter(g["name"] for g in guests) == Counter(f"guest{n}" for n in range(count))
    assert found["problems"] == [[]] * count, "every guest counts on and found its whole RAM as it left it"
    assert sorted(g["pid_after"] for g in guests) == found["after"]
    for guest in guests:
        running = found["new"] if guest["status"] == "updated" else found["old"]
        assert found["binaries"][str(guest["pid_after"])] == running, guest
    blocked = f"guest{fleet.BLOCKED}"
    states = {g["name"]: g["status"] for g in guests}
    assert {name for name, status in states.items() if status == "updated"} == set(states) - {blocked}, found["said"]


@pytest.mark.timeout(300)
def test_every_guest_in_one_command() -> None:
    found = fleet.run(4, "-y", "--json")
    assert_well(found, 4)
    assert found["code"] == Exit.BLOCKED
    (blocked,) = [g for g in found["document"]["guests"] if g["status"] == "blocked"]
    assert "ram-volatile" in [f["check"] for f in blocked["findings"]]
    assert blocked["pid_after"] == blocked["pid_before"]


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("jobs", [1, 4, 20])
def test_twenty_guests_in_one_command(jobs: int) -> None:
    found = fleet.run(20, "-y", "--json", "--jobs", str(jobs), "--blocked", "skip")
    assert_well(found, 20)
    assert found["code"] == Exit.OK
    (skipped,) = [g for g in found["document"]["guests"] if g["status"] == "skipped"]
    assert skipped["name"] == f"guest{fleet.BLOCKED}"
