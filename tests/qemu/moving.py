"""Guests for tests that move them: how they are started, what a real load makes of their state, what is well.

A verdict of cpr is never held against what somebody expects of two versions, but against a *real load*: the guest's
own state, saved to a file whole, RAM and all, and loaded by an ordinary start of the new QEMU.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpr.errors import MonitorError
from cpr.model import MonitorAddress
from cpr.qemu import qmp
from tests.lab import tap
from tests.lab.counting import CountingLog
from tests.lab.linux import LinuxLog
from tests.qemu.conftest import qemus_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cpr.qemu.qmp import Monitor
    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Guest, Lab
    from tests.qemu.conftest import Command

SAVE_SECONDS = 60.0
LOAD_SECONDS = 30.0


def backend(build: QemuBuild, lab: Lab, name: str = "ram") -> str:
    """RAM that this QEMU leaves out of the stream: any shared memory before 8.1, only named files since."""
    if tuple(map(int, build.version.split(".")[:2])) < (8, 1):
        return "memory-backend-memfd,share=on"
    return f"memory-backend-file,share=on,mem-path={lab.directory}/{name}"


def monitor(guest: Guest[Any]) -> Monitor:
    """A session with whichever QEMU serves the guest's QMP socket now."""
    return qmp.connect(MonitorAddress(label="test", path=str(guest.qmp)))


def argv(pid: int) -> list[str]:
    """The command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]


# -- what a real load makes of it


@dataclass(frozen=True)
class Load:
    """How a real load ended: whether the new QEMU took the state, and what it said where it did not."""

    taken: bool
    words: str = ""

    @property
    def lines(self) -> list[str]:
        """Each of its complaints, without the program's name and without warnings."""
        lines = [line.strip() for line in self.words.splitlines() if "warning:" not in line]
        return [line.partition(": ")[2] or line for line in lines if line]


@dataclass
class Subject:
    """A guest that is going to be moved: how it was born, its images, its network."""

    lab: Lab
    guest: Guest[Any]
    born: QemuBuild
    images: tuple[Path, ...] = ()
    network: tap.Tap | None = None
    words: list[str] = field(default_factory=list)
    """The command line it was born with."""
    twins: int = 0

    def __post_init__(self) -> None:
        self.pid = self.guest.pid
        self.words = argv(self.pid)
        with monitor(self.guest) as session:
            kind = session.execute("qom-get", path="/machine", property="type")
        self.machine = str(kind).removesuffix("-machine")

    def move(self, cpr: Command, target: QemuBuild) -> dict[str, Any]:
        """Update it to `target`; returns what came out."""
        outcome = cpr.update(self.pid, target).guest
        self.pid = int(outcome["pid_after"])
        there = qemus_of(self.lab)
        assert there == [self.pid], f"{there}: there is one QEMU, and it is the one that is told: {outcome}"
        return outcome

    def real_load(self, target: QemuBuild) -> Load:
        """Save the guest as it is now and load that with `target`, beside it. The guest goes on where it was."""
        self.twins += 1
        directory = self.lab.directory / f"t{self.twins}"
        directory.mkdir()
        try:
            state = directory / "state"
            self._save(state, directory)
            if self.network is None:
                return self._load(target, state, directory, {})
            with tap.Tap() as other:
                return self._load(target, state, directory, {f"ifname={self.network.name}": f"ifname={other.name}"})
        finally:
            shutil.rmtree(directory)

    def _save(self, state: Path, directory: Path) -> None:
        with monitor(self.guest) as session:
            speed = session.execute("query-migrate-parameters")["max-bandwidth"]
            session.execute("migrate-set-parameters", max_bandwidth=1 << 40)
            running = session.execute("query-status")["status"] == "running"
            session.execute("stop")
            try:
                session.execute("migrate", uri=f"exec:cat > {state}")
                status = migration_end(session)
                assert status == "completed", f"the guest cannot even be saved: {session.execute('query-migrate')}"
                for image in self.images:
                    shutil.copy(image, directory / image.name)
            finally:
                if running:
                    session.execute("cont")
                session.execute("migrate-set-parameters", max_bandwidth=speed)

    def _load(self, target: QemuBuild, state: Path, directory: Path, renamed: Mapping[str, str]) -> Load:
        words = [str(target.binary), *self.words[1:]]
        for was, is_now in {f"{self.lab.directory}/": f"{directory}/", **renamed}.items():
            words = [word.replace(was, is_now) for word in words]
        at = words.index("-machine") + 1
        words[at] = ",".join([self.machine, *words[at].split(",")[1:]])
        name = f"twin{self.twins}"
        log = self.lab.directory / f"{name}.log"
        process = self.lab.start([*words, "-S", "-incoming", f"exec:cat {state}"], name=name)
        address = MonitorAddress(label="twin", path=str(directory / self.guest.qmp.name))
        end = time.monotonic() + LOAD_SECONDS
        taken = False
        while process.alive and not taken:
            assert time.monotonic() < end, "the twin neither loads nor ends"
            try:
                with qmp.connect(address) as session:
                    taken = migration_end(session, LOAD_SECONDS) == "completed"
            except (OSError, MonitorError):
                process.wait(0.02)  # not listening yet, or it has just ended
        process.kill()
        process.wait(10)
        said = log.read_text(errors="replace")
        assert "Could not open" not in said, f"the twin is not what it should be: {said}"
        return Load(taken, said)


def migration_end(session: Monitor, seconds: float = SAVE_SECONDS) -> str:
    """How the migration ended that is going on."""
    end = time.monotonic() + seconds
    while (status := session.execute("query-migrate").get("status")) not in ("completed", "failed", "cancelled"):
        assert time.monotonic() < end, f"the migration is {status} after {seconds:g} s"
        time.sleep(0.01)
    return str(status)


def agrees(outcome: Mapping[str, Any], load: Load) -> None:
    """Assert that cpr's verdict is the real load's; a refused guest is told in QEMU's own words, and runs."""
    told = f"real load: {load}\ncpr: {outcome}"
    if load.taken:
        assert outcome["status"] == "updated", told
        return
    assert outcome["status"] in ("rolled_back", "blocked"), told
    said = f"{outcome['error']} {[f['message'] for f in outcome['findings']]}"
    assert any(line in said for line in load.lines), told
    assert outcome["runstate"] == "running", told
    assert outcome["pid_after"] == outcome["pid_before"], told


# -- what is well


def walk(guest: Guest[CountingLog]) -> None:
    """Have the counting guest verify all of its RAM as it is now, and assert that nothing is wrong with it."""
    guest.console.send(b"D")
    try:
        guest.log.wait_rounds(2)
    finally:
        guest.console.send(b"I")
    assert guest.log.sound, guest.log.problems()


def goes_on(guest: Guest[LinuxLog]) -> None:
    """Have the Linux guest write and verify its disk and use all of its CPUs, and assert that nothing is wrong."""
    log = guest.log
    disk, cpus = log.disk_ok, dict(log.cpus)
    log.wait_ticks(10)
    if disk >= 0:
        log.wait(lambda: log.disk_ok >= disk + 20, 60, "no blocks written and verified")
    log.wait(lambda: all(log.cpus[n] > count for n, count in cpus.items()), 60, "a CPU does not work")
    assert log.sound, log.problems()


# -- a process from outside


@dataclass(frozen=True)
class Footprint:
    """What a QEMU takes of the host. rss_anon: bytes."""

    argv: tuple[str, ...]
    environ: tuple[str, ...]
    descriptors: tuple[str, ...]
    rss_anon: int
    threads: int


def footprint(pid: int) -> Footprint:
    """The process as it is now; descriptors by what they are, without the numbers that say which one it is."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    environ = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return Footprint(
        argv=tuple(argv(pid)),
        environ=tuple(sorted(filter(None, environ))),
        descriptors=tuple(sorted(kind_of(target) for _, target in descriptors(pid))),
        rss_anon=int(status["RssAnon"].split()[0]) * 1024,
        threads=int(status["Threads"]),
    )


def descriptors(pid: int) -> Iterator[tuple[int, str]]:
    """(number, what it leads to) of every descriptor."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            yield int(name), os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:  # closed meanwhile
            continue


def kind_of(target: str) -> str:
    """``socket:[4711]`` is a socket; a path stays what it is."""
    return target.partition(":")[0] if not target.startswith("/") else target


@dataclass(frozen=True)
class Condition:
    """A QEMU as it looks from outside and as it describes itself."""

    argv: tuple[str, ...]
    environ: tuple[str, ...]
    descriptors: tuple[tuple[int, str], ...]
    told: dict[str, Any]


QUESTIONS = (
    *("query-status", "query-migrate", "query-migrate-capabilities", "query-migrate-parameters", "query-block"),
    *("query-memdev", "query-fdsets", "query-jobs", "query-block-jobs"),
)


def condition(guest: Guest[Any]) -> Condition:
    """Everything of a guest that an update which was refused must not have touched."""
    with monitor(guest) as session:
        told = {question: session.execute(question) for question in QUESTIONS}
    for drive in told["query-block"]:
        drive.get("inserted", {}).get("image", {}).pop("actual-size", None)
    now = footprint(guest.pid)
    return Condition(now.argv, now.environ, tuple(sorted(settled(guest.pid))), told)


def settled(pid: int, seconds: float = 10.0) -> list[tuple[int, str]]:
    """The descriptors of a QEMU, once it has noticed that a client of its monitor has gone."""
    end = time.monotonic() + seconds
    last: list[tuple[int, str]] = []
    while (now := sorted(descriptors(pid))) != last:
        assert time.monotonic() < end
        last = now
        time.sleep(0.05)
    return now


@contextlib.contextmanager
def untouched(lab: Lab, *guests: Guest[CountingLog]) -> Iterator[None]:
    """Assert that what happens inside leaves the guests as they were, and no other QEMU behind."""
    there = qemus_of(lab)
    before = [condition(guest) for guest in guests]
    yield
    assert [condition(guest) for guest in guests] == before
    assert qemus_of(lab) == there
    for guest in guests:
        guest.log.wait_ticks(5)
        assert guest.log.sound, guest.log.problems()
