"""The guest agent's client against a real agent in a real guest: asked, put to sleep, woken, asked again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from cpr.errors import CommandFailed
from cpr.model import Backing, MonitorAddress
from cpr.qemu import qmp
from cpr.qemu.agent import Agent
from cpr.qemu.answers import Answers
from cpr.reboot.facts import s3_disabled, with_reboot_facts
from tests.qemu.surveying import surveyed

if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.qemu.qmp import Monitor
    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab


LATER = 1_900_000_000.0
"""In 2030."""


@pytest.mark.parametrize("key", ["7.2", "10.0", "11.1.a"])
@pytest.mark.full
def test_a_guest_sleeps_and_wakes(lab: Lab, builds: Callable[[str], QemuBuild], key: str) -> None:
    ram = lab.directory / "ram"
    guest = lab.linux(
        builds(key),
        *("-global", "ICH9-LPC.disable_s3=0"),
        agent=True,
        backend=f"memory-backend-file,share=on,mem-path={ram}",
    )
    path = str(lab.directory / "guest.agent")
    facts = with_reboot_facts(surveyed(guest.process))
    (block,) = facts.ram
    assert block.storage is not None
    assert (block.storage.kind, block.storage.path) == (Backing.DISK_FILE, str(ram))
    assert block.storage.size == block.size
    assert facts.agent is not None
    assert (facts.agent.path, facts.agent.error, facts.agent.can_suspend) == (path, "", True)
    with qmp.connect(MonitorAddress(label="mon", path=str(guest.qmp))) as monitor:
        assert s3_disabled(Answers(monitor)) is False
        with Agent(path, timeout=30) as agent:
            info = agent.info()
            assert info.can_suspend
            before = len(guest.log.ticks)
            agent.suspend_ram()
            assert became(monitor, "suspended")
        asleep = len(guest.log.ticks)
        time.sleep(1)
        assert len(guest.log.ticks) - asleep <= 1
        monitor.execute("system_wakeup")
        assert became(monitor, "running")
        guest.log.wait(lambda: len(guest.log.ticks) > asleep + 10, 30)
        assert len(guest.log.ticks) > before
        with Agent(path, timeout=30) as agent:
            with pytest.raises(CommandFailed):  # in its own words
                agent.set_time(-1.0)
            assert abs(agent.time() - time.time()) < 60
            agent.set_time(LATER)
            assert 0 <= agent.time() - LATER < 60
            assert agent.info() == info
    assert guest.log.sound, guest.log.problems()


def became(monitor: Monitor, state: str, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if monitor.execute("query-status")["status"] == state:
            return True
        time.sleep(0.05)
    return False
