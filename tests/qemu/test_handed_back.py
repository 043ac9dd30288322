"""What a new QEMU cannot inherit is opened again after every update: forwarded ports, the gdb stub."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cpr.model import MonitorAddress
from cpr.qemu import qmp
from tests.qemu.conftest import build
from tests.qemu.moving import backend
from tests.qemu.parties import connected, free_port

if TYPE_CHECKING:
    from tests.lab.start import Lab
    from tests.qemu.conftest import Command


@pytest.mark.full
@pytest.mark.parametrize("over", ["tcp", "unix"])
def test_ports_and_the_gdb_stub_survive_several_updates(lab: Lab, cpr: Command, over: str) -> None:
    """Also the ports that were forwarded while the guest ran; not those that were taken back."""
    forwarded, late, gone = (free_port() for _ in range(3))
    stub = ("127.0.0.1", free_port()) if over == "tcp" else lab.directory / "gdb"
    gdb = f"tcp:127.0.0.1:{stub[1]}" if isinstance(stub, tuple) else f"unix:{stub},server=on,wait=off"
    network = f"user,id=u0,hostfwd=tcp:127.0.0.1:{forwarded}-:22,hostfwd=tcp:127.0.0.1:{gone}-:23"
    born = build("7.2")
    guest = lab.counting(
        born,
        *("-netdev", network, "-device", "virtio-net-pci,netdev=u0,romfile=", "-gdb", gdb),
        backend=backend(born, lab),
    )
    with qmp.connect(MonitorAddress(label="test", path=str(guest.qmp))) as monitor:
        for command in (f"hostfwd_add u0 tcp:127.0.0.1:{late}-:80", f"hostfwd_remove u0 tcp:127.0.0.1:{gone}"):
            monitor.execute("human-monitor-command", command_line=command)
    pid = guest.pid
    for target in ("11.1.a", "11.1.b", "11.1.a"):
        outcome = cpr.update(pid, build(target)).guest
        assert outcome["status"] == "updated", outcome
        pid = outcome["pid_after"]
        for port in (forwarded, late):
            connected(("127.0.0.1", port)).close()
        with pytest.raises(ConnectionRefusedError):
            connected(("127.0.0.1", gone)).close()
        with connected(stub) as debugger:
            debugger.sendall(b"+$qSupported#37")
            assert debugger.recv(1) == b"+"
            debugger.sendall(b"$D#44")  # detach: the guest goes on
    guest.log.wait_ticks(5)
    assert guest.log.sound, guest.log.problems()
