"""The guest under test, what moves it, and what is well: in the old QEMU, in the new one, on the host."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpr import discover, journal, keeper, survey
from cpr.engines import ENGINES, Request
from cpr.errors import MonitorHeld
from cpr.linux.process import open_process
from cpr.model import MonitorAddress, Netdev, Outcome, Plan, Severity, Step, VncListener, VncServer
from cpr.qemu import features, qmp
from cpr.qemu.options import knowledge_from
from cpr.run import Bounds
from tests.lab import counting
from tests.lab.start import marked
from tests.qemu.conftest import build, qemus_of
from tests.qemu.faults.fault import PATIENCE, Fault, Stage
from tests.qemu.moving import backend, footprint, walk
from tests.qemu.parties import free_port
from tests.qemu.surveying import until
from tests.unit import values

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cpr.model import Guest as Facts
    from cpr.model import Target
    from tests.lab.counting import CountingLog
    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Guest, Lab

QUICK = Bounds(timeout=30.0, max_downtime=1.5)
"""For runs in which something hangs: nobody wants to wait longer."""


@functools.cache
def ask(binary: str) -> Target:
    return features.ask(binary)


def every_step(engine: str = "handover") -> tuple[Step, ...]:
    """The steps of an engine's plan for a guest that has a bit of everything: a `Victim`'s."""
    words = "-object memory-backend-file,id=ram0,size=1G -netdev user,id=u0,hostfwd=tcp:127.0.0.1:2222-:22 -vnc unix:/v"
    guest = replace(
        values.guest(),
        argv=(*values.guest().argv, *words.split()),
        ram=(replace(values.ram(), discard_data=True),),
        netdevs=(Netdev(id="u0", type="user", hostfwd=("tcp:127.0.0.1:2222-:22",)),),
        vnc=(VncServer(id="default", auth="none", listeners=(VncListener("unix", "/v", "", 9),), clients=0),),
    )
    target = replace(values.target(), options=knowledge_from("", []))
    return tuple(ENGINES[engine].steps(guest, target, Request(run_id="20261120T101500-3f2a")))


@dataclass(frozen=True)
class Before:
    """A guest as it was before something happened to it."""

    facts: Facts
    descriptors: tuple[str, ...]
    when: float


@dataclass
class Victim:
    """A counting guest that dirties all of its RAM, and whoever moves it."""

    lab: Lab
    guest: Guest[CountingLog]
    new: QemuBuild
    base: Path
    pid: int
    """Of the QEMU it is in."""
    engine: str = "handover"

    @classmethod
    def start(
        cls,
        lab: Lab,
        old: str = "7.2",
        new: str = "11.1.a",
        *,
        everything: bool = True,
        engine: str = "handover",
        memory: str = "64M",
        **how: Any,
    ) -> Victim:
        """everything: with RAM that would be discarded, a VNC server, a forwarded port."""
        born = build(old)
        words = how.pop("words", ())
        if everything:
            network = f"user,id=u0,hostfwd=tcp:127.0.0.1:{free_port()}-:22"
            words = (*words, "-netdev", network, "-device", "virtio-net-pci,netdev=u0,romfile=")
            words = (*words, "-vnc", f"unix:{lab.directory}/vnc")
            how.setdefault("backend", f"memory-backend-file,share=on,discard-data=on,mem-path={lab.directory}/ram")
        how.setdefault("backend", backend(born, lab))
        guest = lab.counting(born, *words, pace=how.pop("pace", counting.BUSY_PACE), memory=memory, **how)
        return cls(lab, guest, build(new), lab.directory / "run", guest.pid, engine)

    @property
    def target(self) -> Target:
        return ask(str(self.new.binary))

    # moving it

    def facts(self) -> Facts:
        return survey.survey(discover.find(str(self.pid)))

    def plan(self, run_id: str) -> Plan:
        """As `cpr update` would make it, without a rehearsal."""
        guest, engine = self.facts(), ENGINES[self.engine]
        found = [f for f in engine.findings(guest, survey.survey_host(), self.target) if f.severity is Severity.BLOCKER]
        assert not found
        steps = tuple(engine.steps(guest, self.target, Request(run_id=run_id)))
        return Plan(guest=guest, target=self.target, engine=engine.name, reason="test", steps=steps, findings=())

    def handle(self, stage: Stage, *faults: Fault, bounds: Bounds = QUICK) -> keeper.Handle:
        """A keeper at work; this process is its command."""
        run_id = journal.new_run_id()
        with environment(**stage.environment(faults), **self.lab.environment, CPR_DEBUG="1"):
            return keeper.start(self.plan(run_id), run_id=run_id, bounds=bounds, base=str(self.base))

    def play(self, *faults: Fault, bounds: Bounds = QUICK) -> Outcome:
        """A run with faults, to its end; every one of them happened."""
        with Stage(self.lab.directory / "stage") as stage:
            outcome = self.handle(stage, *faults, bounds=bounds).outcome()
            try:
                for _ in faults:
                    stage.wait(0.1)
            except TimeoutError:
                raise AssertionError(f"not all of {faults} happened: {outcome}") from None
        self.follow(outcome.pid_after)
        return outcome

    @contextlib.contextmanager
    def command(self, stage: Stage, *faults: Fault, bounds: Bounds = QUICK) -> Iterator[subprocess.Popen[bytes]]:
        """A command of its own at work, to be killed."""
        run_id = journal.new_run_id()
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.qemu.faults.command"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **stage.environment(faults), **self.lab.environment, "CPR_DEBUG": "1"},
        )
        with process:
            assert process.stdin is not None
            pickle.dump((self.plan(run_id), run_id, bounds, str(self.base)), process.stdin)
            process.stdin.close()
            try:
                yield process
            finally:
                process.kill()

    def kill_both(self, stage: Stage, fault: Fault) -> None:
        """Command and keeper, while the fault waits."""
        with self.command(stage, fault) as command:
            keeper = stage.wait().keeper
            killed(command)
            self.kill(keeper)

    def follow(self, pid: int) -> None:
        """It is in this QEMU now."""
        if pid:
            self.lab.adopt(pid)
            self.pid = pid

    @property
    def monitor(self) -> MonitorAddress:
        return MonitorAddress(label="test", path=str(self.guest.qmp))

    def session(self) -> qmp.Monitor:
        """With whichever QEMU answers on the guest's monitor."""
        return qmp.connect(self.monitor)

    # what is well

    def before(self) -> Before:
        facts = self.facts()
        return Before(facts, self.descriptors(), time.monotonic())

    def descriptors(self) -> tuple[str, ...]:
        """What its QEMU holds, once it has let go of the last session with its monitor."""
        with qmp.connect(self.monitor):
            pass
        with qmp.connect(self.monitor):
            return footprint(self.pid).descriptors

    def counts(self) -> None:
        """It goes on, and has not lost or repeated anything, and its RAM is right as far as it has walked since."""
        self.guest.log.wait_ticks(5)
        self.guest.log.wait_rounds(1)
        assert self.guest.log.sound, self.guest.log.problems()

    def alone(self) -> None:
        """There is one QEMU, and it is the one that the guest is in; no keeper, no helper."""
        until(lambda: list(marked(str(self.lab.directory))) == [self.pid], 5)
        assert qemus_of(self.lab) == [self.pid]

    def closed(self) -> None:
        """No journal is open, nobody holds a lock."""
        files = list(journal.journal_files(str(self.base)))
        assert [path for path in files if journal.read(path).open] == []
        assert self.lock_is_free()

    def lock_is_free(self) -> bool:
        """Whoever wants the guest's lock gets it; a file may be left of a holder that was killed."""
        for path in (self.base / "locks").glob("*"):
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
        return True

    def stands_still(self) -> bool:
        """Nothing was heard of it for a while that is long for a guest with a hundred ticks a second."""
        return time.monotonic() - self.guest.log.ticks[-1].arrived > 0.3

    def last_outcome(self) -> dict[str, Any]:
        """As the newest journal has it."""
        record = journal.read(list(journal.journal_files(str(self.base)))[-1])
        assert record.outcome is not None
        return record.outcome

    def state_of(self, pid: int) -> str:
        """The runstate of a QEMU that nobody else shares the monitor with; "" where it has ended.

        One that was stopped at the switch (engines/doors.py) is let go on, to see what it does then: "silent" if it
        stands in the middle of its migration (engines/stream.py) and says nothing.
        """
        try:
            process = open_process(pid)
        except ProcessLookupError:
            return ""
        with process:
            if not process.alive():
                return ""
            process.signal(signal.SIGCONT)
        try:
            with qmp.connect(self.monitor) as session:
                return str(session.execute("query-status")["status"])
        except MonitorHeld:
            return "silent"

    def kill(self, pid: int) -> None:
        """SIGKILL, and wait until it is gone."""
        with open_process(pid) as process:
            process.kill()
            assert process.wait_dead(10)

    def as_before(self, before: Before, pause: float = 3.0) -> None:
        """It runs in the old QEMU, nothing of the attempt is left, and it never stood still longer than `pause`."""
        self.counts()
        assert self.pid == before.facts.process.pid
        assert self.guest.log.largest_gap(before.when) < pause
        self.alone()
        self.closed()
        facts = self.facts()
        for name in SAME:
            assert getattr(facts, name) == getattr(before.facts, name), name
        assert clients(facts) == clients(before.facts)
        assert self.descriptors() == before.descriptors

    def in_the_new(self, before: Before) -> None:
        """It runs in a new QEMU, alone, with the settings that it had."""
        assert (self.pid == before.facts.process.pid) is (self.engine == "reexec")
        self._with_its_settings(before, self.target.binary.identity)

    def in_the_old_again(self, before: Before) -> None:
        """It was brought back: in the old QEMU, in another process, alone, with the settings that it had."""
        assert self.pid != before.facts.process.pid
        self._with_its_settings(before, before.facts.binary.identity)

    def _with_its_settings(self, before: Before, identity: tuple[int, int]) -> None:
        self.counts()
        self.alone()
        self.closed()
        facts = self.facts()
        assert facts.binary.identity == identity
        same_settings(facts, before.facts)

    def can_be_updated(self) -> None:
        """An ordinary update follows, and all of the RAM is right."""
        old = self.pid
        outcome = self.play()
        assert (outcome.status, outcome.exit_code, outcome.error) == ("updated", 0, ""), outcome
        assert (self.pid == old) is (self.engine == "reexec")
        walk(self.guest)
        self.alone()


SAME = (
    "argv", "runstate", "capabilities", "parameters", "ram", "devices", "chains", "nodes", "vnc", "netdevs", "fdsets",
    "jobs", "blocked_reasons",
)  # fmt: skip
STREAM = ("max-bandwidth", "downtime-limit")


def same_settings(facts: Facts, before: Facts) -> None:
    """Of a guest that was moved: what it was told over its monitor, what it has open, who can connect to it."""
    for name in ("runstate", "machine"):
        assert getattr(facts, name) == getattr(before, name), name
    assert [c.files for c in facts.chains] == [c.files for c in before.chains]
    assert {n for n, on in facts.capabilities if on} == {n for n, on in before.capabilities if on}
    assert {k: facts.parameters[k] for k in STREAM} == {k: before.parameters[k] for k in STREAM}
    assert [b.discard_data for b in facts.ram] == [b.discard_data for b in before.ram]
    assert forwards(facts) == forwards(before)
    assert [[*listener[:3]] for v in facts.vnc for listener in v.listeners] == [
        [*listener[:3]] for v in before.vnc for listener in v.listeners
    ]


def clients(facts: Facts) -> list[tuple[str, bool, int]]:
    return [(c.label, c.connected, c.queued) for c in facts.chardevs if not c.monitor]


@contextlib.contextmanager
def environment(**wanted: str) -> Iterator[None]:
    """os.environ with these, for what is started meanwhile."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def killed(process: subprocess.Popen[Any]) -> None:
    process.kill()
    process.wait(PATIENCE)


def forwards(facts: Facts) -> list[tuple[str, tuple[str, ...]]]:
    return [(n.id, n.hostfwd) for n in facts.netdevs]
