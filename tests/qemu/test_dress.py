"""The state of real guests, rehearsed: verdicts, words, and guests that notice nothing but a moment's pause."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from cpr.engines import dress
from cpr.errors import Exit
from cpr.linux import proc
from cpr.linux.lazycopy import LazyCopies
from cpr.model import MonitorAddress, Status
from cpr.qemu import state_rehearsal
from cpr.qemu.cmdline import with_memory_backend_fd
from tests.lab import qemu, tap
from tests.lab.start import Lab
from tests.qemu.conftest import build
from tests.qemu.dressing import SETS, ask, born, full, rehearse, unharmed
from tests.qemu.moving import Subject, backend, goes_on, monitor, walk
from tests.qemu.parties import free_port
from tests.qemu.test_rehearsal import rehearsing
from tests.qemu.test_truth import LOADED_AT, PAGE, changed_by_a_second_start, differing, digests, loader_words, ram_of

if TYPE_CHECKING:
    from cpr.qemu.rehearsal import Started
    from cpr.run import Run
    from tests.lab.counting import CountingLog
    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Guest
    from tests.qemu.dressing import Rehearsed

TAKEN = [("7.2", "10.0"), ("7.2", "11.1.a")]
REFUSED = ("10.0", "11.1.a")
needs_tap = pytest.mark.skipif(tap.why_not() is not None, reason=f"tap: {tap.why_not()}")


def paused_for(result: Rehearsed) -> float:
    """Seconds; it was measured and told."""
    assert result.pause is not None, result
    assert any("paused it for" in note for note in result.outcome.notes), result
    return result.pause


# -- the verdict


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("pair", "devices"),
    [
        *((pair, "virtio") for pair in [*TAKEN, REFUSED]),
        *(full(pair, devices) for pair in [*TAKEN, REFUSED] for devices in SETS if devices != "virtio"),
        *(full(pair, "virtio") for pair in [("10.0", "10.0"), ("11.1.a", "11.1.b"), ("11.1.a", "7.2")]),
    ],
)
def test_the_verdict_is_that_of_a_real_load(lab: Lab, pair: tuple[str, str], devices: str) -> None:
    subject = born(lab, pair[0], devices)
    load = subject.real_load(build(pair[1]))
    with unharmed(lab, subject.guest):
        result = rehearse(subject.pid, ask(pair[1]), lab.directory)
    assert result.accepted == load.taken, (result, load)
    assert result.settled
    assert not result.new
    assert result.outcome.runstate == "running"
    if not load.taken:
        assert result.outcome.status in (Status.ROLLED_BACK, Status.FAILED)
        assert any(line in result.outcome.error for line in load.lines), (result, load)


def test_a_state_that_is_refused_is_told_in_qemus_words(lab: Lab) -> None:
    """Debian's 11.1 does not take the queues of a virtio device that was born on its 10.0."""
    subject = born(lab, "10.0", "virtio")
    with unharmed(lab, subject.guest):
        result = rehearse(subject.pid, ask("11.1.a"), lab.directory)
    assert not result.accepted
    assert "the new QEMU would not take the guest's state" in result.outcome.error
    assert "VQ 0" in result.outcome.error
    assert "load of migration failed" in result.outcome.error
    assert (result.outcome.status, result.outcome.exit_code) == (Status.ROLLED_BACK, Exit.ROLLED_BACK)
    assert paused_for(result) < 2


@pytest.mark.parametrize("new", ["10.0", "11.1.a"])
def test_ram_that_cannot_be_mapped_copy_on_write(lab: Lab, new: str) -> None:
    """It is copied as far as the load looks at it; a QEMU that does not take the state is found out all the same."""
    subject = born(lab, "10.0", "virtio")
    with unharmed(lab, subject.guest):
        result = rehearse(subject.pid, ask(new), lab.directory, as_dax=True)
    assert not any("not rehearsed" in note for note in result.outcome.notes), result
    assert result.accepted == (new == "10.0"), result
    assert result.accepted or "VQ 0" in result.outcome.error
    assert paused_for(result) < 2


def test_its_user_may_not_watch_faults(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then only the start is rehearsed, and that is told."""

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(LazyCopies, "begin", refused)
    subject = born(lab, "10.0", "virtio")
    with unharmed(lab, subject.guest):
        result = rehearse(subject.pid, ask("11.1.a"), lab.directory, as_dax=True)
    assert result.accepted
    assert any("not rehearsed, only the start: its RAM cannot be copied" in note for note in result.outcome.notes)


@pytest.mark.parametrize("old", ["7.2", full("10.0"), full("11.1.a")])
def test_a_rehearsal_leaves_nothing_and_may_be_repeated(lab: Lab, old: str) -> None:
    subject = born(lab, old)
    for _ in range(2):
        with unharmed(lab, subject.guest):
            result = rehearse(subject.pid, ask(old), lab.directory)
        assert result.accepted, result
        assert 0 < paused_for(result) < 2


@needs_tap
@pytest.mark.timeout(240)
@pytest.mark.parametrize("as_dax", [False, full(True)])
@pytest.mark.parametrize(
    ("pair", "options"), [(("7.2", "11.1.a"), ""), full(("7.2", "10.0"), ",mq=on"), full(("10.0", "11.1.a"), "")]
)
def test_a_linux_guest_that_uses_its_virtio_devices(
    lab: Lab, pair: tuple[str, str], options: str, as_dax: bool
) -> None:
    """Rings in motion, offloads negotiated: the verdict is still a real load's, and its connection holds."""
    old = build(pair[0])
    image = lab.directory / "disk.qcow2"
    subprocess.run([qemu.qemu_img(), "create", "-q", "-f", "qcow2", image, "64M"], check=True)
    with tap.Tap() as network:
        guest = lab.linux(
            old,
            *("-drive", f"file={image},format=qcow2,if=virtio,cache=none", *network.arguments(options)),
            backend=backend(old, lab),
            words=["cpr.busy", network.guest_word],
        )
        guest.log.wait(lambda: guest.log.disk_ok >= 0, 60, "the guest does not work")
        subject = Subject(lab, guest, old, images=(image,), network=network)
        load = subject.real_load(build(pair[1]))
        with tap.Stream(network.guest) as stream:
            stream.wait_arrivals()
            result = rehearse(subject.pid, ask(pair[1]), lab.directory, as_dax=as_dax)
            goes_on(guest)
            stream.wait_arrivals(20)
        assert stream.sound, stream.error
        assert result.accepted == load.taken, (result, load)
        assert os.listdir("/sys/class/net").count("rehearsal") == 0
    assert rehearsing(lab) == []


# -- the guest's RAM


@pytest.mark.parametrize("key", ["7.2", full("10.0"), full("11.1.a")])
def test_what_a_rehearsing_qemu_writes_stays_with_it(lab: Lab, key: str) -> None:
    """A loader writes into RAM at every start. Over shared RAM that is the guest's; over a private mapping not."""
    words = loader_words(lab)
    with Lab() as other:
        changed = changed_by_a_second_start(other, build(key), words)
    assert [page.partition(" at ")[2] for page in changed] == [f"{LOADED_AT // PAGE * PAGE:#x}"]
    guest = lab.counting(build(key), *words, backend=backend(build(key), lab))
    guest.log.wait_rounds(1)
    with monitor(guest) as session, ram_of(guest.process) as ram:
        session.execute("stop")
        session.close()
        before = digests(ram)
        result = rehearse(guest.pid, ask(key), lab.directory)
        assert result.accepted, result
        assert differing(before, digests(ram)) == []


def test_no_rehearsing_qemu_shares_the_guests_ram(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen while both have it mapped."""
    subject = born(lab, "7.2")
    seen: list[set[str]] = []
    incoming = dress._incoming

    def look(it: Started) -> Any:
        inodes = {ram.inode for ram in run.plan.guest.ram}
        seen.append({m.perms[3] for m in proc.read_maps(it.process.pid) if m.inode in inodes})
        return incoming(it)

    run: Run

    def watch(it: Run) -> None:
        nonlocal run
        run = it

    monkeypatch.setattr(dress, "_incoming", look)
    with unharmed(lab, subject.guest):
        assert rehearse(subject.pid, ask("10.0"), lab.directory, watch=watch).accepted
    assert seen == [{"p"}, {"p"}]


def test_one_that_would_share_it_is_given_no_state(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = born(lab, "7.2")
    shared = "cpr.qemu.cmdline.rehearsal.with_memory_backend_fd"
    monkeypatch.setattr(shared, lambda *of, **_: with_memory_backend_fd(*of))
    with unharmed(lab, subject.guest):
        result = rehearse(subject.pid, ask("10.0"), lab.directory)
    assert "does not map the guest's RAM ram0 copy-on-write" in result.outcome.error, result
    assert result.pause is None


@pytest.mark.usefixtures("huge_pages")
def test_ram_in_huge_pages_takes_no_page_of_the_pool(lab: Lab) -> None:
    """There is room for one guest and not a page more."""
    it = build("7.2")
    guest = lab.counting(it, memory="128M", backend="memory-backend-memfd,share=on,hugetlb=on")
    with unharmed(lab, guest):
        result = rehearse(guest.pid, ask("10.0"), lab.directory)
        assert result.accepted, result


# -- the way back


def own_copy(lab: Lab, key: str) -> QemuBuild:
    """A build that can be taken apart: its firmware and modules lie beside the binary."""
    of = build(key)
    directory = lab.directory / "old"
    shutil.copytree(of.binary.parent, directory)
    return dataclasses.replace(of, binary=directory / of.binary.name)


def grown(lab: Lab, of: QemuBuild) -> Guest[CountingLog]:
    return lab.counting(of, backend=backend(of, lab))


def test_a_deleted_binary_is_no_hindrance(lab: Lab) -> None:
    of = own_copy(lab, "7.2")
    guest = grown(lab, of)
    of.binary.unlink()
    with unharmed(lab, guest):
        assert rehearse(guest.pid, ask("10.0"), lab.directory).accepted


@pytest.mark.parametrize("lost", ["firmware", "modules"])
def test_the_way_back_is_barred_where_the_old_qemu_does_not_start(lab: Lab, lost: str) -> None:
    of = own_copy(lab, "7.2")
    guest = grown(lab, of)
    bundle = of.binary.parent / "qemu-bundle"
    for found in list(bundle.rglob("accel-tcg-*.so" if lost == "modules" else "bios-256k.bin")):
        found.unlink()
    with unharmed(lab, guest):
        result = rehearse(guest.pid, ask("10.0"), lab.directory)
    assert not result.accepted
    assert "the old QEMU does not start any more" in result.outcome.error
    assert ("bios" if lost == "firmware" else "tcg") in result.outcome.error
    assert result.outcome.hint == dress.BARRED
    assert result.pause is None, "it need not have been paused"


@pytest.mark.parametrize("key", ["7.2", full("11.1.a")])
def test_the_way_back_is_barred_where_the_old_qemu_would_not_load(
    lab: Lab, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lacks a device today, as it would without the module that has it."""
    subject = born(lab, key, "virtio")
    old_qemu = state_rehearsal.old_qemu

    def lacking(guest: Any, *of: Any, **how: Any) -> Any:
        at = guest.argv.index("virtio-rng-pci")
        return old_qemu(dataclasses.replace(guest, argv=guest.argv[: at - 1] + guest.argv[at + 1 :]), *of, **how)

    monkeypatch.setattr(dress, "old_qemu", lacking)
    with unharmed(lab, subject.guest):
        result = rehearse(subject.pid, ask(key), lab.directory)
    assert "the old QEMU, started anew, would not take the guest's state back" in result.outcome.error, result
    assert "virtio-rng" in result.outcome.error
    assert result.outcome.hint == dress.BARRED


# -- a guest that is paused


@pytest.mark.parametrize(
    ("key", "new"), [*TAKEN, full("10.0", "10.0"), full("11.1.a", "11.1.b")]
)
def test_a_paused_guest_is_not_touched(lab: Lab, key: str, new: str) -> None:
    subject = born(lab, key, "virtio")
    with monitor(subject.guest) as session:
        session.execute("stop")
        before = session.execute("query-migrate")
    with unharmed(lab, subject.guest), ram_of(subject.guest.process) as ram:
        was = digests(ram)
        result = rehearse(subject.pid, ask(new), lab.directory)
        assert differing(was, digests(ram)) == []
    assert result.accepted, result
    assert (result.outcome.runstate, result.pause) == ("paused", None)
    with monitor(subject.guest) as session:
        assert session.execute("query-migrate") == before
        session.execute("cont")
        assert session.execute("query-status")["status"] == "running"
    walk(subject.guest)


def test_a_paused_guest_is_refused_like_one_that_runs(lab: Lab) -> None:
    subject = born(lab, "10.0", "virtio")
    with monitor(subject.guest) as session:
        session.execute("stop")
    with unharmed(lab, subject.guest):
        result = rehearse(subject.pid, ask("11.1.a"), lab.directory)
    assert "VQ 0" in result.outcome.error, result
    with monitor(subject.guest) as session:
        session.execute("cont")
    walk(subject.guest)


# -- what stays out of it


def test_what_cannot_be_rehearsed_is_named(lab: Lab) -> None:
    it = build("10.0")
    more = f"{backend(it, lab, 'more')},id=more,size=128M"
    guest = lab.counting(
        it,
        *("-object", more, "-device", "virtio-mem-pci,id=vm0,memdev=more,requested-size=0"),
        *("-m", "128M,slots=2,maxmem=1G"),
        backend=backend(it, lab),
    )
    with unharmed(lab, guest):
        result = rehearse(guest.pid, ask("10.0"), lab.directory)
    assert result.accepted, result
    assert any("virtio-mem" in note and "not rehearsed" in note for note in result.outcome.notes), result
    assert result.pause is None


@pytest.mark.parametrize("running", [True, False], ids=["running", "paused"])
def test_a_monitor_that_descriptors_do_not_pass(lab: Lab, running: bool) -> None:
    """Over TCP the state goes over a port of ours; a paused guest has no way to give it, and that is told."""
    it, port = build("7.2"), free_port()
    words = ("-chardev", f"socket,id=far,host=127.0.0.1,port={port},server=on,wait=off", "-mon", "far,mode=control")
    guest = lab.counting(it, *words, backend=backend(it, lab))
    if not running:
        with monitor(guest) as session:
            session.execute("stop")
    address = MonitorAddress(label="far", host="127.0.0.1", port=port)
    with unharmed(lab, guest):
        result = rehearse(guest.pid, ask("10.0"), lab.directory, address=address)
    assert result.accepted, result
    assert (result.pause is not None) == running
    assert any("TCP" in note for note in result.outcome.notes) != running
