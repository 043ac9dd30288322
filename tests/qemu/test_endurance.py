"""One guest updated again and again: nothing is lost, and nothing grows."""

from __future__ import annotations

import re
import statistics
from typing import TYPE_CHECKING

import pytest

from tests.lab import qemu
from tests.qemu.conftest import BOTH_ENGINES, build, qemus_of
from tests.qemu.moving import Footprint, backend, footprint, goes_on, walk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.lab.start import Lab
    from tests.qemu.conftest import Command

pytestmark = BOTH_ENGINES

MIB = 1 << 20


def updated(lab: Lab, cpr: Command, route: Sequence[str], times: int) -> list[Footprint]:
    """Update the lab's only guest `times` times, from one of `route` to the next; its footprint after each."""
    found = []
    (pid,) = qemus_of(lab)
    for number in range(times):
        outcome = cpr.update(pid, build(route[(number + 1) % len(route)])).guest
        assert (outcome["status"], outcome["exit_code"]) == ("updated", 0), f"update {number + 1}: {outcome}"
        pid = outcome["pid_after"]
        assert qemus_of(lab) == [pid]
        found.append(footprint(pid))
    return found


def assert_nothing_grows(found: Sequence[Footprint], period: int) -> None:
    """After the first round over all QEMUs concerned every footprint is that of one period earlier."""
    for before, after in zip(found, found[period:], strict=False):
        assert numberless(after.argv) == numberless(before.argv)
        assert after.descriptors == before.descriptors
        assert comparable(after.environ) == comparable(before.environ)
    assert abs(found[-1].threads - found[period].threads) <= 8, "worker threads come and go, but not for ever"
    some = max(1, len(found) // 4)
    early, late = ([f.rss_anon for f in part] for part in (found[:some], found[-some:]))
    assert statistics.median(late) < statistics.median(early) * 1.25 + 8 * MIB, [f.rss_anon // MIB for f in found]


def numberless(argv: Sequence[str]) -> list[str]:
    """The command line without the numbers of descriptors: in place they are those that QEMU happens to have."""
    return [re.sub(r"(/proc/self/fd/|\bfd=)\d+", r"\1N", word) for word in argv]


def comparable(environ: Sequence[str]) -> list[str]:
    """The environment with what differs each time taken out: the id of the run, and numbers of descriptors."""
    without_run = (re.sub(r"^CPR_RUN=\d{8}T\d{6}-\w+/\d+$", "CPR_RUN=...", entry) for entry in environ)
    return [re.sub(r"^(CPR_FD_\w+)=\d+,\d+$", r"\1=...", entry) for entry in without_run]


@pytest.mark.full
@pytest.mark.timeout(120)
def test_six_updates_in_a_row(lab: Lab, cpr: Command) -> None:
    born = build("11.1.a")
    guest = lab.counting(born, backend=backend(born, lab))
    found = updated(lab, cpr, ("11.1.a", "11.1.b"), 6)
    walk(guest)
    assert_nothing_grows(found, 2)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_hundred_updates_in_a_row(lab: Lab, cpr: Command) -> None:
    """From 7.2 to 10.0, two builds of 11.1, and around again."""
    born = build("7.2")
    guest = lab.counting(born, backend=backend(born, lab))
    found = updated(lab, cpr, tuple(qemu.SUITES), 100)
    walk(guest)
    assert_nothing_grows(found, len(qemu.SUITES))


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_hundred_updates_of_linux_with_a_disk(lab: Lab, cpr: Command) -> None:
    born = build("7.2")
    image = lab.directory / "disk.raw"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    drive = f"file={image},format=raw,if=virtio,cache=none"
    guest = lab.linux(born, "-smp", "2", "-drive", drive, words=["cpr.busy"], backend=backend(born, lab))
    guest.log.wait(lambda: guest.log.disk_ok >= 0 and len(guest.log.cpus) == 2, 60)
    found = updated(lab, cpr, tuple(qemu.SUITES), 100)
    goes_on(guest)
    assert_nothing_grows(found, len(qemu.SUITES))
