"""The network: a stream through a tap loses no byte, forwarded ports and the gdb stub come back, scripts do not run."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.lab import tap
from tests.lab.linux import ECHO_PORT, FLOOD_PORT, PACED_PORT
from tests.qemu.parties import connected, counted, free_port, listens, unique
from tests.qemu.surveying import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.linux import LinuxLog
    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Guest, Lab
    from tests.qemu.conftest import Command, Result

    Builds = Callable[[str], QemuBuild]

full = pytest.mark.full
needs_tap = pytest.mark.skipif(tap.why_not() is not None, reason=f"no tap: {tap.why_not()}")
ROUTE = ["11.1.a", "11.1.b", "11.1.a", "11.1.b", "11.1.a"]


def updated(cpr: Command, pid: int, target: QemuBuild) -> Result:
    result = cpr.update(pid, target)
    assert result.code == 0, str(result)
    return result


# -- tap


@needs_tap
def test_a_stream_through_a_tap_loses_no_byte(lab: Lab, cpr: Command, builds: Builds) -> None:
    with tap.Tap() as device:
        guest = lab.linux(builds("7.2"), "-name", unique(lab), *device.arguments(), words=[device.guest_word])
        streamed(lab, cpr, builds, guest, device, ["11.1.a"])


@full
@needs_tap
@pytest.mark.parametrize("port", [PACED_PORT, FLOOD_PORT])
@pytest.mark.parametrize("queues", [1, 2, 4])
def test_a_stream_through_a_tap_over_five_updates(
    lab: Lab, cpr: Command, builds: Builds, queues: int, port: int, record_property: Callable[[str, object], None]
) -> None:
    """Several queues: of a tap by its name; vCPUs as many."""
    with tap.Tap(multi_queue=queues > 1) as device:
        words = device.arguments(f",mq=on,vectors={2 * queues + 2}" if queues > 1 else "")
        if queues > 1:
            words[1] += f",queues={queues}"
        extra = ("-name", unique(lab), "-smp", str(queues))
        guest = lab.linux(builds("7.2"), *extra, *words, words=[device.guest_word])
        lost, silence = streamed(lab, cpr, builds, guest, device, ROUTE, port)
        record_property("pings lost", lost)
        record_property("longest silence", silence)


def streamed(
    lab: Lab,
    cpr: Command,
    builds: Builds,
    guest: Guest[LinuxLog],
    device: tap.Tap,
    route: list[str],
    port: int = PACED_PORT,
) -> tuple[int, float]:
    """One TCP connection over all updates, every byte compared; (pings lost, longest silence in seconds)."""
    pid, blackout = guest.pid, 0.0
    with tap.Pinger(device.guest) as pinger, tap.Stream(device.guest, port) as stream:
        pinger.wait_arrivals(20, 30)
        for key in route:
            stream.wait_arrivals(5, 30)
            outcome = updated(cpr, pid, builds(key)).guest
            pid = outcome["pid_after"]
            blackout += outcome["blackout_seconds"]
            received = stream.received
            stream.wait(lambda r=received: stream.received > r + 1000, 30)  # type: ignore[misc]
        pinger.wait_arrivals(20, 30)
        time.sleep(pinger.patience)  # the last ones may still be answered
        assert stream.sound, stream.error
        assert pinger.error is None
        lost, silence = pinger.lost, pinger.longest_silence
    told = f"{lost} of {pinger.sent} pings lost, longest silence {silence * 1000:.0f} ms"
    print(f"\n{len(route)} updates: {told}, vCPUs stood still {blackout * 1000:.0f} ms in all")
    assert lost <= 5 * len(route) + 2 * blackout / pinger.interval, told
    guest.log.wait_ticks(20)
    assert guest.log.sound, guest.log.problems()
    return lost, silence


@full
@needs_tap
@pytest.mark.parametrize("queues", [1, 2])
def test_taps_by_descriptor(lab: Lab, cpr: Command, builds: Builds, queues: int) -> None:
    """fd= and fds=, as whoever manages guests gives them."""
    with tap.Tap(multi_queue=queues > 1) as device, contextlib.ExitStack() as stack:
        numbers = [device.open() for _ in range(queues)]
        for number in numbers:
            stack.callback(os.close, number)
        fds = f"fds={':'.join(map(str, numbers))}" if queues > 1 else f"fd={numbers[0]}"
        many = f",mq=on,vectors={2 * queues + 2}" if queues > 1 else ""
        words = ["-netdev", f"tap,id=net0,{fds}", "-device", f"virtio-net-pci,netdev=net0,romfile={many}"]
        guest = boot(lab, builds("7.2"), *words, "-smp", str(queues), words=[device.guest_word], pass_fds=numbers)
        stack.close()
        streamed(lab, cpr, builds, guest, device, ["11.1.a", "11.1.b"])


def boot(
    lab: Lab, build: QemuBuild, *extra: str, words: list[str], pass_fds: list[int]
) -> Guest[LinuxLog]:
    """`Lab.linux` with inherited descriptors."""
    start = lab.start
    lab.start = lambda *a, **k: start(*a, **{**k, "pass_fds": pass_fds})  # type: ignore[method-assign]
    try:
        return lab.linux(build, "-name", unique(lab), *extra, words=words)
    finally:
        lab.start = start  # type: ignore[method-assign]


SCRIPT = """#!/bin/sh
echo "$1" >> {mark}
"""


@needs_tap
def test_the_scripts_of_a_tap_do_not_run(lab: Lab, cpr: Command, builds: Builds) -> None:
    """The up-script ran once, at the guest's start; the down-script would take the network away."""
    scripts = {}
    for name in ("up", "down"):
        scripts[name] = lab.directory / f"{name}.sh"
        scripts[name].write_text(SCRIPT.format(mark=lab.directory / f"{name}.mark"))
        scripts[name].chmod(0o755)
    with tap.Tap() as device:
        words = f"tap,id=net0,ifname={device.name},script={scripts['up']},downscript={scripts['down']}"
        nic = ("-netdev", words, "-device", "virtio-net-pci,netdev=net0,romfile=")
        with counted(lab, builds("7.2"), *nic) as guest:
            pid = guest.process.pid
            for key in ("11.1.a", "11.1.b"):
                pid = updated(cpr, pid, builds(key)).guest["pid_after"]
            assert (lab.directory / "up.mark").read_text().split() == [device.name]
            assert not (lab.directory / "down.mark").exists()
            assert Path(f"/sys/class/net/{device.name}/operstate").read_text().strip() in ("up", "unknown")
            guest.check(rounds=0)


@full
@needs_tap
@pytest.mark.skipif(not os.path.exists("/dev/vhost-net"), reason="no /dev/vhost-net on this host")
@pytest.mark.parametrize("queues", [1, 2])
def test_vhost_net(lab: Lab, cpr: Command, builds: Builds, queues: int) -> None:
    with tap.Tap(multi_queue=queues > 1) as device:
        words = device.arguments(f",mq=on,vectors={2 * queues + 2}" if queues > 1 else "")
        words[1] += ",vhost=on" + (f",queues={queues}" if queues > 1 else "")
        extra = ("-name", unique(lab), "-smp", str(queues))
        guest = lab.linux(builds("7.2"), *extra, *words, words=[device.guest_word])
        streamed(lab, cpr, builds, guest, device, ROUTE)


@full
@needs_tap
def test_an_update_that_is_undone_leaves_the_tap_as_it_was(lab: Lab, cpr: Command, builds: Builds) -> None:
    """The new QEMU does not live long enough: no byte is lost either, and the next update works."""
    with tap.Tap() as device:
        guest = lab.linux(builds("7.2"), "-name", unique(lab), *device.arguments(), words=[device.guest_word])
        with tap.Stream(device.guest) as stream:
            stream.wait_arrivals(20, 30)
            result = cpr.update(guest.pid, builds("11.1.a"), "--timeout", "0.2")
            assert result.code == 6, str(result)
            received = stream.received
            stream.wait(lambda: stream.received > received + 1000, 30)
            assert stream.sound, stream.error
        streamed(lab, cpr, builds, guest, device, ["11.1.a"])


# -- user networking and gdb


def test_forwarded_ports_and_the_gdb_stub_come_back(lab: Lab, cpr: Command, builds: Builds) -> None:
    """And the gap of each is told. (Over several updates: test_handed_back.py.)"""
    ports, stub = [free_port(), free_port()], free_port()
    forwards = f"hostfwd=tcp:127.0.0.1:{ports[0]}-:7,hostfwd=tcp:127.0.0.1:{ports[1]}-:20"
    nic = ("-netdev", f"user,id=net0,{forwards}", "-device", "virtio-net-pci,netdev=net0,romfile=")
    with counted(lab, builds("7.2"), *nic, "-gdb", f"tcp:127.0.0.1:{stub}") as guest:
        result = updated(cpr, guest.process.pid, builds("11.1.a"))
        notes = [note for note in result.guest["notes"] if "nobody listened for" in note]
        assert len(notes) == 3
        for port, command in ((ports[0], "hostfwd_add"), (ports[1], "hostfwd_add"), (stub, "gdbserver")):
            assert [note for note in notes if str(port) in note and command in note]
            assert listens(("127.0.0.1", port))
        assert {"listener-gap", "slirp-connections"} <= {f["check"] for f in result.guest["findings"]}
        assert asked(stub, "qSupported").startswith("PacketSize=")
        guest.check(rounds=0)


@full
def test_forwarded_ports_reach_the_guest(lab: Lab, cpr: Command, builds: Builds) -> None:
    port = free_port()
    netdev = f"user,id=net0,hostfwd=tcp:127.0.0.1:{port}-10.0.2.15:{ECHO_PORT}"
    extra = ("-name", unique(lab), "-netdev", netdev, "-device", "virtio-net-pci,netdev=net0,romfile=")
    guest = lab.linux(builds("7.2"), *extra, words=["cpr.ip=10.0.2.15/24"])
    pid = guest.pid
    until(lambda: echoes(port), 30)
    for key in ("11.1.a", "11.1.b"):
        pid = updated(cpr, pid, builds(key)).guest["pid_after"]
        until(lambda: echoes(port), 30)
    assert guest.log.sound, guest.log.problems()


def echoes(port: int) -> bool:
    with contextlib.suppress(OSError), connected(("127.0.0.1", port), 2) as sock:
        sock.sendall(b"hello\n")
        return sock.recv(6) == b"hello\n"
    return False


def asked(port: int, command: str) -> str:
    """One packet of the remote protocol, and its answer; a debugger's coming stops the guest, detaching lets it go."""
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        file = sock.makefile("rb")
        for text in (command, "D"):
            sock.sendall(f"+${text}#{sum(text.encode()) % 256:02x}".encode())
            answer = b""
            while not answer.endswith(b"#"):
                answer += file.read(1)
            file.read(2)
            if text == command:
                reply = answer.partition(b"$")[2][:-1].decode()
        sock.sendall(b"+")
        return reply
