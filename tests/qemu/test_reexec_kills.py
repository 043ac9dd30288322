"""cpr, or the helper of it that traces the guest, is SIGKILLed at random moments of updates in a row.

`CPR_TEST_ROUNDS` says how often in the long ones, `CPR_TEST_SEED` repeats one. The table at the end is the result.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from cpr.model import Status
from tests.qemu.faults.kills import BROUGHT_BACK, CPR, TRACER, UNDONE, UPDATED, Campaign
from tests.qemu.rounds import FEW, rounds, seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.lab.start import Lab

TOLD: dict[str, set[str]] = {
    UPDATED: {Status.UPDATED},
    UNDONE: {Status.ROLLED_BACK, Status.FAILED, ""},
    BROUGHT_BACK: {Status.ROLLED_BACK},
}
"""What cpr may have said of a guest that is where it is."""


@pytest.mark.parametrize(
    "kinds", [pytest.param(CPR, id="cpr"), pytest.param(TRACER, id="tracer", marks=pytest.mark.full)]
)
@pytest.mark.parametrize("times", [FEW, rounds(500)])
@pytest.mark.timeout(7200)
def test_killed_at_random_moments(
    lab: Lab, capsys: pytest.CaptureFixture[str], kinds: Sequence[str], times: int
) -> None:
    number = seed()
    began = time.monotonic()
    with Campaign(lab, number) as campaign:
        campaign.calibrate()
        while len(campaign.rounds) < times:
            campaign.round(kinds[len(campaign.rounds) % len(kinds)])
        with capsys.disabled():
            spent = time.monotonic() - began
            print(f"\n{times} kills, CPR_TEST_SEED={number}, {spent:.0f} s with {os.cpu_count()} CPUs")
            print(campaign.table())
        assert campaign.lost == []
        wrong = [r for r in campaign.rounds if r.told not in TOLD[r.became]]
        assert wrong == [], "cpr told something else than what became of the guest"
        campaign.close()
        campaign.victim.can_be_updated()
        campaign.victim.closed()
