"""Rehearsed starts of real QEMUs, and what they leave alone."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cpr import discover
from cpr.qemu import features, rehearsal
from tests.lab import qemu, tap
from tests.lab.start import MARK
from tests.qemu.surveying import KEYS, start, surveyed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cpr.model import Guest, Rehearsal
    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab

MIB = 1 << 20
SHARED = "memory-backend-memfd,share=on,id=ram0,size=64M"
UPWARDS = [(a, b) for a in KEYS for b in KEYS if KEYS.index(a) <= KEYS.index(b)]


def rehearsing(lab: Lab) -> list[int]:
    """Rehearsals of the lab's guests that are running."""
    marks = {b"CPR_RUN_PENDING=1", os.fsencode(f"{MARK}={lab.directory}")}
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if marks <= set(file.read().split(b"\0")):
                    found.append(int(name))
        except OSError:
            continue
    return found


def rehearse(lab: Lab, guest: Guest, build: QemuBuild, **more: tuple[str, ...]) -> Rehearsal:
    target = features.ask(str(build.binary), **more)
    result = rehearsal.rehearse(guest, target)
    assert rehearsing(lab) == [], "the rehearsal QEMU still runs"
    return result


@pytest.mark.parametrize(("old", "new"), UPWARDS)
def test_a_guest_with_a_bit_of_everything(
    lab: Lab, builds: Callable[[str], QemuBuild], old: str, new: str
) -> None:
    image = lab.directory / "disk.qcow2"
    subprocess.run([qemu.qemu_img(), "create", "-q", "-f", "qcow2", str(image), "16M"], check=True)
    orphan = start(
        lab,
        builds(old),
        *("-object", SHARED, "-smp", "2", "-object", "iothread,id=io0", "-cpu", "qemu64,+avx2"),
        *("-drive", f"file={image},if=none,id=d0", "-device", "virtio-blk-pci,drive=d0,iothread=io0,id=vd"),
        *("-device", "virtio-serial-pci", "-chardev", "pty,id=pty0", "-device", "virtserialport,chardev=pty0,name=a"),
        *("-chardev", f"socket,id=s0,path={lab.directory}/s,server=on,wait=off,logfile={lab.directory}/log"),
        *("-device", "virtserialport,chardev=s0,name=c", "-serial", f"unix:{lab.directory}/t,server=on,wait=off"),
        *("-netdev", "user,id=u0,hostfwd=tcp:127.0.0.1:0-:22", "-device", "virtio-net-pci,netdev=u0,id=nic"),
        *("-vnc", f"unix:{lab.directory}/vnc", "-device", "VGA"),
        *("-gdb", f"unix:{lab.directory}/gdb,server=on,wait=off"),
        *("-pidfile", str(lab.directory / "pid"), "-D", str(lab.directory / "qemu.log")),
        machine="q35,memory-backend=ram0",
    )
    guest = surveyed(orphan)
    before = snapshot(lab.directory)
    result = rehearse(lab, guest, builds(new))
    assert result.started, result.words
    assert result.words == ""
    assert [(d.id, d.type) for d in result.devices if not d.anonymous] == [
        (d.id, d.type) for d in guest.devices if not d.anonymous
    ]
    assert sorted(d.type for d in result.devices) == sorted(d.type for d in guest.devices)
    assert {"d0", "vd"} <= set(result.drives)
    assert set(result.chardevs) >= {c.label for c in guest.chardevs} - {"gdb", "#chr0"}
    assert result.written == ()
    assert result.accelerator == "tcg"
    assert result.cpu_differences == ()
    assert snapshot(lab.directory) == before
    again = surveyed(orphan)
    assert again.runstate == guest.runstate
    assert again.chains == guest.chains
    assert [(c.label, c.queued) for c in again.chardevs] == [(c.label, c.queued) for c in guest.chardevs]


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Names, inodes and sizes of the lab's files: a rehearsal makes none and writes none."""
    return {p.name: (p.stat().st_ino, p.stat().st_size) for p in directory.iterdir()}


@pytest.mark.parametrize("key", KEYS)
def test_a_loader_that_writes_ram_is_noticed(lab: Lab, builds: Callable[[str], QemuBuild], key: str) -> None:
    orphan = start(
        lab,
        builds(key),
        *("-object", SHARED, "-device", "loader,addr=0x2000000,data=0x1234,data-len=8"),
        machine="q35,memory-backend=ram0",
    )
    assert rehearse(lab, surveyed(orphan), builds(key)).written == (("ram0", os.sysconf("SC_PAGESIZE")),)


@pytest.mark.parametrize("key", KEYS)
def test_prealloc_is_not_a_write(lab: Lab, builds: Callable[[str], QemuBuild], key: str) -> None:
    orphan = start(lab, builds(key), "-object", f"{SHARED},prealloc=on", machine="q35,memory-backend=ram0")
    result = rehearse(lab, surveyed(orphan), builds(key))
    assert (result.started, result.written) == (True, ())


def test_what_the_new_qemu_refuses_is_said_in_its_words(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    guest = surveyed(start(lab, builds("11.1.a"), "-object", SHARED, machine="q35,memory-backend=ram0"))
    result = rehearse(lab, guest, builds("10.0"))
    assert not result.started
    assert "unsupported machine type" in result.words
    wrong = rehearse(lab, guest, builds("11.1.a"), extra_options=("-device", "no-such-device"))
    assert not wrong.started
    assert "no-such-device" in wrong.words


def test_renamed_options_are_told(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    guest = surveyed(start(lab, builds("7.2"), "-no-hpet", "-async-teardown"))
    result = rehearse(lab, guest, builds("11.1.a"))
    assert result.started, result.words
    assert any("hpet" in change for change in result.options_changed)


def test_missing_files_fail_as_they_would(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    table = lab.directory / "table"
    table.write_bytes(b"some bytes")
    guest = surveyed(start(lab, builds("10.0"), "-fw_cfg", f"name=opt/x,file={table}"))
    assert rehearse(lab, guest, builds("10.0")).started
    table.unlink()
    gone = rehearse(lab, guest, builds("10.0"))
    assert not gone.started
    assert str(table) in gone.words


def test_readconfig_is_rehearsed_from_its_recorded_text(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    path = lab.directory / "guest.conf"
    path.write_text('[device "rng"]\n  driver = "virtio-rng-pci"\n')
    guest = surveyed(start(lab, builds("7.2"), "-readconfig", str(path)))
    path.unlink()
    result = rehearse(lab, guest, builds("10.0"))
    assert result.started, result.words
    assert [d.id for d in result.devices] == ["rng"]


def test_taps_are_left_alone(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    if reason := tap.why_not():
        pytest.skip(reason)
    with tap.Tap() as one:
        orphan = start(
            lab,
            builds("7.2"),
            *("-netdev", f"tap,id=a,ifname={one.name},script=no,downscript=no", "-device", "virtio-net-pci,netdev=a"),
        )
        guest = surveyed(orphan)
        result = rehearse(lab, guest, builds("10.0"))
        assert result.started, result.words
        assert surveyed(orphan).netdevs == guest.netdevs
        orphan.kill()
        orphan.wait(10)


def test_flash_of_its_true_size(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    flash = lab.directory / "code.fd"
    flash.write_bytes(b"\xff" * (2 * MIB))
    for words in (
        ["-drive", f"if=pflash,format=raw,readonly=on,file={flash}"],
        ["-blockdev", f"node-name=pf,driver=raw,read-only=on,file.driver=file,file.filename={flash}"],
    ):
        machine = "q35,pflash0=pf" if words[0] == "-blockdev" else "q35"
        orphan = start(lab, builds("7.2"), *words, machine=machine, name=f"guest{len(machine)}")
        result = rehearse(lab, surveyed(orphan), builds("10.0"))
        assert result.started, result.words


def test_no_guest_is_seen_while_one_is_rehearsed(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    orphan = start(lab, builds("7.2"))
    guest = surveyed(orphan)
    target = features.ask(str(builds("10.0").binary))
    stop = threading.Event()
    seen: set[int] = set()
    rehearsals: set[int] = set()

    def watch() -> None:
        while not stop.is_set():
            mine = [c for c in discover.candidates() if c.name == guest.name and str(lab.directory) in str(c.argv)]
            seen.update(c.process.pid for c in mine)
            rehearsals.update(rehearsing(lab))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        assert rehearsal.rehearse(guest, target).started
    stop.set()
    watcher.join()
    assert seen <= {orphan.pid}
    assert rehearsals


def test_a_qemu_that_hangs_is_killed(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    guest = surveyed(start(lab, builds("7.2")))
    target = features.ask(str(builds("7.2").binary))
    fifo = lab.directory / "fifo"
    os.mkfifo(fifo)  # to open it for reading waits for a writer
    stuck = replace(target, extra_options=("-fw_cfg", f"name=opt/x,file={fifo}"))
    began = time.monotonic()
    result = rehearsal.rehearse(guest, stuck, timeout=2.0)
    assert time.monotonic() - began < 10
    assert not result.started
    assert "does not answer" in result.words
    assert rehearsing(lab) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start a guest of another user")
def test_in_the_likeness_of_another_user(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    """What the guest's user may not read, the rehearsal may not read either."""
    table = lab.directory / "table"
    table.write_bytes(b"some bytes")
    os.chmod(lab.directory, 0o777)
    build = builds("10.0")
    path = str(build.binary)
    while path != "/":
        path = os.path.dirname(path)
        if not os.stat(path).st_mode & 0o001:
            pytest.skip("the lab's programs lie where only root may go")
    orphan = start(lab, build, "-fw_cfg", f"name=opt/x,file={table}", "-run-with", "user=nobody")
    guest = surveyed(orphan)
    assert guest.uid == 65534
    assert rehearse(lab, guest, build).started
    os.chmod(table, 0o600)
    result = rehearse(lab, guest, build)
    assert not result.started
    assert str(table) in result.words
