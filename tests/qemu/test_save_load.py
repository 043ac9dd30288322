"""`cpr save` and `cpr load`: a guest goes to a file and comes back, its RAM staying where it is."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import stat
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.qemu.conftest import qemus_of
from tests.qemu.moving import monitor
from tests.qemu.saving import Subject, changed, shared_memory, virtio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab
    from tests.qemu.conftest import Command

    Builds = Callable[[str], QemuBuild]

full = pytest.mark.full
USER, GROUP = 54321, 54322


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("7.2", "11.1.a"),
        pytest.param("7.2", "7.2", marks=full),
        pytest.param("7.2", "10.0", marks=full),
        pytest.param("10.0", "10.0", marks=full),
        pytest.param("11.1.a", "11.1.a", marks=full),
    ],
)
def test_a_guest_goes_on(lab: Lab, cpr: Command, builds: Builds, old: str, new: str) -> None:
    subject = Subject.start(lab, cpr, builds(old))
    before = subject.guest.log.number
    document = subject.saved("--qemu", builds(new).binary)
    assert document["status"] == "saved"
    assert document["state_bytes"] < 4 << 20, "RAM is in it"
    assert stat.S_IMODE(subject.file.stat().st_mode) == 0o600
    (run,) = cpr("runs", "--json").json["runs"]
    assert (run["mode"], run["counts"], run["next"]) == ("save", {"waiting": 1}, f"cpr load {subject.file}")
    outcome = subject.loaded()
    assert outcome["status"] == "updated"
    assert outcome["runstate"] == "running"
    assert outcome["binary_after"]["path"] == str(builds(new).binary)
    assert os.readlink(f"/proc/{subject.pid}/exe") == str(builds(new).binary)
    assert 0 < outcome["blackout_seconds"] < 60
    subject.counts_on(before)
    assert subject.result() == "restored"
    (run,) = cpr("runs", "--json").json["runs"]
    assert (run["counts"], run["next"]) == ({"back": 1}, None)
    assert not subject.file.exists(), "a state that is void was left"


def test_ram_in_shared_memory_and_a_paused_guest(lab: Lab, cpr: Command, builds: Builds) -> None:
    with shared_memory(lab) as directory:
        subject = Subject.start(lab, cpr, builds("10.0"), ram=directory / "ram")
        subject.stop()
        before = subject.guest.log.number
        subject.saved()
        outcome = subject.loaded()
        assert outcome["runstate"] == "paused"
        assert outcome["blackout_seconds"] is None
        assert subject.status() == "paused"
        subject.cont()
        subject.counts_on(before)


@full
def test_ram_on_a_disk_outlives_the_host(lab: Lab, cpr: Command, builds: Builds) -> None:
    """--mode reboot: a file on a disk is allowed, and on /dev/shm it is not; nobody jumps here."""
    with shared_memory(lab) as directory:
        volatile = Subject.start(lab, cpr, builds("10.0"), name="db1", ram=directory / "ram")
        result = volatile.save(mode="reboot")
        assert result.code == 3, str(result)
        assert "ram-volatile-over-kexec" in result.err
        assert volatile.status() == "running"
        assert not volatile.file.exists()
    volatile.guest.process.kill()
    subject = Subject.start(lab, cpr, builds("10.0"))
    before = subject.guest.log.number
    subject.saved(mode="reboot")
    subject.loaded()
    subject.counts_on(before)


@full
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_a_guest_of_another_user(lab: Lab, cpr: Command, builds: Builds) -> None:
    """It may not open the directory that it is saved in; neither may it execute the copy of its QEMU there."""
    real = builds("10.0")
    become = (f"--reuid={USER}", f"--regid={GROUP}", "--clear-groups", "--no-new-privs", "--bounding-set=-all")
    build = replace(real, binary=Path("/usr/bin/setpriv"), options=(*become, str(real.binary)))
    os.chown(lab.directory, USER, GROUP)
    disk = lab.directory / "web1.disk"
    disk.touch()
    os.chown(disk, USER, GROUP)
    subject = Subject.start(lab, cpr, build)
    mine = lab.directory / "mine"
    mine.mkdir(mode=0o700)
    subject.file = mine / "saved"
    before, ids = subject.guest.log.number, credentials(subject.pid)
    assert f"\t{USER}\t{USER}" in ids
    subject.saved()
    subject.loaded("--qemu", "old")
    assert os.readlink(f"/proc/{subject.pid}/exe").startswith(str(mine))
    assert credentials(subject.pid) == ids
    subject.counts_on(before)


def credentials(pid: int) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith(("Uid", "Gid", "Groups", "Cap", "NoNewPrivs")))


# -- hostile files and moments


EVERYDAY = ("SHA-256 differs", "web1.ram: No such file")


@contextlib.contextmanager
def cut(path: Path) -> Iterator[None]:
    """Half of a file."""
    data = path.read_bytes()
    os.truncate(path, len(data) // 2)
    try:
        yield
    finally:
        with path.open("r+b") as file:
            file.write(data)


@contextlib.contextmanager
def away(path: Path) -> Iterator[None]:
    """The file is not there; and whoever looks must not have made it."""
    hidden = path.with_name("hidden")
    path.rename(hidden)
    try:
        yield
        assert not path.exists(), f"{path} was made"
    finally:
        hidden.rename(path)


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Somebody has written to a disk since."""
    times = path.stat()
    os.utime(path)
    try:
        yield
    finally:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@contextlib.contextmanager
def writable(path: Path) -> Iterator[None]:
    """Anybody could have written the file."""
    path.chmod(0o666)
    try:
        yield
    finally:
        path.chmod(0o600)


def digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


@pytest.mark.parametrize("reasons", [EVERYDAY, pytest.param((), marks=full)], ids=["some", "all"])
def test_what_is_not_what_it_was_is_refused(
    lab: Lab, cpr: Command, builds: Builds, reasons: tuple[str, ...]
) -> None:
    subject = Subject.start(lab, cpr, builds("10.0"))
    before = subject.guest.log.number
    subject.saved()
    disk, middle = lab.directory / "web1.disk", subject.file.stat().st_size // 2
    name_at = subject.manifest.read_bytes().index(b"web1")
    flipped = bytes([subject.file.read_bytes()[middle] ^ 1])
    untouched = digest(subject.file, subject.ram)
    hostile = {
        "bytes when it was saved": cut(subject.file),
        "SHA-256 differs": changed(subject.file, middle, flipped),
        "saved: No such file": away(subject.file),
        "the memory was wiped": changed(subject.ram, 0, bytes(32 << 20)),
        "sampled pages differ": changed(subject.ram, 0, b"another guest's"),
        "web1.ram: No such file": away(subject.ram),
        "where 33554432 are needed": cut(subject.ram),
        "was written since": written(disk),
        "could have been written by others": writable(subject.manifest),
        "damaged, its checksum differs": changed(subject.manifest, name_at, b"web2"),
    }
    for reason, harm in hostile.items():
        if reasons and reason not in reasons:
            continue
        with harm:
            result = subject.load()
            assert result.code in (3, 5), f"{reason}: {result}"
            assert reason in result.err
            assert "not touched" in result.err
        assert digest(subject.file, subject.ram) == untouched, reason
    subject.loaded()
    subject.counts_on(before)
    again = subject.load()
    assert again.code == 3, str(again)
    assert "restored already" in again.err
    assert subject.status() == "running"


@full
def test_a_helper_that_is_not_there(lab: Lab, cpr: Command, builds: Builds) -> None:
    """Its socket is gone: refused before a QEMU was started, in our words; once it listens again the guest goes on."""
    path = lab.directory / "helper"
    with listening(path):
        subject = Subject.start(lab, cpr, builds("10.0"), "-chardev", f"socket,id=helper,path={path}")
        before = subject.guest.log.number
        subject.saved()
    untouched = digest(subject.file, subject.ram)
    result = subject.load()
    assert result.code == 3, str(result)
    assert f"the socket {path} is not there" in result.err
    assert "not touched" in result.err
    assert digest(subject.file, subject.ram) == untouched
    assert qemus_of(lab) == []
    with listening(path):
        subject.loaded()
        subject.counts_on(before)


@contextlib.contextmanager
def listening(path: Path) -> Iterator[None]:
    """Somebody who takes connections and says nothing."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        yield
    path.unlink()


@full
def test_a_live_guest_is_not_loaded_beside_itself(lab: Lab, cpr: Command, builds: Builds) -> None:
    """A copy of state and manifest, loaded while the guest runs from the first: its RAM is in use."""
    subject = Subject.start(lab, cpr, builds("10.0"))
    subject.saved()
    state, known = subject.file.read_bytes(), subject.manifest.read_bytes()
    subject.loaded()
    subject.file.write_bytes(state)
    subject.manifest.write_bytes(known)
    result = subject.load()
    assert result.code == 3, str(result)
    assert f"in use by pid {subject.pid}" in result.err or "sampled pages differ" in result.err
    assert subject.status() == "running"


@full
def test_a_qemu_that_refuses_the_state(lab: Lab, cpr: Command, builds: Builds) -> None:
    """Debian's 11.1 and the virtio devices of a guest born on 10.0: RAM and state stay, and the old QEMU loads it."""
    subject = Subject.start(lab, cpr, builds("10.0"), *virtio(lab))
    before = subject.guest.log.number
    subject.saved()
    untouched = digest(subject.file, subject.ram)
    result = subject.load("--qemu", builds("11.1.a").binary)
    assert result.code == 7, str(result)
    assert "vring" in result.err or "virtio" in result.err, "QEMU's own words"
    assert digest(subject.file, subject.ram) == untouched
    assert subject.result() == "open"
    subject.loaded("--qemu", "old")
    assert os.readlink(f"/proc/{subject.pid}/exe").startswith(str(lab.directory)), "not the copy"
    subject.counts_on(before)


@full
def test_the_old_qemu_where_the_meant_one_refuses(lab: Lab, cpr: Command, builds: Builds) -> None:
    """Nobody has named one at the load, so it comes back at once in the copy of the old one, and that is told.

    When it was saved there was another QEMU at that path, as before an upgrade of the package.
    """
    meant = lab.directory / "qemu-system-x86_64"
    meant.symlink_to(builds("10.0").binary)
    subject = Subject.start(lab, cpr, builds("10.0"), *virtio(lab))
    before = subject.guest.log.number
    subject.saved("--qemu", meant)
    meant.unlink()
    meant.symlink_to(builds("11.1.a").binary)
    result = subject.load()
    assert result.code == 8, str(result)
    assert "did not take it" in result.json["guest"]["error"]
    subject.counts_on(before)


@full
def test_a_state_that_the_meant_qemu_refuses(lab: Lab, cpr: Command, builds: Builds) -> None:
    """Found out while the guest still lives: it is not saved, in QEMU's words, and runs on; nothing is left of it."""
    subject = Subject.start(lab, cpr, builds("10.0"), *virtio(lab))
    before = subject.guest.log.number
    result = subject.save("--qemu", builds("11.1.a").binary)
    assert result.code == 3, str(result)
    assert "state-not-accepted" in result.err
    assert "vring" in result.err or "virtio" in result.err, "QEMU's own words"
    assert "runs as before" in result.err
    assert subject.status() == "running"
    assert list(lab.directory.glob("saved*")) == []
    subject.counts_on(before)


# -- the way back


def test_a_full_disk_and_a_killed_command(lab: Lab, cpr: Command, builds: Builds) -> None:
    """Whatever ends a save, the guest runs on, and nobody has to be called."""
    subject = Subject.start(lab, cpr, builds("10.0"))
    log = subject.guest.log
    result = cpr("save", subject.pid, "/dev/full/state", "--mode", "restart")
    assert result.code not in (0, 7), str(result)
    assert subject.status() == "running"
    for delay in (0.0, 0.1):
        command = cpr.start("save", subject.pid, subject.file, "--mode", "restart")
        until_stopped(subject, delay)
        command.send_signal(signal.SIGKILL)
        command.communicate(timeout=10)
        if not subject.guest.process.alive:
            break  # it was through already
        end = time.monotonic() + 20
        while subject.status() != "running":
            assert time.monotonic() < end, subject.status()
            time.sleep(0.05)
        log.wait_ticks(3, 20)
        with monitor(subject.guest) as session:
            on = {c["capability"] for c in session.execute("query-migrate-capabilities") if c["state"]}
            assert "x-ignore-shared" not in on
        for path in lab.directory.glob("saved*"):
            path.unlink() if path.is_file() else None
        with contextlib.suppress(OSError):
            for path in (lab.directory / "saved.old").iterdir():
                path.unlink()
            (lab.directory / "saved.old").rmdir()


def until_stopped(subject: Subject, delay: float) -> None:
    """Until the save has come so far that there is a manifest, and some time more."""
    end = time.monotonic() + 20
    while not subject.manifest.exists():
        assert time.monotonic() < end
        time.sleep(0.002)
    time.sleep(delay)
