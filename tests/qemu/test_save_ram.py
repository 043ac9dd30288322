"""`--save-ram`: guests whose RAM nothing keeps are copied to a disk and back. They verify all of their RAM themselves.

Everything is real but the loaded kernel and the jump (rebooting.py); in the boot that they were saved in their RAM is
gone all the same, for it ended with its process, or something else is written there meanwhile.
"""

from __future__ import annotations

import os
import signal
import stat
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cpr.reboot import manifest as manifests
from cpr.reboot.knowledge import data_directories
from tests.qemu.conftest import Result, qemus_of
from tests.qemu.moving import argv, monitor
from tests.qemu.rebooting import ANY_ROOM, HOLD_AT, KILL_AT
from tests.qemu.saving import MEMORY, Subject, changed, shared_memory, virtio
from tests.qemu.surveying import until
from tests.qemu.test_faults_disk import Tmpfs
from tests.qemu.test_reboot_flow import Host, guests_of, statuses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cpr.reboot.manifest import SavedGuest
    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab
    from tests.qemu.conftest import Command

    Builds = Callable[[str], QemuBuild]

full = pytest.mark.full
MEMFD = "memory-backend-memfd,share=on"
RAM_BYTES = 32 << 20


class Copying(Host):
    """A host whose guests have RAM that is not kept."""

    def __init__(self, lab: Lab, cpr: Command) -> None:
        super().__init__(lab, cpr)
        self.copies = lab.directory / "copies"

    def volatile(self, build: QemuBuild, backend: str | None, *words: str, memory: str = MEMORY) -> Subject:
        """A guest with RAM of this -object; None: what QEMU does by itself."""
        name = f"guest{len(self.guests)}"
        started = self.lab.counting(build, *words, name=name, memory=memory, hz=50, backend=backend)
        subject = Subject(self.lab, self.cpr, started, Path(), started.pid)
        started.console.send(b"D")
        started.log.wait_rounds(1, 60)  # no page is zero any more
        self.guests.append(subject)
        return subject

    def copy(self, *words: object, **environment: str) -> Result:
        return self.update("--save-ram", self.copies, *words, **environment)

    def saved(self) -> tuple[SavedGuest, ...]:
        """As the open manifest has them."""
        current = self.state / "reboot" / "current"
        return manifests.read(str(current.parent / os.readlink(current))).guests

    def files(self) -> list[Path]:
        return sorted(self.copies.iterdir()) if self.copies.exists() else []

    def back(self, counts: list[int], *words: object) -> Result:
        """All are restored, with all of their RAM, and nothing of it is left on the disk."""
        result = self.restore(*words)
        assert result.code == 0, str(result)
        for guest, count, told in zip(self.guests, counts, guests_of(result), strict=True):
            if told["runstate"] == "paused":
                guest.cont()
            guest.counts_on(count)
            assert settings(guest) == ([], 2, [])
        assert self.files() == [], "a copy of RAM was left"
        return result

    def untouched(self, counts: list[int]) -> None:
        self.run_as_before(counts)
        assert self.files() == [], "a copy of RAM was left"
        assert all(settings(guest) == ([], 2, []) for guest in self.guests)


def settings(guest: Subject) -> tuple[list[str], int, list[Any]]:
    """Capabilities that are on, threads of multifd (2 by default), descriptors that QEMU was given."""
    with monitor(guest.guest) as session:
        on = [c["capability"] for c in session.execute("query-migrate-capabilities") if c["state"]]
        channels = session.execute("query-migrate-parameters")["multifd-channels"]
        return on, channels, session.execute("query-fdsets")


@pytest.fixture
def host(lab: Lab, cpr: Command) -> Copying:
    return Copying(lab, cpr)


@pytest.fixture
def small(lab: Lab) -> Iterator[Path]:
    """A directory with too little room; it would not outlast a jump, and is taken for one that does."""
    it = Tmpfs(lab.directory / "small", "size=8m,mode=0700")
    yield it.path
    it.close()


@pytest.mark.parametrize(
    ("old", "new", "backend", "form"),
    [
        ("7.2", "11.1.a", None, "stream"),
        pytest.param("10.0", "10.0", MEMFD, "mapped-ram", marks=full),
        pytest.param("10.0", "11.1.a", None, "mapped-ram", marks=full),
        pytest.param("11.1.a", "11.1.a", MEMFD, "mapped-ram", marks=full),
        pytest.param("11.1.a", "11.1.a", "memory-backend-ram,share=on", "mapped-ram", marks=full),
        pytest.param("10.0", "10.0", "memory-backend-file,share=on,mem-path=/dev/shm", "mapped-ram", marks=full),
        pytest.param("7.2", "7.2", MEMFD, "stream", marks=full),
        pytest.param("7.2", "10.0", MEMFD, "stream", marks=full),
    ],
)
def test_a_guest_and_a_paused_one(
    host: Copying, builds: Builds, old: str, new: str, backend: str | None, form: str
) -> None:
    for _ in range(2):
        host.volatile(builds(old), backend)
    host.guests[1].stop()
    counts = host.counts()
    result = host.copy("--qemu", builds(new).binary)
    assert result.code == 0, str(result)
    assert statuses(result) == ["saved", "saved"]
    assert qemus_of(host.lab) == []
    assert stat.S_IMODE(host.copies.stat().st_mode) == 0o700
    assert len(host.files()) == 2
    for path, guest in zip(host.files(), host.saved(), strict=True):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.stat().st_blocks * 512 > RAM_BYTES / 2, "its RAM is not in it"
        assert guest.state is not None
        assert (guest.ram_copy, guest.state.path) == (form, str(path))
        assert [(r.volatile, r.stamp) for r in guest.ram] == [(True, None)]
    result = host.back(counts)
    assert [g["runstate"] for g in guests_of(result)] == ["running", "paused"]
    for subject in host.guests:
        assert os.readlink(f"/proc/{subject.pid}/exe") == str(builds(new).binary)


def test_without_the_option_it_is_refused_and_told_of(host: Copying, builds: Builds) -> None:
    guest = host.volatile(builds("10.0"), None)
    counts = host.counts()
    result = host.update()
    assert result.code == 3, str(result)
    error = guests_of(result)[0]["error"]
    assert "[ram-volatile-over-kexec]" in error["message"]
    assert "--save-ram DIR" in error["hint"]
    assert host.happened() == []
    told = host.call("check", "--kexec", "--save-ram", host.copies)
    assert told.code == 0, str(told)
    for words in ("[save-ram] pc.ram", "at most 32 MiB", "stands still", "[save-ram-time]", "a second were measured"):
        assert words in told.out
    refused = host.call("check", "--kexec", "--save-ram", "/dev/shm/not-there")
    assert refused.code == 3, str(refused)
    assert "[save-ram-directory] /dev/shm/not-there" in refused.out
    assert not Path("/dev/shm/not-there").exists()
    assert not host.copies.exists(), "looking makes nothing"
    guest.counts_on(counts[0])


def test_a_full_disk_undoes_it(host: Copying, builds: Builds, small: Path) -> None:
    """In the middle of the copy, by whoever writes it: all run again, also the guest that needs no copy."""
    host.volatile(builds("7.2"), None)
    host.volatile(builds("10.0"), None)
    host.guest(builds("10.0"))
    counts = host.counts()
    result = host.update("--save-ram", small, **{ANY_ROOM: "1"})
    assert result.code == 6, str(result)
    assert statuses(result) == ["rolled_back"] * 3
    assert "No space left" in guests_of(result)[0]["error"], str(result)
    assert "room" in guests_of(result)[0]["hint"]
    assert "[saved]" not in host.happened()
    assert list(small.iterdir()) == []
    host.untouched(counts)
    refused = host.update("--save-ram", small)
    assert refused.code == 3, "without the fake room it is said before"


@full
def test_a_full_disk_when_qemu_writes(host: Copying, builds: Builds, small: Path) -> None:
    """Mapped RAM: QEMU is who meets it, and its words are told."""
    host.volatile(builds("11.1.a"), None)
    counts = host.counts()
    result = host.update("--save-ram", small, **{ANY_ROOM: "1"})
    assert result.code == 6, str(result)
    assert "room" in guests_of(result)[0]["hint"]
    assert list(small.iterdir()) == []
    host.untouched(counts)


def test_one_guest_by_hand(lab: Lab, cpr: Command, builds: Builds) -> None:
    """A copy that somebody has changed is refused, and kept; then the guest comes back from it."""
    host = Copying(lab, cpr)
    subject = host.volatile(builds("10.0"), MEMFD)
    before = subject.guest.log.number
    document = subject.saved("--save-ram", host.copies, mode="reboot")
    assert document["ram_copy"] == "mapped-ram"
    assert [r["volatile"] for r in document["ram"]] == [True]
    (state,) = host.files()
    assert document["state"] == str(state)
    assert not subject.file.exists()
    with changed(state, 16 << 20, bytes([state.read_bytes()[16 << 20] ^ 1])):
        result = subject.load()
        assert result.code == 3, str(result)
        assert "SHA-256 differs" in result.err
    outcome = subject.loaded()
    assert outcome["runstate"] == "running"
    subject.counts_on(before)
    assert settings(subject) == ([], 2, [])
    assert host.files() == []


@full
def test_ram_with_a_name(host: Copying, builds: Builds) -> None:
    """Something else is found there when it comes back: it is written over, zeroes too; its directory is gone."""
    with shared_memory(host.lab) as directory:
        below = directory / "below"
        below.mkdir(mode=0o750)
        host.volatile(builds("10.0"), f"memory-backend-file,share=on,mem-path={directory}/ram")
        host.volatile(builds("10.0"), f"memory-backend-file,share=on,mem-path={below}/ram")
        private = host.lab.directory / "private"
        private.write_bytes(b"template" * (RAM_BYTES // 8))
        host.volatile(builds("11.1.a"), f"memory-backend-file,share=off,mem-path={private}")
        counts = host.counts()
        result = host.copy()
        assert result.code == 0, str(result)
        assert {g.ram_copy for g in host.saved()} == {"stream"}
        (directory / "ram").write_bytes(b"another " * (RAM_BYTES // 8))
        (below / "ram").unlink()
        below.rmdir()
        host.back(counts)
        assert stat.S_IMODE(below.stat().st_mode) == 0o750


@full
@pytest.mark.usefixtures("huge_pages")
def test_huge_pages_without_a_name(host: Copying, builds: Builds) -> None:
    """They are there for one QEMU and not for two: the first has ended."""
    host.volatile(builds("10.0"), "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M")
    counts = host.counts()
    result = host.copy()
    assert result.code == 0, str(result)
    assert host.saved()[0].ram_copy == "mapped-ram"
    assert any(f["subject"] == "huge pages" for f in guests_of(result)[0]["findings"])
    host.back(counts)


@full
def test_a_guest_that_an_update_has_moved(host: Copying, cpr: Command, builds: Builds) -> None:
    """Its RAM is a descriptor that QEMU was given, and is one again; so it can be updated once more.

    A QEMU that does not know the form of the copy is refused, and the copy stays.
    """
    guest = host.volatile(builds("7.2"), MEMFD)
    moved = cpr.update(guest.pid, builds("10.0")).guest
    assert moved["status"] == "updated", moved
    guest.pid = moved["pid_after"]
    counts = host.counts()
    result = host.copy("--qemu", builds("10.0").binary)
    assert result.code == 0, str(result)
    assert host.saved()[0].ram_copy == "mapped-ram"
    refused = host.restore("--qemu", builds("7.2").binary)
    assert refused.code == 7, str(refused)
    assert "mapped-ram" in guests_of(refused)[0]["error"]
    assert len(host.files()) == 1
    host.back(counts)
    assert any("mem-path=/proc/self/fd/" in word for word in argv(guest.pid))
    moved = cpr.update(guest.pid, builds("11.1.a")).guest
    assert moved["status"] == "updated", moved
    guest.pid = moved["pid_after"]
    guest.counts_on(counts[0])


@full
def test_some_of_the_ram_is_kept(host: Copying, builds: Builds) -> None:
    """A file on a disk, and a DIMM of anonymous memory: all of it is copied, and the file has to be what it was."""
    ram = host.lab.directory / "kept.ram"
    dimm = ("-m", "32M,slots=1,maxmem=256M", "-object", "memory-backend-ram,id=m1,size=128M")
    host.volatile(
        builds("10.0"), f"memory-backend-file,share=on,mem-path={ram}", *dimm, "-device", "pc-dimm,memdev=m1,id=d1"
    )
    counts = host.counts()
    result = host.copy()
    assert result.code == 0, str(result)
    (guest,) = host.saved()
    assert {r.id: (r.volatile, r.stamp is None) for r in guest.ram} == {"ram0": (False, False), "m1": (True, True)}
    with changed(ram, 0, b"another guest's"):
        refused = host.restore()
        assert refused.code == 7, str(refused)
        assert "sampled pages differ" in guests_of(refused)[0]["error"]
    host.back(counts)


@full
def test_a_new_qemu_that_does_not_take_it(host: Copying, builds: Builds) -> None:
    """It was not tried before, there being no RAM to try it over, and that was told: back in the copy of the old."""
    host.volatile(builds("10.0"), None, *virtio(host.lab))
    counts = host.counts()
    result = host.copy("--qemu", builds("11.1.a").binary)
    assert result.code == 0, str(result)
    assert any("not rehearsed" in note for note in guests_of(result)[0]["notes"])
    result = host.restore()
    assert result.code == 8, str(result)
    assert "/old-" in os.readlink(f"/proc/{host.guests[0].pid}/exe")
    host.guests[0].counts_on(counts[0])
    assert host.files() == []


@full
@pytest.mark.parametrize("old", ["7.2", "11.1.a"])
def test_killed_when_all_is_copied(host: Copying, builds: Builds, old: str) -> None:
    """The guardian has the guests go on, and removes the copies."""
    for _ in range(2):
        host.volatile(builds(old), None)
    counts = host.counts()
    assert host.copy(**{KILL_AT: "saved"}).code == -9
    until(lambda: not (host.state / "reboot" / "current").is_symlink(), 30)
    host.untouched(counts)


@full
@pytest.mark.parametrize("old", ["7.2", "11.1.a"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_ended_in_the_middle_of_the_copy(host: Copying, builds: Builds, old: str, how: signal.Signals) -> None:
    """Nothing is sealed yet; where QEMU writes by itself, it is told to stop."""
    host.volatile(builds(old), None, memory="512M")
    counts = host.counts()
    process = host.start("update", "--kexec", "-y", "--json", "--save-ram", str(host.copies))
    until(lambda: bool(host.files()) and host.files()[0].stat().st_blocks > 0, 60)
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode == (-9 if how is signal.SIGKILL else 143)
    assert "[saved]" not in host.happened(), "it was too late: a guest with more RAM is needed"
    began = time.monotonic()
    until(lambda: host.guests[0].status() == "running", 30)
    assert time.monotonic() - began < 15
    until(lambda: not (host.state / "reboot" / "current").is_symlink(), 30)
    host.untouched(counts)


@full
def test_interrupted_when_all_is_copied(host: Copying, builds: Builds) -> None:
    host.volatile(builds("10.0"), None)
    counts = host.counts()
    process = host.start(
        "update", "--kexec", "-y", "--json", "--save-ram", str(host.copies), **{HOLD_AT: "saved"}
    )
    host.wait("[saved]")
    process.terminate()
    time.sleep(0.2)
    host.go()
    process.communicate(timeout=120)
    assert process.returncode == 143
    host.untouched(counts)


@full
def test_a_guest_that_is_given_up_leaves_no_copy(host: Copying, builds: Builds) -> None:
    host.volatile(builds("10.0"), None)
    assert host.copy().code == 0
    result = host.call("restore", "--give-up", "guest0", "--json")
    assert result.code == 0, str(result)
    assert "the copy of its RAM was in that" in guests_of(result)[0]["where"]
    assert host.files() == []


@full
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_a_guest_of_another_user(host: Copying, builds: Builds) -> None:
    """It may not enter the directory: QEMU writes and reads the file by a descriptor that it is given."""
    user, group = 54321, 54322
    real = builds("11.1.a")
    become = (f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs", "--bounding-set=-all")
    build = replace(real, binary=Path("/usr/bin/setpriv"), options=(*become, str(real.binary)))
    os.chown(host.lab.directory, user, group)
    disk = host.lab.directory / "guest0.disk"
    disk.touch()
    os.chown(disk, user, group)
    host.volatile(build, MEMFD)
    counts = host.counts()
    result = host.copy()
    assert result.code == 0, str(result)
    assert host.saved()[0].ram_copy == "mapped-ram"
    assert host.files()[0].stat().st_uid == os.geteuid()
    host.back(counts)
    assert f"Uid:\t{user}\t{user}" in Path(f"/proc/{host.guests[0].pid}/status").read_text()


@full
def test_firmware_that_was_replaced_meanwhile(host: Copying, builds: Builds) -> None:
    """The guest has the one it was started with: its zeroes too, where the new one has something."""
    build = builds("10.0")
    plain = host.volatile(build, None)
    bios = next(p for d in data_directories(plain.pid) if (p := Path(d, "bios-256k.bin")).exists()).read_bytes()
    flash = host.lab.directory / "flash"
    flash.write_bytes(bytes((1 << 20) - len(bios)) + bios)
    guest = host.volatile(build, None, "-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={flash}")
    counts = host.counts()
    flash.unlink()
    flash.write_bytes(b"\xaa" * ((1 << 20) - len(bios)) + bios)  # as an upgrade of its package would
    result = host.copy()
    assert result.code == 0, str(result)
    assert [g.ram_copy for g in host.saved()] == ["mapped-ram", "stream"]
    host.back(counts)
    with monitor(guest.guest) as session:
        said = session.execute("human-monitor-command", command_line="xp /1wx 0xfff00000")
    assert said.split()[-1] == "0x00000000"


@full
@pytest.mark.parametrize("delay", [0.0, 0.7])
def test_a_restore_that_is_killed_before_it_is_written_down(host: Copying, builds: Builds, delay: float) -> None:
    """Before the load, or in its middle: what is left of it is ended, for its RAM is in nobody's way but its own."""
    host.volatile(builds("11.1.a"), None, memory="512M")
    counts = host.counts()
    assert host.copy("--ignore", "save-ram-time").code == 0
    process = host.start("restore")
    until(lambda: qemus_of(host.lab), 20)
    time.sleep(delay)
    process.kill()
    process.communicate(timeout=20)
    assert [g.restore.result for g in host.saved()] == ["open"], "it was too late"
    host.back(counts)
    assert qemus_of(host.lab) == [host.guests[0].pid]


@full
def test_a_restore_that_is_killed_when_it_is_written_down(host: Copying, builds: Builds) -> None:
    """It goes on in the QEMU that has the RAM, and is not loaded a second time."""
    host.volatile(builds("10.0"), None)
    counts = host.counts()
    assert host.copy().code == 0
    assert host.call("restore", **{KILL_AT: "loaded"}).code == -9
    (pid,) = qemus_of(host.lab)
    host.guests[0].pid = pid
    host.back(counts)
    assert qemus_of(host.lab) == [pid]
