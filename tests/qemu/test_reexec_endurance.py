"""Two hundred updates in place, one after the other, beside busy CPUs: none hangs, nothing piles up unsaid."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from cpr.linux.status import read_status
from tests.qemu.conftest import Command, build, qemus_of
from tests.qemu.moving import backend, footprint, walk
from tests.qemu.rounds import rounds
from tests.qemu.test_endurance import assert_nothing_grows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.start import Lab
    from tests.qemu.moving import Footprint

ROUTE = ("7.2", "10.0", "11.1.a")
SLOWEST = 60.0
"""Seconds that an update may take beside busy CPUs; a hang would take longer."""
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
SAID = "seccomp-filters"


@pytest.fixture
def cpr(lab: Lab) -> Command:
    return Command(lab, "reexec")


@contextlib.contextmanager
def busy_cores(count: int = 2) -> Iterator[None]:
    """So many CPUs have something else to do."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
        yield


def filters(pid: int) -> int:
    return read_status(pid).seccomp_filters or 0


def updated(cpr: Command, pid: int, times: int, *words: str) -> list[tuple[dict[str, Any], Footprint, int]]:
    """Outcome, footprint and seccomp filters after each of so many updates, two rounds of the route at least."""
    found = []
    for number in range(max(times, 2 * len(ROUTE))):
        result = cpr.update(pid, build(ROUTE[(number + 1) % len(ROUTE)]), *words)
        outcome = result.guest
        assert (result.code, outcome["status"], outcome["pid_after"]) == (0, "updated", pid), f"{number + 1}: {result}"
        assert outcome["total_seconds"] < SLOWEST, f"{number + 1}: {outcome}"
        assert qemus_of(cpr.lab) == [pid]
        found.append((outcome, footprint(pid), filters(pid)))
    return found


def said(outcome: dict[str, Any]) -> bool:
    return SAID in {finding["check"] for finding in outcome["findings"]}


@pytest.mark.full
@pytest.mark.parametrize("times", [rounds(200)])
@pytest.mark.timeout(3600)
def test_beside_busy_cores(lab: Lab, cpr: Command, times: int) -> None:
    """From 7.2 to 10.0, to 11.1, and back to 7.2."""
    born = build(ROUTE[0])
    guest = lab.counting(born, backend=backend(born, lab))
    with busy_cores(os.cpu_count() or 2):
        found = updated(cpr, guest.pid, times)
    walk(guest)
    assert_nothing_grows([feet for _, feet, _ in found], len(ROUTE))
    assert {number for _, _, number in found} == {0}
    assert guest.console.hangups == 0


@pytest.mark.full
@pytest.mark.parametrize("times", [rounds(200)])
@pytest.mark.timeout(3600)
def test_in_a_sandbox(lab: Lab, cpr: Command, times: int) -> None:
    """Each QEMU adds its seccomp filters to those that are there: that is told, every time."""
    born = build(ROUTE[0])
    guest = lab.counting(born, "-sandbox", SANDBOX, backend=backend(born, lab))
    before = filters(guest.pid)
    found = updated(cpr, guest.pid, times)
    walk(guest)
    counts = [before, *(number for _, _, number in found)]
    assert counts == sorted(counts)
    told = [said(outcome) for outcome, _, _ in found]
    assert told == [number > 1 for number in counts[:-1]], "filters pile up, and it is not told"
    assert_nothing_grows([feet for _, feet, _ in found], len(ROUTE))
    assert guest.console.hangups == 0
