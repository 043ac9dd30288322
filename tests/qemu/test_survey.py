"""What the survey says of chardevs, drives, network, displays and descriptors of real QEMUs."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from cpr import survey
from cpr.qemu import block, devices
from cpr.qemu import cmdline as cl
from cpr.qemu.answers import Answers
from tests.lab import qemu, tap
from tests.qemu.surveying import KEYS, await_listening, candidate, start, surveyed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cpr.model import Chardev, Guest
    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab

MIB = 1 << 20


def unowned(guest: Guest) -> list[tuple[str, str]]:
    """Descriptors nobody could be found for, but for pipes that the test's own surroundings left open."""
    return [(f.kind, f.target) for f in guest.open_files if not f.owner and f.kind != "pipe"]


def chardev(guest: Guest, label: str) -> Chardev:
    (found,) = [c for c in guest.chardevs if c.label == label]
    return found


@contextlib.contextmanager
def client(path: object) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        yield sock


@pytest.mark.parametrize("key", KEYS)
def test_the_plainest_guest(lab: Lab, builds: Callable[[str], QemuBuild], key: str) -> None:
    build = builds(key)
    orphan = start(lab, build, "-smp", "2", "-S")
    guest = surveyed(orphan)
    assert (guest.name, guest.uuid, guest.runstate) == ("guest", "", "prelaunch")
    assert guest.binary.version == build.version
    assert build.package in guest.binary.package
    assert guest.machine == f"pc-q35-{build.version.rsplit('.', 1)[0]}"
    assert guest.accelerator == "tcg"
    assert guest.uid == os.geteuid()
    assert guest.cwd == str(lab.directory)
    assert dict(guest.environ)["QEMU_LAB"] == str(lab.directory)
    assert [v.index for v in guest.vcpus] == [0, 1]
    tasks = {int(t) for t in os.listdir(f"/proc/{orphan.pid}/task")}
    assert {v.thread_id for v in guest.vcpus} <= tasks
    assert guest.threads >= 3
    assert guest.resident > MIB
    assert guest.limits["RLIMIT_NOFILE"][0] > 0
    assert dict(guest.namespaces)["mnt"] == os.stat(f"/proc/{orphan.pid}/ns/mnt").st_ino
    assert dict(guest.capabilities)["x-ignore-shared"] is False
    assert "downtime-limit" in guest.parameters
    assert (guest.migration, guest.blocked_reasons, guest.jobs) == ("", (), ())
    assert (guest.supervisors, guest.gone_files, guest.unreadable) == ((), (), ())
    assert dict(guest.cpu_features)["sse2"] is True
    assert unowned(guest) == []
    assert guest.monitor is not None
    assert chardev(guest, guest.monitor.label).monitor == "control"


@pytest.mark.parametrize("key", KEYS)
def test_everything_at_once_has_an_owner(lab: Lab, builds: Callable[[str], QemuBuild], key: str) -> None:
    """Every descriptor of a guest with a bit of everything is told."""
    image, log = lab.directory / "disk.qcow2", lab.directory / "serial.log"
    subprocess.run([qemu.qemu_img(), "create", "-q", "-f", "qcow2", str(image), "16M"], check=True)
    orphan = start(
        lab,
        builds(key),
        *("-drive", f"file={image},if=none,id=d0", "-device", "virtio-blk-pci,drive=d0"),
        *("-object", "iothread,id=io0", "-device", "virtio-serial-pci", "-device", "virtio-balloon-pci,id=bal"),
        *("-chardev", "pty,id=pty0", "-device", "virtserialport,chardev=pty0,name=a"),
        *("-chardev", f"file,id=f0,path={lab.directory}/out", "-device", "virtserialport,chardev=f0,name=b"),
        *("-chardev", f"socket,id=s0,path={lab.directory}/s,server=on,wait=off,logfile={log}"),
        *("-device", "virtserialport,chardev=s0,name=c"),
        *("-netdev", "user,id=u0,hostfwd=tcp:127.0.0.1:0-:22,hostfwd=udp:127.0.0.1:0-:53"),
        *("-device", "virtio-net-pci,netdev=u0", "-vnc", f"unix:{lab.directory}/vnc"),
        *("-gdb", f"unix:{lab.directory}/gdb,server=on,wait=off", "-D", str(lab.directory / "qemu.log"), "-d", "unimp"),
        *("-device", "VGA", "-device", "qemu-xhci", "-device", "usb-tablet"),
    )
    guest = surveyed(orphan)
    assert unowned(guest) == []
    owners = {f.owner for f in guest.open_files}
    assert {"chardev:pty0", "chardev:f0", "chardev:s0", "netdev:u0", "vnc:default", "chardev:gdb", "log"} <= owners
    listeners = {f.owner for f in guest.open_files if f.kind == "listener"}
    assert listeners == {"chardev:compat_monitor0", "chardev:s0", "chardev:gdb", "netdev:u0", "vnc:default"}
    assert [i for i, _ in guest.iothreads] == ["io0"]
    assert [c.label for c in guest.chardevs if not c.in_argv] == []
    (server,) = guest.vnc
    assert server.listeners[0][:3] == ("unix", str(lab.directory / "vnc"), "")
    assert server.listeners[0][3] is not None
    (netdev,) = guest.netdevs
    assert len(netdev.hostfwd) == 2


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("syntax", ["legacy", "json"])
def test_connected_clients(lab: Lab, builds: Callable[[str], QemuBuild], key: str, syntax: str) -> None:
    """Which accepted socket is whose, on UNIX, TCP and inherited listeners; and who waits behind it."""
    with socket.socket(socket.AF_UNIX) as inherited, socket.socket() as probe:
        inherited.bind(str(lab.directory / "f"))
        inherited.listen()
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        device = {
            "legacy": "virtserialport,chardev={0},name=p.{0}",
            "json": '{{"driver": "virtserialport", "chardev": "{0}", "name": "p.{0}"}}',
        }[syntax]
        orphan = start(
            lab,
            builds(key),
            *("-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=u,path={lab.directory}/u,server=on,wait=off", "-device", device.format("u")),
            *("-chardev", f"socket,id=t,host=127.0.0.1,port={port},server=on,wait=off", "-device", device.format("t")),
            *("-chardev", f"socket,id=f,fd={inherited.fileno()},server=on,wait=off", "-device", device.format("f")),
            *("-chardev", f"socket,id=n,path={lab.directory}/n,server=on,wait=off", "-device", device.format("n")),
            pass_fds=[inherited.fileno()],
        )
    idle = surveyed(orphan)
    assert all(not c.connected and c.client is None and c.listener is not None for c in map_of(idle, "utfn").values())
    with (
        client(lab.directory / "u"),
        client(lab.directory / "f"),
        client(lab.directory / "f"),
        client(lab.directory / "f"),
        socket.create_connection(("127.0.0.1", port)),
        socket.create_connection(("127.0.0.1", port)),
    ):
        time.sleep(0.1)
        guest = surveyed(orphan)
        found = map_of(guest, "utfn")
        for label in "utf":
            assert found[label].connected
            assert found[label].client is not None
            (own,) = [f for f in guest.open_files if f.number == found[label].client]
            assert (own.kind, own.owner) == ("socket", f"chardev:{label}")
        assert not found["n"].connected
        assert (found["u"].queued, found["t"].queued, found["f"].queued, found["n"].queued) == (0, 1, 2, 0)
        assert len({found[c].client for c in "utf"}) == 3
        assert unowned(guest) == []


def map_of(guest: Guest, labels: str) -> dict[str, Chardev]:
    return {label: chardev(guest, label) for label in labels}


@pytest.mark.parametrize("key", KEYS)
def test_chardevs_of_every_sort(lab: Lab, builds: Callable[[str], QemuBuild], key: str) -> None:
    """Outgoing connections, reconnecting ones, telnet, multiplexed ones, plugged-in ones."""
    with socket.socket(socket.AF_UNIX) as manager, socket.socket() as probe:
        manager.bind(str(lab.directory / "manager"))
        manager.listen()
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        ports = [
            word
            for label in ("out", "re", "tel", "mux")
            for word in ("-device", f"virtserialport,chardev={label},name=p.{label}")
        ]
        orphan = start(
            lab,
            builds(key),
            *("-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=out,path={lab.directory}/manager"),
            *("-chardev", f"socket,id=re,path={lab.directory}/nobody,{reconnect(key)}"),
            *("-chardev", f"socket,id=tel,host=127.0.0.1,port={port},telnet=on,server=on,wait=off"),
            *("-chardev", f"socket,id=mux,path={lab.directory}/mux,server=on,wait=off,mux=on", "-mon", "mux"),
            *ports,
            *("-serial", "null"),
        )
        accepted, _ = manager.accept()
        found = candidate(orphan)
        with accepted, survey.open_monitor(found) as monitor:
            backend = {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": f"{lab.directory}/late"}}}}
            backend["data"] |= {"server": True, "wait": False}  # type: ignore[operator]
            monitor.execute("chardev-add", id="late", backend=backend)
            guest = survey.survey(found, monitor)
        out = chardev(guest, "out")
        assert (out.backend, out.server, out.connected, out.reconnect) == ("socket", False, True, False)
        assert out.client is not None
        assert [f.owner for f in guest.open_files if f.number == out.client] == ["chardev:out"]
    assert chardev(guest, "re").reconnect
    assert not chardev(guest, "re").connected
    assert not chardev(guest, "tel").plain
    assert not chardev(guest, "tel").movable
    assert chardev(guest, "mux").monitor == "readline"
    assert not chardev(guest, "mux").movable
    assert chardev(guest, "mux").listener is not None
    assert chardev(guest, "late").listener is not None
    assert [c.label for c in guest.chardevs if not c.in_argv] == ["late"]
    assert unowned(guest) == []


def reconnect(key: str) -> str:
    """`reconnect=` (seconds) went in 10.0 for `reconnect-ms=`."""
    return "reconnect=5" if key == "7.2" else "reconnect-ms=5000"


@pytest.mark.parametrize("key", KEYS)
def test_drives(lab: Lab, builds: Callable[[str], QemuBuild], key: str) -> None:
    base, top, snap = (lab.directory / name for name in ("base.raw", "top.qcow2", "snap.qcow2"))
    base.write_bytes(b"")
    os.truncate(base, 8 * MIB)
    image = [str(qemu.qemu_img()), "create", "-q", "-f", "qcow2"]
    subprocess.run([*image, "-b", str(base), "-F", "raw", str(top)], check=True)
    (lab.directory / "cd").write_bytes(bytes(2 * MIB))
    orphan = start(
        lab,
        builds(key),
        *("-blockdev", f"node-name=top,driver=qcow2,file.driver=file,file.filename={top}"),
        *("-device", "virtio-blk-pci,drive=top,id=vd"),
        *("-drive", f"file={lab.directory}/cd,if=none,id=leg,readonly=on,format=raw,iops=100"),
        *("-device", "ide-cd,drive=leg"),
    )
    found = candidate(orphan)
    with survey.open_monitor(found) as monitor:
        guest = survey.survey(found, monitor)
        chains = {c.device: c for c in guest.chains}
        assert chains["vd"].files == (str(top), str(base))
        assert (chains["vd"].node, chains["vd"].size, chains["vd"].read_only) == ("top", 8 * MIB, False)
        (cd,) = [c for c in guest.chains if c.drive == "leg"]
        assert (cd.files, cd.read_only, dict(cd.throttle)) == ((f"{lab.directory}/cd",), True, {"iops": 100})
        assert {n.name: n.size for n in guest.nodes}["top"] == 8 * MIB
        assert not guest.gone_files
        monitor.execute_arguments(
            "blockdev-snapshot-sync",
            {"node-name": "top", "snapshot-file": str(snap), "snapshot-node-name": "snap", "format": "qcow2"},
        )
        after = {c.device: c for c in survey.survey(found, monitor).chains}
        assert after["vd"].files == (str(snap), str(top), str(base))
        assert block.chains(Answers(monitor)) == tuple(after.values())
        monitor.execute("block-commit", job_id="job0", device="snap", speed=1)
        assert survey.survey(found, monitor).jobs == ("commit job0",)
        assert devices.jobs(Answers(monitor)) == ("commit job0",)
    base.unlink()
    (lab.directory / "cd").unlink()
    assert surveyed(orphan).gone_files == (f"{lab.directory}/cd",)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("queues", [1, 3])
def test_taps(lab: Lab, builds: Callable[[str], QemuBuild], key: str, queues: int) -> None:
    if reason := tap.why_not():
        pytest.skip(reason)
    with tap.Tap(multi_queue=queues > 1) as one, tap.Tap() as other:
        number = other.open()
        try:
            orphan = start(
                lab,
                builds(key),
                *("-netdev", f"tap,id=a,ifname={one.name},script=no,downscript=no,queues={queues}"),
                *("-device", "virtio-net-pci,netdev=a" + (",mq=on,vectors=8" if queues > 1 else "")),
                *("-netdev", f"tap,id=b,fd={number}", "-device", "virtio-net-pci,netdev=b"),
                pass_fds=[number],
            )
        finally:
            os.close(number)
        guest = surveyed(orphan)
        taps = {n.id: n for n in guest.netdevs}
        assert (taps["a"].type, taps["a"].ifname, len(taps["a"].fds)) == ("tap", one.name, queues)
        assert (taps["b"].ifname, taps["b"].fds) == (other.name, (number,))
        assert {f.owner for f in guest.open_files if f.kind == "tap"} == {"netdev:a", "netdev:b"}
        assert unowned(guest) == []
        found = candidate(orphan)
        with survey.open_monitor(found) as monitor:
            monitor.execute("netdev_add", type="user", id="late")
            late = survey.survey(found, monitor).netdevs
        assert {n.id: n.in_argv for n in late} == {"a": True, "b": True, "late": False}
        orphan.kill()
        orphan.wait(10)


@pytest.mark.parametrize("key", KEYS)
def test_default_devices_and_names_that_qemu_makes_up(
    lab: Lab, builds: Callable[[str], QemuBuild], key: str
) -> None:
    """Without -nodefaults: a NIC, a serial port, a parallel port and a monitor of QEMU's own."""
    path = lab.directory / "guest.qmp"
    command = [*builds(key).command, "-display", "none", "-accel", "tcg", "-m", "64"]
    command += ["-qmp", f"unix:{path},server=on,wait=off"]
    orphan = lab.start(command, name="guest")
    await_listening(lab, orphan)
    guest = surveyed(orphan)
    assert [c.label for c in guest.chardevs if not c.in_argv] == []
    assert [(n.type, n.in_argv) for n in guest.netdevs] == [("user", True)]
    assert unowned(guest) == []


@pytest.mark.parametrize("key", KEYS)
def test_vnc(lab: Lab, builds: Callable[[str], QemuBuild], key: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    orphan = start(lab, builds(key), "-device", "VGA", "-vnc", f"127.0.0.1:{port - 5900},websocket=on,to={port - 5891}")
    guest = surveyed(orphan)
    (server,) = guest.vnc
    assert server.id == "default"
    assert server.websocket
    assert len(server.listeners) == 2
    assert all(w.number is not None for w in server.listeners)
    service = next(int(w.service) for w in server.listeners if 0 <= int(w.service) - port < 10)
    with socket.create_connection(("127.0.0.1", service), timeout=10) as viewer:
        assert viewer.recv(12).startswith(b"RFB")
        viewer.sendall(b"RFB 003.008\n")
        viewer.recv(2)
        viewer.sendall(b"\x01")
        viewer.recv(4)
        viewer.sendall(b"\x01")
        viewer.recv(24)
        guest = surveyed(orphan)
        assert guest.vnc[0].clients == 1
        assert unowned(guest) == []


@pytest.mark.parametrize("key", KEYS)
def test_an_unknown_listener_has_no_owner(lab: Lab, builds: Callable[[str], QemuBuild], key: str) -> None:
    orphan = start(lab, builds(key))
    found = candidate(orphan)
    with survey.open_monitor(found) as monitor:
        address: dict[str, Any] = {"type": "unix", "data": {"path": f"{lab.directory}/nbd"}}
        monitor.execute("nbd-server-start", addr=address)
        guest = survey.survey(found, monitor)
    assert [(f.kind, f.owner) for f in guest.open_files if not f.owner and f.kind != "pipe"] == [("listener", "")]


@pytest.mark.parametrize("key", KEYS)
def test_fdsets_and_balloon_statistics(lab: Lab, builds: Callable[[str], QemuBuild], key: str) -> None:
    number = os.open(lab.directory / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    try:
        orphan = start(
            lab,
            builds(key),
            *("-add-fd", f"set=3,fd={number},opaque=log", "-chardev", "null,id=c,logfile=/dev/fdset/3,logappend=on"),
            *("-device", "virtio-balloon-pci,id=bal", "-device", "virtio-serial-pci"),
            *("-device", "virtserialport,chardev=c,name=c"),
            pass_fds=[number],
        )
    finally:
        os.close(number)
    found = candidate(orphan)
    with survey.open_monitor(found) as monitor:
        monitor.execute("qom-set", path="/machine/peripheral/bal", property="guest-stats-polling-interval", value=7)
        guest = survey.survey(found, monitor)
    ((fdset, ((today, opaque),)),) = guest.fdsets
    assert (fdset, opaque) == (3, "log")
    assert [f.target for f in guest.open_files if f.number == today] == [str(lab.directory / "log")]
    assert guest.stats_polling == (("/machine/peripheral/bal", 7),)
    assert unowned(guest) == []


@pytest.mark.parametrize("key", KEYS)
def test_a_migration_and_what_blocks_one(lab: Lab, builds: Callable[[str], QemuBuild], key: str) -> None:
    orphan = start(lab, builds(key), "-S")
    found = candidate(orphan)
    with survey.open_monitor(found) as monitor:
        monitor.execute(
            "migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}]
        )
        monitor.execute("migrate", uri="exec:sleep 30")
        guest = survey.survey(found, monitor)
        assert guest.migration in ("setup", "active")
        assert dict(guest.capabilities)["x-ignore-shared"] is True
        monitor.execute("migrate_cancel")


def test_a_survey_is_quick_enough(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    """No figure to be proud of, but a bar against a survey that starts programs or waits."""
    orphan = start(lab, builds("11.1.a"))
    found = candidate(orphan)
    with survey.open_monitor(found) as monitor:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            survey.survey(found, monitor)
            times.append(time.perf_counter() - began)
    assert min(times) < 0.3


def test_what_an_update_left_is_known(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    environment = {"CPR_PIDFILE": "/run/x.pid", "CPR_QEMU_OPTIONS": '["-boot", "menu=on"]'}
    path = lab.directory / "guest.qmp"
    command = [*builds("7.2").command, "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "64"]
    command += ["-qmp", f"unix:{path},server=on,wait=off", "-boot", "menu=on"]
    orphan = lab.start(command, name="guest", environment=environment)
    await_listening(lab, orphan)
    guest = surveyed(orphan)
    assert (guest.pidfile, guest.added_options) == ("/run/x.pid", ("-boot", "menu=on"))
    assert cl.CommandLine.parse(guest.argv).has("boot")
