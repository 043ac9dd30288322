"""A start after a boot, with real QEMUs: all descriptors of the old process are gone, and the guest goes on."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from cpr.qemu import features, qmp
from cpr.reboot.afresh import afresh
from cpr.reboot.facts import with_reboot_facts
from tests.lab import tap
from tests.qemu.moving import migration_end
from tests.qemu.surveying import surveyed

if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.model import Guest
    from cpr.qemu.qmp import Monitor
    from cpr.reboot.afresh import Afresh
    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab, Orphan
    from tests.qemu.conftest import Command

UPWARDS = [("7.2", "7.2"), ("10.0", "10.0"), ("11.1.a", "11.1.a"), ("7.2", "11.1.a")]


def port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def started(lab: Lab, made: Afresh, name: str = "afresh") -> tuple[Orphan, Monitor]:
    """Started as whoever restores a guest does, with our end of its private monitor."""
    ours, theirs = socket.socketpair()
    with theirs:
        # the lab passes a descriptor under its own number
        words = [word.replace(f"fd={made.control_number}", f"fd={theirs.fileno()}") for word in made.argv]
        orphan = lab.start(words, name=name, pass_fds=[theirs.fileno()])
    return orphan, qmp.negotiate(ours, "private")


def save(guest: Guest, state: str) -> None:
    """Saved to a file, RAM left where it is; then the old process ends."""
    assert guest.monitor is not None
    with qmp.connect(guest.monitor, guest.process.pid) as monitor:
        skip(monitor)
        monitor.execute("stop")
        monitor.execute("migrate", uri=f"exec:cat > {state}")
        assert migration_end(monitor) == "completed"
        monitor.execute("quit")


def load(monitor: Monitor, state: str) -> None:
    assert monitor.execute("query-status")["status"] == "inmigrate"
    skip(monitor)
    monitor.execute("migrate-incoming", uri=f"exec:cat {state}")
    assert migration_end(monitor) == "completed"
    monitor.execute("cont")
    assert monitor.execute("query-status")["status"] == "running"


def skip(monitor: Monitor) -> None:
    monitor.execute("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])


def addresses(guest: Guest) -> dict[str, Any]:
    """Where a guest can be reached, by what."""
    assert guest.monitor is not None
    return {
        "listening": {
            c.label: c.filename.removeprefix("disconnected:").split(" <-> ")[0] for c in guest.chardevs if c.listener
        },
        "forwards": [n.hostfwd for n in guest.netdevs],
        "vnc": [(v.id, [listener[:3] for listener in v.listeners]) for v in guest.vnc],
        "pid file": guest.pidfile,
        "ram": [(b.id, b.backing, b.inode, b.shared) for b in guest.ram],
        "monitor": str(guest.monitor),
    }


@pytest.mark.parametrize(("old", "new"), [UPWARDS[0], *(pytest.param(*p, marks=pytest.mark.full) for p in UPWARDS[1:])])
@pytest.mark.parametrize("updated", [False, True], ids=["as-started", "updated-before"])
def test_a_guest_goes_on_where_it_was(
    lab: Lab, builds: Callable[[str], QemuBuild], cpr: Command, old: str, new: str, updated: bool
) -> None:
    """Saved, ended, started afresh from what was known of it, loaded: it counts on, and is reached where it was.

    Also where an update has put descriptors in place of every address.
    """
    ram, state = str(lab.directory / "ram"), str(lab.directory / "state")
    forwarded, vnc = port(), port()
    guest = lab.counting(
        builds(old),
        *("-chardev", f"socket,id=tcp,host=127.0.0.1,port={port()},server=on,wait=off,logfile={lab.directory}/tcp.log"),
        *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=tcp,name=a"),
        *("-monitor", f"telnet:127.0.0.1:{port()},server,nowait", "-pidfile", str(lab.directory / "pid")),
        *("-netdev", f"user,id=u0,hostfwd=tcp:127.0.0.1:{forwarded}-:22", "-device", "virtio-net-pci,netdev=u0"),
        *("-vnc", f"127.0.0.1:{vnc - 5900},password=off", "-gdb", f"tcp:127.0.0.1:{port()}"),
        backend=f"memory-backend-file,share=on,mem-path={ram}",
    )
    process = guest.process
    if updated:
        done = cpr.update(guest.pid, builds(old), "--ignore", "vnc-password")
        assert done.code == 0, done
        process = lab.adopt(done.guest["pid_after"])
    facts = with_reboot_facts(surveyed(process))
    assert facts.not_had_again == ()
    made = afresh(facts, features.ask(str(builds(new).binary)))
    assert (made.missing, made.needs) == ((), ())
    assert made.directories == (str(lab.directory),)
    wanted = addresses(facts)
    save(facts, state)
    assert process.wait(10)
    assert "/proc/" not in " ".join(made.argv)
    again, control = started(lab, made)
    with control:
        load(control, state)
        guest.log.wait_ticks(20)
    assert guest.log.sound, guest.log.problems()
    for what, where in addresses(with_reboot_facts(surveyed(again))).items():
        assert where == wanted[what]
    assert (lab.directory / "pid").read_text().strip() == str(again.pid)


@pytest.mark.parametrize("engine", ["handover", pytest.param("reexec", marks=pytest.mark.full)])
def test_a_tap_with_a_script_is_made_as_before(
    lab: Lab, builds: Callable[[str], QemuBuild], cpr: Command, engine: str
) -> None:
    """An update hands it on by number; after a boot it is made anew, and its script puts it into its bridge."""
    if reason := tap.why_not():
        pytest.skip(reason)
    name, said = f"cprs{os.getpid()}", lab.directory / "said"
    script = lab.directory / "up"
    script.write_text(f"#!/bin/sh\necho $1 >> {said}\n")
    script.chmod(0o755)
    netdev = f"tap,id=n0,ifname={name},script={script},downscript=no"
    guest = lab.counting(
        builds("10.0"),
        *("-netdev", netdev, "-device", "virtio-net-pci,netdev=n0"),
        backend=f"memory-backend-file,share=on,mem-path={lab.directory}/ram",
    )
    pid = guest.pid
    for _ in range(2):  # the second one finds numbers in argv
        done = cpr.update(pid, builds("10.0"), "--engine", engine)
        assert done.code == 0, done
        pid = done.guest["pid_after"]
    process = lab.adopt(pid)
    facts = with_reboot_facts(surveyed(process))
    made = afresh(facts, features.ask(str(builds("10.0").binary)))
    assert made.missing == ()
    assert netdev in made.argv
    save(facts, str(lab.directory / "state"))
    assert process.wait(10)
    assert said.read_text() == f"{name}\n", "once so far"
    _, control = started(lab, made)
    with control:
        load(control, str(lab.directory / "state"))
        guest.log.wait_ticks(20)
    assert guest.log.sound, guest.log.problems()
    assert said.read_text() == f"{name}\n" * 2
