"""What is said of a restored guest's clock, by what a fake agent answers."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cpr.reboot.restoring import set_time
from tests.unit.fake_agent import agent
from tests.unit.fake_monitor import FakeMonitor
from tests.unit.reboot.saved import guest

if TYPE_CHECKING:
    from pathlib import Path

SET, GET = "guest-set-time", "guest-get-time"


@pytest.mark.parametrize(
    ("behind", "answers", "words"),
    [
        (0, {SET: {}}, "its clock was set by the guest agent"),
        (1, {}, "set by the guest agent, but not its hardware clock"),
        (60, {}, "could not be set: guest-set-time"),
        (0, {GET: "soon"}, "could not be set"),
    ],
)
def test_how_it_was_set(tmp_path: Path, behind: float, answers: dict[str, Any], words: str) -> None:
    path = tmp_path / "qga"
    now = int((time.time() - behind) * 1e9)
    with FakeMonitor(path, agent({GET: now, **answers})):
        (said,) = set_time(replace(guest(), agent=str(path)), os.getpid())
    assert words in said


def test_without_an_agent(tmp_path: Path) -> None:
    (said,) = set_time(replace(guest(), agent=""), os.getpid())
    assert "has no guest agent" in said
    (said,) = set_time(replace(guest(), agent=str(tmp_path / "gone")), os.getpid())
    assert "could not be set" in said
