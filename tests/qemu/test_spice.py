"""Guests with SPICE: their clients have to come again after an update in place, and find the server where it was."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import pytest

from cpr.errors import Exit
from cpr.model import Status
from tests.qemu.conftest import Command
from tests.qemu.faults.fault import Fault
from tests.qemu.faults.moments import Script
from tests.qemu.faults.subject import Victim
from tests.qemu.moving import untouched
from tests.qemu.parties import Knocker, Party, Qmp, counted, free_port
from tests.qemu.spice import SpiceClient
from tests.qemu.surveying import until
from tests.qemu.test_browsers import finished_by_recover, listeners
from tests.qemu.test_reexec_midexec import copied, recovered

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab
    from tests.qemu.faults.fault import Stage

    Builds = Callable[[str], QemuBuild]

SCRIPT = Script("reexec")
full = pytest.mark.full
DEVICES = (
    *("-device", "qxl-vga", "-device", "virtio-serial-pci"),
    *("-chardev", "spicevmc,id=vdagent,name=vdagent"),
    *("-device", "virtserialport,chardev=vdagent,name=com.redhat.spice.0"),
)


@pytest.fixture
def cpr(lab: Lab) -> Command:
    return Command(lab, "reexec")


def tcp(port: int) -> tuple[str, ...]:
    return ("-spice", f"port={port},addr=127.0.0.1,disable-ticketing=on", *DEVICES)


def server(guest: Any) -> dict[str, Any]:
    """As QEMU describes it, without its clients."""
    with Qmp(guest.qmp) as monitor:
        found = monitor.execute("query-spice")
    return {key: value for key, value in found.items() if key not in ("channels", "compiled-version", "mouse-mode")}


def findings(result: Any) -> list[tuple[str, str]]:
    return [(f["check"], f["severity"]) for f in result.guest["findings"] if f["check"].startswith("spice")]


@pytest.mark.parametrize("route", ["7.2 11.1.a", pytest.param("11.1.a 11.1.b 11.1.a", marks=full)])
def test_clients_find_it_all_the_time(lab: Lab, cpr: Command, builds: Builds, route: str) -> None:
    """Who is connected hears a hang-up, and is told of before; nobody is refused, and the port is the same."""
    first, *rest = route.split()
    port = free_port()
    address = ("127.0.0.1", port)
    with counted(lab, builds(first), *tcp(port)) as guest:
        pid = guest.process.pid
        before, there = server(guest), listeners(pid, port)
        assert len(there) == 1
        for key in rest:
            with SpiceClient(address) as client:
                assert client.greeted
                with Knocker(address, pause=0.01) as other:
                    result = cpr.update(guest.name, builds(key))
                    assert (result.code, result.guest["pid_after"]) == (0, pid), str(result)
                    had = other.had
                    until(lambda: other.had > had + 5)  # noqa: B023 - at once
                assert other.missed == []
                assert ("spice", "warning") in findings(result)
                assert client.hung_up()
            with SpiceClient(address) as again:
                assert again.greeted
            assert server(guest) == before
            assert listeners(pid, port) == there
        guest.check(rounds=0)


@full
def test_at_a_path_with_a_password(lab: Lab, cpr: Command, builds: Builds) -> None:
    """QEMU removes a path and makes it anew; a password that was set over QMP is gone, and that is said before."""
    path = lab.directory / "spice"
    with counted(lab, builds("7.2"), "-spice", f"unix=on,addr={path}", *DEVICES) as guest:
        with Qmp(guest.qmp) as monitor:
            monitor.execute("set_password", protocol="spice", password="secret")  # noqa: S106
        with SpiceClient(path, "secret") as client:
            assert client.greeted
        result = cpr.update(guest.name, builds("11.1.a"))
        assert (result.code, result.guest["pid_after"]) == (0, guest.process.pid), str(result)
        assert findings(result) == [("spice-password", "warning")]
        with pytest.raises(ConnectionError, match="ticket"):
            SpiceClient(path, "secret")
        with Qmp(guest.qmp) as monitor:
            monitor.execute("set_password", protocol="spice", password="secret")  # noqa: S106
        with SpiceClient(path, "secret") as client:
            assert client.greeted
        guest.check(rounds=0)


@full
def test_another_process_cannot_have_it(lab: Lab, cpr: Command, builds: Builds) -> None:
    guest = lab.counting(builds("7.2"), *tcp(free_port()))
    with untouched(lab, guest):
        result = cpr.update(guest.pid, builds("11.1.a"), "--engine", "handover")
    assert result.code == Exit.BLOCKED, str(result)
    blockers = {f["check"]: f["hint"] for f in result.guest["findings"] if f["severity"] == "blocker"}
    assert blockers.keys() == {"spice", "chardev-not-movable"}
    assert "--engine reexec" in blockers["spice"]


@pytest.mark.parametrize("faulty", ["fails", pytest.param("dies", marks=full), pytest.param("taken", marks=full)])
def test_what_goes_wrong(lab: Lab, cpr: Command, stage: Stage, faulty: str) -> None:
    """The old QEMU, started again, listens at the port; where somebody has taken it, the guest runs without SPICE."""
    port = free_port()
    victim = Victim.start(lab, engine="reexec", everything=False, words=tcp(port))
    before = victim.before()
    fails = Fault(at=SCRIPT.at("LoadState", "done"), do="fail")
    if faulty == "taken":
        with Taker(("127.0.0.1", port)) as taker:
            outcome = victim.play(fails)
            assert taker.has_it
        assert outcome.status == Status.ROLLED_BACK, outcome
        assert any("started without its VNC or SPICE listeners" in note for note in outcome.notes), outcome
        victim.in_the_old_again(before)
        with pytest.raises(ConnectionRefusedError):
            SpiceClient(("127.0.0.1", port))
        return
    if faulty == "fails":
        outcome = victim.play(fails)
        assert outcome.status == Status.ROLLED_BACK, outcome
        victim.in_the_old_again(before)
    else:
        finished_by_recover(victim, before, cpr, stage)
    with SpiceClient(("127.0.0.1", port)) as client:
        assert client.greeted
    victim.can_be_updated()


@full
def test_everybody_is_killed(lab: Lab, cpr: Command, stage: Stage) -> None:
    """Before the new QEMU has its listener: nobody has it any more, and so it can bind the address by itself."""
    port = free_port()
    victim = Victim.start(lab, engine="reexec", everything=False, words=tcp(port))
    victim.new = copied(victim.new, lab.directory / "new")
    before = victim.before()
    result = recovered(victim, cpr, stage, 0.5)
    assert (result.code, result.guest["status"]) == (Exit.OK, "updated"), str(result)
    victim.in_the_new(before)
    with SpiceClient(("127.0.0.1", port)) as client:
        assert client.greeted
    victim.can_be_updated()


class Taker(Party):
    """Listens at an address as soon as nobody else does."""

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__()
        self.address = address
        self.has_it = False

    def work(self) -> None:
        while not self._closing.wait(0.0005):
            try:
                with socket.create_server(self.address):
                    self.has_it = True
                    self._closing.wait()
            except OSError:
                continue
