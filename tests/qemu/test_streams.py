"""Clients in mid-stream are handed over again and again, and not a byte is lost: a console, an agent, a logged port.

What they say reaches devices of three kinds: a UART, which takes a few bytes, and virtio ports, which take what the
guest has room for, into its RAM. For a QEMU that is replaced in place see test_reexec_everybody.py.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from tests.lab import linux
from tests.lab.linux import LinuxLog
from tests.qemu.conftest import Command, qemus_of
from tests.qemu.parties import Wire, backend_for, connected, listens, standard, unique
from tests.qemu.rounds import rounds
from tests.qemu.streams import Asker, Echo, Lines, all_went_on, content
from tests.qemu.surveying import until
from tests.qemu.test_connections import server

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab

    Builds = Callable[[str], QemuBuild]

ROUTE = ("11.1.a", "7.2", "11.1.b", "10.0")
WINDOW = 16384
"""Bytes under way."""


@pytest.mark.parametrize("times", [1, rounds(40)])
@pytest.mark.timeout(1800)
def test_not_a_byte_is_lost(lab: Lab, builds: Builds, times: int) -> None:
    cpr, name, place = Command(lab, "handover"), unique(lab), lab.directory
    first = builds("7.2")
    words = [
        *standard(name, "192M", backend_for(first, place / "ram"), place / "console", place / "qmp"),
        *("-cpu", "max", *linux.obtain(agent=True).arguments(), *linux.agent_arguments(place / "agent")),
        *("-device", "virtio-serial-pci,id=more"),
        *("-chardev", f"{server('echo', place / 'echo')},logfile={place / 'log'}"),
        *("-device", "virtserialport,bus=more.0,chardev=echo,name=cpr.echo.socket"),
    ]
    process = lab.start([*first.command, *words], name=name)
    until(lambda: not process.alive or listens(place / "console", process.pid))
    log = LinuxLog()
    with contextlib.ExitStack() as stack:
        wire = stack.enter_context(Wire(place / "console", log))
        log.wait(lambda: log.ticks, 120, "it does not tick")
        echo = Echo(stack.enter_context(connected(place / "echo")).fileno(), WINDOW)
        agent = stack.enter_context(Asker(place / "agent"))
        lines = Lines(wire, log, interval=0.004)
        parties: tuple[Asker | Echo | Lines, ...] = (agent, echo, lines)
        with echo, lines:
            until(lambda: min(p.progress for p in parties) > 0)
            for number in range(times):
                result = cpr.update(name, builds(ROUTE[number % len(ROUTE)]))
                assert result.code == 0, str(result)
                so_far = [p.progress for p in parties]
                until(lambda: all_went_on(so_far, [p.progress for p in parties]), 30)  # noqa: B023
                assert [p.error for p in parties] == [None] * len(parties)
        lines.check()
        assert [p.error for p in parties] == [None] * len(parties)
        assert echo.received == echo.sent > 0
        assert (place / "log").read_bytes() == content(0, echo.received)
        assert len(qemus_of(lab)) == 1
    assert agent.error is None
    assert log.sound, log.problems()
