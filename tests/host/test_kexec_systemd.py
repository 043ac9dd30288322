"""A whole host with systemd: one command, and after the new boot the guests run, started by cpr-restore.service."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import pytest

from tests.host import guests, jumps, kernels
from tests.host.guests import LASTING, Lies
from tests.host.vm import Stayed

if TYPE_CHECKING:
    from tests.host.conftest import Hosts
    from tests.host.vm import Host

pytestmark = pytest.mark.hostfull
UNIT = """\
[Unit]
Description=A guest

[Service]
ExecStart={command}

[Install]
WantedBy=multi-user.target
"""


def as_service(host: Host, name: str, path: str) -> guests.Guest:
    """A guest that a unit file starts at every boot, with the drop-in of cpr."""
    guest = guests.Guest(host, name, 0, Lies(LASTING, path))
    words = guests.prepare_counting(guest, "10.0", "96M")
    place = "/etc/systemd/system"
    host.put(f"{place}/{name}.service", UNIT.format(command=shlex.join(words)))
    host.sh(f"install -D -m 644 /usr/share/doc/cpr/cpr-guest.conf {place}/{name}.service.d/cpr.conf")
    host.sh(f"systemctl daemon-reload && systemctl enable --now --quiet {name}.service", 60)
    guest.pid = int(host.sh(f"systemctl show -P MainPID {name}.service"))
    guests.counts(guest, "^c ", 60, unit=True)
    return guest


@pytest.mark.timeout(1500)
def test_one_command_and_nothing_by_hand(hosts: Hosts) -> None:
    host = hosts.get(jumps.persistent((160, 160), systemd=True), fresh=True)
    verified = host.run("systemd-analyze verify --man=no cpr-restore.service", 60)
    assert verified.code == 0, verified
    assert "cpr" not in verified.err, verified
    assert host.sh("systemctl show -P ConditionResult cpr-restore.service").strip() == "no"
    host.sh("test -d /run/cpr -a -d /var/lib/cpr")

    first, second = jumps.device_dax(host)
    bare = guests.start(host, "10.0", name="bare", memory="96M", lies=Lies(LASTING, first))
    service = as_service(host, "web1", second)
    with pytest.raises(Stayed) as caught:
        host.sh("systemctl disable --quiet cpr-restore.service", 60)
        jumps.jump(host, "7.2", "--all")
    assert caught.value.said.code == 3
    assert "restore-not-enabled" in caught.value.said.out
    host.sh("systemctl enable --quiet cpr-restore.service", 60)

    took = jumps.jump(host, "7.2", "--all", seconds=400)
    assert host.sh("uname -r").strip() == kernels.obtain("7.2").release
    hosts.lines.append(f"systemctl kexec with two guests, all restored when the host was up: {took:.1f} s")
    told = host.run("systemctl status --no-pager -l -n 50 cpr-restore.service").out
    story = told + host.run("journalctl -b --no-pager -u cpr-restore").out
    assert host.run("systemctl is-active cpr-restore.service").out.strip() == "active", story
    assert jumps.count_qemus(host) == 2, story
    assert host.run("systemctl is-active web1.service").out.strip() == "inactive", story
    assert host.run("systemctl --failed --no-legend --plain").out.strip() == "", story
    assert "-name web1 " in told, told  # whose own cgroup is not there: so it is among the unit's processes
    for guest in (bare, service):
        assert f"{guest.name}: updated by reboot" in told, told
        log = guest.whole()
        assert log.sound, log.problems()

    host.sh("systemctl stop cpr-restore.service", 60)
    host.run("systemctl start web1.service", 60)
    assert jumps.count_qemus(host) == 2, "the unit took its guests along, or a service started a second one"
    for guest in (bare, service):
        assert guest.goes_on().sound
    service.pid = int(host.sh(f"cat {LASTING}/web1.pid"))
    service.qmp("quit")
    host.run(f"tail --pid={service.pid} -f /dev/null", 20)
    host.sh("systemctl start web1.service", 60)
    assert host.sh("systemctl is-active web1.service").strip() == "active"
    assert jumps.count_qemus(host) == 2
