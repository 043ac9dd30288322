"""`cpr update --kexec` in the host VM: a new kernel under running guests by a real kexec, and the ways back from it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from tests.host import guests, jumps, kernels
from tests.host.guests import LASTING, Lies
from tests.host.jumps import BY_HAND, FSDAX
from tests.host.machine import MEMMAP, NVDIMM, NVME_ADDRESS
from tests.host.vm import LEFT, Host, Stayed
from tests.lab import qemu

if TYPE_CHECKING:
    from tests.host.conftest import Hosts
    from tests.host.guests import Guest, LinuxGuest



def findings(text: str) -> set[str]:
    """Ids of the blockers in a document of `cpr`, of whatever guest."""
    document = json.loads(text)
    rows = [*document.get("findings", []), *(row for guest in document["guests"] for row in guest["findings"])]
    return {row["check"] for row in rows if row["severity"] == "blocker"}


@pytest.mark.timeout(900)
def test_smoke(hosts: Hosts) -> None:
    """A guest that counts and one with a passed-through disk over one jump; refused while a third would be lost."""
    host = hosts.get(jumps.SMOKE, fresh=True)
    began = time.monotonic()
    first, second = jumps.device_dax(host)
    jumps.to_vfio(host, NVME_ADDRESS)
    passed = guests.start_linux(host, "10.0", name="passed", lies=Lies(LASTING, second, NVME_ADDRESS))
    counting = guests.start(host, "10.0", name="counting", memory="96M", lies=Lies(LASTING, first))
    lost = guests.start(host, "10.0", name="lost", memory="64M")
    started = time.monotonic() - began

    words = ("--kernel", "/boot/7.2/vmlinuz", "--initrd", "/boot/7.2/initrd", "--append", "console=ttyS0")
    refused = host.cpr("update", "--kexec", "counting", "lost", "-y", "--json", *words)
    assert refused.code == 3, refused
    wanted = {"ram-volatile-over-kexec", "memmap-missing", "guest-not-saved", "restore-not-enabled"}
    assert wanted <= findings(refused.out), refused
    assert counting.alive()
    lost.end()

    took = jumps.jump(host, "7.2", "--all", *BY_HAND)
    assert host.sh("uname -r").strip() == kernels.obtain("7.2").release
    assert jumps.count_qemus(host) == 0
    restored = jumps.restore(host)
    assert restored.code == 0, restored
    rows = jumps.back(restored)
    assert {name: row["status"] for name, row in rows.items()} == {"counting": "updated", "passed": "updated"}
    assert "its clock was set by the guest agent" in rows["passed"]["notes"], rows
    hosts.lines.append(
        f"kexec 6.12 -> 7.2, two guests (devdax; devdax and vfio): started in {started:.1f} s, "
        f"saved and jumped in {took:.1f} s, restored in {max(row['total_seconds'] for row in rows.values()):.1f} s"
    )
    for guest in (counting, passed):
        guest.pid = rows[guest.name]["pid_after"]
        log = guest.whole()
        assert log.sound, log.problems()
    assert len(passed.log().boot_ids) == 1
    for guest in (counting, passed):
        guest.end()


ROUTES = [
    (MEMMAP, "6.1", "6.12", "10.0", "10.0"),
    (MEMMAP, "6.12", "7.2", "7.2", "11.1.a"),
    (MEMMAP, "7.2", "6.12", "11.1.a", "11.1.b"),
    (NVDIMM, "6.1", "6.12", "10.0", "10.0"),
    (NVDIMM, "6.12", "7.2", "7.2", "11.1.a"),
    (FSDAX, "6.1", "6.12", "7.2", "11.1.a"),
    (FSDAX, "6.12", "7.2", "10.0", "10.0"),
]


def two(host: Host, kind: str, key: str) -> tuple[LinuxGuest, Guest]:
    """A Linux guest that writes its disk, and a guest that counts and is paused."""
    if kind == FSDAX:
        directory = jumps.file_system_dax(host)
        paths = [f"{directory}/first", f"{directory}/second"]
    else:
        paths = jumps.device_dax(host)
    first = guests.start_linux(host, key, name="first", lies=Lies(LASTING, paths[0]))
    second = guests.start(host, key, name="second", memory="96M", lies=Lies(LASTING, paths[1]))
    second.qmp("stop")
    return first, second


@pytest.mark.hostfull
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kind", "kernel", "next_", "old", "new"), ROUTES, ids=str)
def test_two_guests_one_paused(hosts: Hosts, kind: str, kernel: str, next_: str, old: str, new: str) -> None:
    regions = (448,) if kind == FSDAX else (256, 160)
    host = hosts.get(jumps.persistent(regions, kind, kernel=kernel), fresh=True)
    first, second = two(host, kind, old)
    stood = second.log().number
    took = jumps.jump(host, next_, "--all", "--qemu", qemu.obtain(new).binary, *BY_HAND)
    assert host.sh("uname -r").strip() == kernels.obtain(next_).release
    if kind == FSDAX:
        refused = jumps.restore(host)
        assert refused.code == 7, refused
        assert jumps.count_qemus(host) == 0
        assert host.run("ls /mnt/first").code != 0, "a file was made where none was"
        jumps.mount_dax(host)
    restored = jumps.restore(host)
    assert restored.code == 0, restored
    rows = jumps.back(restored)
    assert {name: row["runstate"] for name, row in rows.items()} == {"first": "running", "second": "paused"}
    assert {row["binary_after"]["version"] for row in rows.values()} == {qemu.obtain(new).version}
    total = max(row["total_seconds"] for row in rows.values())
    hosts.lines.append(
        f"kexec {kernel} -> {next_}, {kind}, QEMU {old} -> {new}: left in {took:.1f} s, restored in {total:.1f} s, "
        f"first stood {rows['first']['blackout_seconds']} s by the host's clocks"
    )
    assert second.runstate() == "paused"
    assert second.log().number == stood
    second.qmp("cont")
    said = host.sh(f"cat {LEFT}.out")
    assert "not rehearsed" not in said, said
    assert (old == new) or said.count("the rehearsal with the guest's state paused it") == 1, said  # the other stood
    for guest in (first, second):
        guest.pid = rows[guest.name]["pid_after"]
        log = guest.whole()
        assert log.sound, log.problems()
    assert len(first.log().boot_ids) == 1


@pytest.mark.hostfull
@pytest.mark.timeout(600)
def test_a_state_that_the_new_qemu_does_not_take(hosts: Hosts) -> None:
    """Device DAX has no copy-on-write mappings; it is found out before the jump all the same, and everybody runs on."""
    host = hosts.get(jumps.persistent((96, 96)), fresh=True)
    first, second = jumps.device_dax(host)
    virtio = ("-device", "virtio-rng-pci")  # Debian's 11.1 has other queues than its 10.0
    other = guests.start(host, "10.0", name="other", memory="64M", lies=Lies(LASTING, first))
    guest = guests.start(host, "10.0", name="guest", memory="64M", lies=Lies(LASTING, second), extra=virtio)
    with pytest.raises(Stayed) as caught:
        jumps.jump(host, "7.2", "--all", "--qemu", qemu.obtain("11.1.a").binary, *BY_HAND)
    said = caught.value.said
    assert said.code == 3, said
    assert "state-not-accepted" in said.out, said
    assert "VQ 0" in said.out, said
    for each in (other, guest):
        assert each.runstate() == "running"
        assert each.whole().sound
    assert host.sh("cat /sys/kernel/kexec_loaded").strip() == "0"


def traced(number: int) -> tuple[str, ...]:
    """QEMU's options for `runstates`."""
    return "-trace", "runstate_set", "-D", f"{LASTING}/guest{number}.trace"


def runstates(guest: Guest) -> list[str]:
    """What its QEMU traced of every change of its runstate since the last call."""
    trace = f"{guest.stem}.trace"
    lines = guest.host.sh(f"cat {trace}; : > {trace}").splitlines()
    return [line for line in lines if "runstate_set" in line]


@pytest.mark.hostfull
@pytest.mark.timeout(1500)
def test_everybody_runs_on_where_it_fails(hosts: Hosts) -> None:
    """A kernel that cannot be loaded pauses nobody; where one of three does not save, all three run on."""
    host = hosts.get(jumps.persistent((96, 96, 96)), fresh=True)
    paths = jumps.device_dax(host)
    three = [
        guests.start(host, "10.0", name=f"guest{number}", memory="64M", lies=Lies(LASTING, path), extra=traced(number))
        for number, path in enumerate(paths)
    ]
    assert all(runstates(guest) for guest in three), "the trace shows nothing"
    host.sh("head -c 3000000 /dev/urandom > /state/bad")
    words = ("--kernel", "/state/bad", "--initrd", "/boot/7.2/initrd", "--reuse-cmdline", *BY_HAND)
    said = host.cpr("update", "--kexec", "--all", "-y", "--json", *words)
    assert said.code in (1, 6), said
    assert "cannot be loaded" in said.err, said
    assert [runstates(guest) for guest in three] == [[], [], []]

    hung = three[2]
    watch = "until grep -qs '\"phase\": \"saving\"' /var/lib/cpr/reboot/*/manifest.json; do sleep 0.05; done"
    host.sh(f"({watch}; kill -STOP {hung.pid}) > /dev/null 2>&1 < /dev/null &")
    with pytest.raises(Stayed) as caught:
        jumps.jump(host, "7.2", "--all", *BY_HAND, seconds=300)
    said = caught.value.said
    host.sh(f"kill -CONT {hung.pid}")
    assert said.code in (6, 7), said
    if said.code == 7:  # what it could not be told while it hung
        recovered = host.cpr("recover")
        assert recovered.code in (0, 6), recovered
    assert host.sh("cat /sys/kernel/kexec_loaded").strip() == "0"
    for guest in three:
        assert guest.alive()
        log = guest.whole()
        assert log.sound, log.problems()
        assert guest.runstate() == "running"
    hosts.lines.append(f"one of three hangs: exit {said.code}")

    # and what failed once can be done the next time
    jumps.jump(host, "7.2", "--all", *BY_HAND)
    restored = jumps.restore(host)
    assert restored.code == 0, restored
    for guest in three:
        assert guest.whole().sound


@pytest.mark.hostfull
@pytest.mark.timeout(600)
def test_jump_leaves_its_story(hosts: Hosts) -> None:
    """What cpr said before it jumped is on disk, and names the guests and the kernel."""
    host = hosts.get(jumps.persistent((160,)), fresh=True)
    (path,) = jumps.device_dax(host)
    guest = guests.start(host, "11.1.a", name="alone", memory="96M", lies=Lies(LASTING, path))
    jumps.jump(host, "7.2", "alone", *BY_HAND)
    said = host.sh(f"cat {LEFT}.out {LEFT}.err")
    assert "alone: save" in said
    assert "jump into the new kernel" in said
    assert jumps.saved(host)["release"] == kernels.obtain("7.2").release
    restored = jumps.restore(host, "alone")
    assert restored.code == 0, restored
    again = jumps.restore(host, "alone")
    assert again.code not in (0, 1), again
    assert jumps.count_qemus(host) == 1
    assert guest.whole().sound
