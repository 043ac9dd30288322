"""What is said of RAM that is copied to a disk: how much, how long, and the way there where it is not asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cpr.checks import run_host_checks
from cpr.checks.saveram import amount
from cpr.model import Backing, Finding, NextKernel, RamDirectory, Severity
from tests.unit import values
from tests.unit.checks.facts import DEVDAX, GIB, MIB, guest, host, next_kernel, said

COPY = RamDirectory(path="/srv/ram", free=100 * GIB, rate=100.0 * MIB)
COPYING = next_kernel(save_ram=COPY)
RAM = values.ram()
DAX = replace(RAM, id="dax", backing=Backing.DEVDAX, storage=DEVDAX)
HUGE = replace(RAM, id="huge", backing=Backing.HUGETLB, page_size=2 * MIB)


def of_all(check: str, **changes: object) -> list[Finding]:
    """What is said of all guests of a jump together."""
    kernel = next_kernel(save_ram=replace(COPY, **changes))  # type: ignore[arg-type]
    return [f for f in run_host_checks(host(), kernel) if f.check == check]


@pytest.mark.parametrize(
    ("blocks", "resident", "expected"),
    [
        ((RAM,), 100 * MIB, (100 * MIB, GIB)),
        ((RAM,), 9 * GIB, (GIB, GIB)),
        ((RAM,), 0, (GIB, GIB)),
        ((RAM, DAX), 100 * MIB, (100 * MIB, 2 * GIB)),
        ((HUGE,), 10 * MIB, (GIB, GIB)),
        ((DAX,), 100 * MIB, (0, 0)),
    ],
    ids=["what is touched", "never more than there is", "not to be read", "all of a guest", "huge pages", "nothing"],
)
def test_how_much_is_written(blocks: tuple[object, ...], resident: int, expected: tuple[int, int]) -> None:
    assert amount(guest(ram=blocks, resident=resident), COPYING) == expected


def test_without_a_directory_nothing_is_copied_and_the_hint_names_the_option() -> None:
    assert amount(guest(), next_kernel()) == (0, 0)
    [refused] = said("ram-volatile-over-kexec", of=guest(), mode="reboot", kexec=next_kernel())
    assert "--save-ram DIR" in refused.hint
    assert "room for 1 GiB" in refused.hint
    assert "stands still" in refused.hint
    for kind in (Backing.GUEST_MEMFD, Backing.UNKNOWN):
        for kernel in (next_kernel(), COPYING):
            of = guest(ram=(replace(RAM, backing=kind),))
            [refused] = said("ram-volatile-over-kexec", of=of, mode="reboot", kexec=kernel)
            assert "--save-ram" not in refused.hint


def test_what_it_costs_a_guest_is_said() -> None:
    [warning] = said("save-ram", of=guest(resident=512 * MIB), mode="reboot", kexec=COPYING)
    for words in ("ram0: memfd", "/srv/ram", "about 512 MiB", "at most 1 GiB", "stands still"):
        assert words in warning.message


def test_the_room_for_all_guests_together() -> None:
    [refused] = of_all("save-ram-space", free=2 * GIB, likely=GIB, most=2 * GIB)
    assert (refused.severity, refused.ignorable) == (Severity.BLOCKER, True)
    assert "2 GiB are left" in refused.message
    assert of_all("save-ram-space", free=3 * GIB, likely=GIB, most=2 * GIB) == []
    assert of_all("save-ram-space", free=0) == [], "no guest needs it"


def test_the_time_for_all_guests_together() -> None:
    [told] = of_all("save-ram-time", likely=GIB, most=10 * GIB, timeout=120.0)
    assert "1 GiB to 10 GiB of RAM are written in about 11 s to 103 s (100 MiB a second" in told.message
    assert (told.severity, "undone" in told.message) == (Severity.WARNING, False)
    [told] = of_all("save-ram-time", likely=GIB, most=20 * GIB, timeout=120.0)
    assert (told.severity, "after 2 min (--timeout) everything is undone" in told.message) == (Severity.WARNING, True)
    [refused] = of_all("save-ram-time", likely=20 * GIB, most=20 * GIB, timeout=120.0)
    assert (refused.severity, refused.ignorable) == (Severity.BLOCKER, True)
    assert "--timeout 265" in refused.hint
    assert "20 GiB of RAM are written in about 4 min (" in refused.message
    [unknown] = of_all("save-ram-time", most=GIB, rate=None, unmeasured="no space")
    assert "not estimated: no space" in unknown.message


def test_nothing_is_said_where_nobody_asked() -> None:
    kernel: NextKernel = next_kernel()
    assert run_host_checks(host(), kernel) == ()
    for check in ("save-ram", "save-ram-directory", "save-ram-space", "save-ram-time"):
        assert said(check, of=guest(), mode="reboot", kexec=kernel) == []
