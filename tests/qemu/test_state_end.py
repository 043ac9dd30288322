"""A real QEMU stands still where its state is complete: it reads nothing of what its client says."""

from __future__ import annotations

import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from cpr.engines.crossing import Crossing, narrow
from cpr.linux.streams import unsent
from cpr.model import MonitorAddress
from cpr.qemu import migration, qmp
from cpr.qemu.state_end import WORDLESS
from tests.qemu.parties import connected
from tests.qemu.surveying import KEYS, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab

    Builds = Callable[[str], QemuBuild]

PATIENCE = 0.1
"""Seconds in which a QEMU that can reads what was said."""


@pytest.mark.parametrize("key", KEYS)
def test_what_is_said_after_the_state_is_complete_stays_in_the_socket(lab: Lab, builds: Builds, key: str) -> None:
    said = lab.directory / "said"
    guest = lab.counting(
        builds(key),
        *("-chardev", f"socket,id=said,path={said},server=on,wait=off"),
        *("-device", "isa-serial,chardev=said"),
        backend=f"memory-backend-file,share=on,mem-path={lab.directory}/ram",
    )
    old, source = socket.socketpair()
    new, sink = socket.socketpair()
    heard: list[tuple[bool, int]] = []
    with connected(said) as client, qmp.connect(MonitorAddress(label="", path=str(guest.qmp))) as monitor, new:

        def stop() -> None:
            client.sendall(b"x")
            all_of_it = unsent(client)
            time.sleep(PATIENCE)
            heard.append((all_of_it > 0, all_of_it - unsent(client)))

        with old:
            narrow(old)
            monitor.send_fd("state", old.fileno())
        migration.prepare(monitor, migration.ONE_WAY)
        passed = bytearray()

        def read() -> None:
            while data := new.recv(1 << 16):
                passed.extend(data)

        reader = threading.Thread(target=read)
        reader.start()
        crossing = Crossing(source, sink, stop)
        monitor.execute("migrate", uri="fd:state")
        until(lambda: heard or not reader.is_alive())
        crossing.hang_up()  # its words are read by nobody, and it goes on
        reader.join()
        assert heard == [(True, 0)], "QEMU had read it at once, or read it meanwhile"
        assert passed.endswith(WORDLESS)
        until(lambda: unsent(client) == 0)
        until(lambda: monitor.execute("query-status")["status"] == "running")
    guest.log.wait_ticks(20)
    assert guest.log.sound, guest.log.problems()
