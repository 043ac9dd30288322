"""A guest as a systemd unit: handover would end the unit and is refused; re-exec keeps it as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.host import guests, jumps
from tests.lab import qemu

if TYPE_CHECKING:
    from tests.host.vm import Host

pytestmark = pytest.mark.hostfull


@pytest.mark.timeout(900)
def test_handover_of_a_unit_is_refused_and_the_guest_untouched(systemd_host: Host) -> None:
    host = systemd_host
    guest = guests.start(host, "7.2", name="unit1", unit=True)
    try:
        before = guest.properties()
        words = ("update", "--restart", "unit1", "--engine", "handover", "-y", "--json")
        said = host.cpr(*words, "--qemu", qemu.obtain("11.1.a").binary)
        assert said.code == 3, said
        (answer,) = said.json["guests"]
        assert "supervised" in [finding["check"] for finding in answer["findings"]], said
        assert guest.properties() == before
        assert host.sh("systemctl is-active unit1.service").strip() == "active"
        assert int(host.sh("systemctl show -P MainPID unit1.service")) == guest.pid
        log = guest.goes_on()
        assert log.sound, log.problems()
    finally:
        host.run("systemctl stop unit1.service")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("route", [("7.2", "11.1.a"), ("11.1.a", "11.1.b", "11.1.a")], ids="-".join)
def test_unit_goes_over_in_place(systemd_host: Host, route: tuple[str, ...]) -> None:
    """The engine is chosen by itself; to systemd nothing has happened."""
    host = systemd_host
    guest = guests.start(host, route[0], name="unit2", unit=True)
    state = "systemctl show -p MainPID,ActiveState,SubState,NRestarts,ExecMainStartTimestamp unit2.service"
    try:
        before, known = guest.properties(), host.sh(state)
        for key in route[1:]:
            said = host.cpr("update", "--restart", "unit2", "--qemu", qemu.obtain(key).binary, "-y", "--json")
            assert said.code == 0, said
            (answer,) = said.json["guests"]
            assert (answer["engine"], answer["pid_after"]) == ("reexec", guest.pid)
            assert guest.properties() == before
            assert host.sh(state) == known
            assert host.sh(f"readlink /proc/{guest.pid}/exe").strip() == str(qemu.obtain(key).binary)
        log = guest.goes_on()
        assert log.sound, log.problems()
    finally:
        host.run("systemctl stop unit2.service")


KILLS = """
import os, sys, time
path, new = f"/proc/{sys.argv[1]}/exe", sys.argv[2]
while os.readlink(path) != new:
    time.sleep(0.001)
os.kill(int(sys.argv[1]), 9)
"""
"""As soon as it is the new program, which has not run anything of the guest yet."""


@pytest.mark.timeout(900)
def test_unit_whose_guest_was_brought_back_is_not_started_beside_it(systemd_host: Host) -> None:
    """The way back is another process: the unit has ended, and Restart= would start a second QEMU over the disk."""
    host = systemd_host
    guest = guests.start(host, "7.2", name="unit3", unit=True)
    new = qemu.obtain("11.1.a").binary
    try:
        host.put("/run/kills.py", KILLS.encode())
        host.sh(f"nice -n -15 python3 -S /run/kills.py {guest.pid} {new} > /dev/null 2>&1 < /dev/null &")
        said = host.cpr("update", "--restart", "unit3", "--qemu", new, "-y", "--json")
        assert said.code == 6, said
        (answer,) = said.json["guests"]
        assert answer["pid_after"] != guest.pid, said
        assert any("the guest runs outside of it" in note for note in answer["notes"]), said
        guest.pid = answer["pid_after"]
        log = guest.goes_on()
        assert log.sound, log.problems()
        host.sh("until [ $(systemctl show -P ActiveState unit3.service) = inactive ]; do sleep 0.3; done", 60)
        asked = host.run("cpr may-start --unit unit3.service")
        assert asked.code == 3, asked
        assert f"runs as pid {guest.pid}" in asked.err, asked
        assert jumps.count_qemus(host) == 1
    finally:
        guest.end()
        host.run("systemctl stop unit3.service")
    assert host.run("cpr may-start --unit unit3.service").code == 0


@pytest.mark.timeout(900)
def test_bare_guest_beside_it_goes_over(systemd_host: Host) -> None:
    guest = guests.start(systemd_host, "7.2", name="bare1")
    try:
        said = systemd_host.cpr("update", "--restart", "bare1", "--qemu", qemu.obtain("11.1.a").binary, "-y", "--json")
        assert said.code == 0, said
        (answer,) = said.json["guests"]
        assert (answer["engine"], answer["status"]) == ("reexec", "updated"), "its pid file knows the process"
        guest.pid = answer["pid_after"]
        log = guest.goes_on()
        assert log.sound, log.problems()
    finally:
        guest.end()
