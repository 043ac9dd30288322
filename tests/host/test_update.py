"""`cpr update --restart` in the host VM: nested KVM, from QEMU to QEMU, and what the guest and its users saw of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.host import jumps

if TYPE_CHECKING:
    from tests.host.conftest import Hosts
    from tests.host.vm import Host

CLOCK_SLACK = 0.25
"""How late lines of the guest may come, in seconds, by which its clock is judged: everything is emulated."""
PAIRS = [("7.2", "11.1.a", False), ("11.1.a", "11.1.b", True)]
TIMES = 5
"""Of each guest: ten of each pair and size."""
BESIDE = 10


def judge(round_: dict[str, Any]) -> None:
    """Assert that a guest was moved and that nobody lost anything."""
    told = json.dumps(round_, indent=1)
    assert round_["status"] == "updated", told
    assert round_["code"] == 0, told
    assert round_["problems"] == [], told
    if round_["clock"] is not None:
        # QEMU stops the guest's clock with its vCPUs, so it falls behind by the time it stood still, and by nothing
        # else: from before STOP to behind RESUME, and no longer than somebody outside heard nothing
        assert round_["blackout"] - 2 * CLOCK_SLACK <= round_["clock"] <= round_["silence"] + CLOCK_SLACK, told


def line(what: str, document: dict[str, Any]) -> str:
    """A line of the blackout table."""
    rounds = document["rounds"]
    blackouts = sorted(round_["blackout"] * 1000 for round_ in rounds)
    clocks = [abs(round_["clock"]) * 1000 for round_ in rounds if round_["clock"] is not None]
    middle = blackouts[len(blackouts) // 2]
    clock = f", clock off by at most {max(clocks):.0f} ms" if clocks else ""
    start = max(document["starts"])
    versions = " -> ".join(document["versions"])
    return (
        f"{what}: {versions}, {len(rounds)} times: blackout {blackouts[0]:.0f} / {middle:.0f} / {blackouts[-1]:.0f} ms "
        f"(least, median, most){clock}; guest up in {start:.1f} s at most"
    )


@pytest.mark.timeout(900)
def test_smoke(hosts: Hosts) -> None:
    host = hosts.get(jumps.SMOKE)  # the one that test_kexec.py has left
    document = host.inside("moves", "7.2", "11.1.a", "--memory", "128M", seconds=400)
    hosts.silences += document["silences"]
    for round_ in document["rounds"]:
        judge(round_)
    hosts.lines.append(line("nested KVM, counting guest, 128M", document))


@pytest.mark.hostfull
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("memory", ["256M", "1G"])
@pytest.mark.parametrize("guest", ["counting", "linux"])
@pytest.mark.parametrize(("old", "new", "back"), PAIRS, ids=str)
def test_ten_times(host: Host, hosts: Hosts, old: str, new: str, back: bool, guest: str, memory: str) -> None:
    words = ["--guest", guest, "--memory", memory, "--rounds", TIMES, "--engine", "handover"]
    words += ["--back"] if back else []
    document = host.inside("moves", old, new, *words, seconds=1700)
    hosts.lines.append(line(f"nested KVM, {guest} guest, {memory}", document))
    hosts.silences += document["silences"]
    assert len(document["rounds"]) == TIMES
    for round_ in document["rounds"]:
        judge(round_)


@pytest.mark.hostfull
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("old", "new"), [("11.1.a", "11.1.b"), ("7.2", "11.1.a")], ids=str)
def test_twenty_times_in_place(host: Host, hosts: Hosts, old: str, new: str) -> None:
    """Two vCPUs, whose threads are in KVM_RUN when they are stopped."""
    words = ["--guest", "linux", "--cpus", 2, "--rounds", 20, "--back", "--engine", "reexec"]
    document = host.inside("moves", old, new, *words, seconds=3500)
    hosts.lines.append(line("nested KVM, linux guest, 2 vCPUs, 256M, re-exec", document))
    hosts.silences += document["silences"]
    assert len(document["rounds"]) == 20
    for round_ in document["rounds"]:
        judge(round_)
        assert round_["same process"], json.dumps(round_)


@pytest.mark.hostfull
@pytest.mark.timeout(600)
@pytest.mark.parametrize("memory", ["256M", "1G"])
@pytest.mark.parametrize(("old", "new", "back"), PAIRS, ids=str)
def test_beside_tcg(hosts: Hosts, old: str, new: str, back: bool, memory: str) -> None:
    """The same on this machine, under TCG, for the table."""
    hosts.end()  # it would take a processor
    words = ["--accel", "tcg", "--memory", memory, "--rounds", str(BESIDE), *(["--back"] if back else [])]
    command = [sys.executable, "-m", "tests.host.inside.moves", old, new, *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, env=os.environ)
    document = json.loads(done.stdout)
    hosts.lines.append(line(f"TCG on this machine, counting guest, {memory}", document))
    for round_ in document["rounds"]:
        judge(round_)
