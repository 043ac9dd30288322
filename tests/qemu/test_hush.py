"""A client that is hushed has nothing to say, also to a QEMU that was about to read what it said before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cpr.engines import hush
from cpr.linux import fds
from cpr.model import MonitorAddress
from cpr.qemu import clients, qmp
from tests.qemu.surveying import KEYS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab

    Builds = Callable[[str], QemuBuild]


@pytest.mark.parametrize("key", KEYS)
def test_a_read_of_silence_does_not_wait(lab: Lab, builds: Builds, key: str) -> None:
    guest = lab.counting(builds(key))
    with qmp.connect(MonitorAddress(label="", path=str(guest.qmp))) as monitor:
        before = clients.descriptor_targets(guest.pid).keys()
        hush.give_silence(lambda number: monitor.send_fd("silent", number))
        (number,) = clients.descriptor_targets(guest.pid).keys() - before
        with fds.take_fd(guest.pid, number) as fd, clients.socket_of(fd) as silent:
            with pytest.raises(BlockingIOError):
                silent.recv(1)
