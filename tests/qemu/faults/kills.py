"""Processes of cpr killed at random moments of updates in a row, and what became of the guest each time.

    command      the one that asked for the update        keeper            it does the work
    both         those two                                all               whatever there is of ours but QEMUs
    tracer       the helper that traces the guest, at any moment of its life
    tracer at work      likewise, while the guest's threads stand because of it

The guest is the same one all along, and goes from QEMU to QEMU. After a kill those that are left are let finish, then
`cpr recover` does what is left to do, and the guest is asked how it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cpr import journal
from cpr.linux import proc
from cpr.linux.status import read_stat
from cpr.model import Status
from cpr.recover import recover
from tests.host.inside.silence import threads
from tests.lab.start import marked
from tests.qemu.conftest import build, qemus_of
from tests.qemu.faults.subject import QUICK, Victim, environment, killed, same_settings
from tests.qemu.surveying import until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cpr.model import Guest as Facts
    from cpr.model import Plan
    from tests.lab.start import Lab

CPR = ("command", "keeper", "both", "all")
TRACER = ("tracer", "tracer at work")
KILLED = {"both": ("command", "keeper"), "all": ("keeper", "tracer", "command")}
ROUTE = ("11.1.a", "7.2", "11.1.b", "10.0")
MEMORY = "32M"
PATIENCE = 60.0
CALM = 0.005
"""Seconds without a stop that separate one time at work from the next."""
TRIES = 3
"""How often somebody would call `cpr recover` before giving up."""
UPDATED, UNDONE, BROUGHT_BACK, LOST = "updated", "undone", "brought back", "lost"
OUTCOMES = (UPDATED, UNDONE, BROUGHT_BACK, LOST)
"""In the new QEMU; where it was all along; in the old QEMU, started again; nowhere."""


class Command:
    """A command that has nothing to do yet: started ahead, it waits for its plan (command.py)."""

    def __init__(self, lab: Lab) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.qemu.faults.command"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **lab.environment},
        )

    def begin(self, plan: Plan, run_id: str, base: str) -> None:
        assert self.process.stdin is not None
        pickle.dump((plan, run_id, QUICK, base), self.process.stdin)
        self.process.stdin.close()
        self.process.stdin = None

    def outcome(self) -> dict[str, Any]:
        """What it printed; {} where it was killed."""
        out, _ = self.process.communicate(timeout=PATIENCE)
        value: dict[str, Any] = json.loads(out) if out else {}
        return value

    def close(self) -> None:
        if self.process.poll() is None:
            killed(self.process)
        self.process.communicate()


class Family:
    """The processes below a command, as they appear."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.pids = {"command": command.process.pid}

    def find(self, name: str) -> int | None:
        """Pid of the command's keeper, or of that one's tracer, once it is there."""
        if name not in self.pids:
            parent = self.pids["command"] if name == "keeper" else self.find("keeper")
            word = "cpr.keeper" if name == "keeper" else "cpr.linux.tracer"
            with contextlib.suppress(OSError):
                for child in proc.children(parent) if parent else ():
                    if any(word in argument for argument in proc.read_argv(child)):
                        self.pids[name] = child
        return self.pids.get(name)

    def await_tracer(self) -> int | None:
        """None: the command has ended without."""
        while self.find("tracer") is None:
            if self.command.process.poll() is not None:
                return None
            time.sleep(0.001)
        return self.pids["tracer"]

    def kill(self, name: str) -> bool:
        """Whether it was there."""
        pid = self.find(name)
        if name == "command" and self.command.process.poll() is not None:
            return False
        with contextlib.suppress(ProcessLookupError):
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                return True
        return False


@dataclass
class Timing:
    """Seconds of updates that nobody disturbed."""

    undisturbed: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    """The last ones."""
    tracer: float = 0.0
    stops: list[float] = field(default_factory=list)
    """How long the guest's threads stood each time the tracer was at work."""

    @property
    def total(self) -> float:
        """How long an update may take."""
        return max(self.undisturbed)


@dataclass(frozen=True, kw_only=True)
class Round:
    """One kill, and what came of it."""

    kind: str
    after: float
    """Seconds from the beginning: of the update, of the tracer's life or of its work."""
    became: str
    told: str
    """The status as cpr told it, "" where nothing had begun."""
    recovered: int
    """How often `cpr recover` was called until nothing was left to do."""
    notes: str = ""
    hangups: int = 0
    story: str = ""
    seconds: float = 0.0


class Campaign:
    """Updates of a guest in a row, each with a kill. A context manager."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab = lab
        self.random = random.Random(seed)  # noqa: S311 - to be repeated
        self.timing = Timing()
        self.rounds: list[Round] = []
        self.too_late = 0
        """Strikes that met nobody: not yet there, or there no more."""
        self.descriptors: list[int] = []
        """How many the guest's process had after each round."""
        self._updates = 0
        self._guests = 0
        self._command: Command | None = None
        self._fresh()

    def _fresh(self) -> None:
        name = f"guest{self._guests}"
        self._guests += 1
        ram = f"memory-backend-file,share=on,discard-data=on,mem-path={self.lab.directory}/{name}.ram"
        self.victim = Victim.start(self.lab, name=name, engine="reexec", memory=MEMORY, backend=ram)
        self.born: Facts = self.victim.facts()

    # one update ----------------------------------------------------------------------------------------------

    def begin(self) -> tuple[Family, str]:
        """An update that is on its way to the next QEMU of the route."""
        self._to_another()
        run_id = journal.new_run_id()
        plan = self.victim.plan(run_id)
        same_settings(plan.guest, self.born)
        command, self._command = self._command or Command(self.lab), None
        command.begin(plan, run_id, str(self.victim.base))
        return Family(command), run_id

    def _to_another(self) -> None:
        """The next QEMU of the route that the guest is not in."""
        here = identity_of(self.victim.pid)
        while True:
            self.victim.new = build(ROUTE[self._updates % len(ROUTE)])
            self._updates += 1
            if self.victim.target.binary.identity != here:
                return

    def calibrate(self) -> None:
        """Measure updates that nobody disturbs: two, or more where a busy host lets us see no stop."""
        for number in range(10):
            if number > 1 and self.timing.stops:
                return
            self.standby()
            family, _ = self.begin()
            began = time.monotonic()
            self.timing.stops = []
            tracer = family.await_tracer()
            appeared = time.monotonic()
            while tracer is not None and os.path.exists(f"/proc/{tracer}"):
                if self._await_stop(tracer):
                    stood = time.monotonic()
                    self.timing.stops.append(self._await_calm() - stood)
            self.timing.tracer = time.monotonic() - appeared
            outcome = family.command.outcome()
            assert outcome.get("status") == Status.UPDATED, outcome
            self.timing.undisturbed.append(time.monotonic() - began)
            self.victim.follow(outcome["pid_after"])
            self.victim.counts()
        raise AssertionError("the tracer was never seen at work")

    def standby(self) -> None:
        """Have the next command ready."""
        self._command = self._command or Command(self.lab)

    def _stands(self) -> bool:
        """The guest's main thread is in a tracing stop."""
        with contextlib.suppress(OSError), open(f"/proc/{self.victim.pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "t"
        return False

    def _await_stop(self, tracer: int) -> bool:
        """False: there is no tracer any more."""
        while not self._stands():
            if not os.path.exists(f"/proc/{tracer}"):
                return False
        return True

    def _await_calm(self) -> float:
        """When it stood last."""
        last = time.monotonic()
        while (now := time.monotonic()) - last < CALM:
            if self._stands():
                last = now
        return last

    # the kill ------------------------------------------------------------------------------------------------

    def round(self, kind: str) -> None:
        """An update with a kill of this kind, and all that follows. It counts where somebody was there to be killed."""
        began = time.monotonic()
        before = self.victim.pid, identity_of(self.victim.pid)
        family, run_id = self.begin()
        hit, after = self._strike(kind, family)
        outcome = family.command.outcome()
        self._finished(family)
        told, recovered, notes = self._recovered(run_id, outcome)
        became, problem = self._became(before)
        self.standby()
        if became != LOST:
            problem = problem or self._counts()
            became = LOST if problem else became
        result = Round(
            kind=kind,
            after=after,
            became=became,
            told=told,
            recovered=recovered,
            notes=notes,
            hangups=self.victim.guest.console.hangups,
            story=f"{problem}\n{self._story(run_id)}" if problem else "",
            seconds=time.monotonic() - began,
        )
        self.descriptors.append(len(os.listdir(f"/proc/{self.victim.pid}/fd")) if became != LOST else 0)
        if hit:
            self.rounds.append(result)
        else:
            self.too_late += 1
            assert became == UPDATED, f"nobody was killed: {result}"
            self.timing.undisturbed.append(outcome["total_seconds"])
        if became == LOST:
            self._end_qemus()
            self._fresh()

    def _strike(self, kind: str, family: Family) -> tuple[bool, float]:
        """Whether somebody was there, and when that was."""
        if kind not in TRACER:
            after = self.random.uniform(0, self.timing.total)
            time.sleep(after)
            hits = [family.kill(name) for name in KILLED.get(kind, (kind,))]
            if kind == "all":
                self._end_all_of_ours()
                until(self.victim.lock_is_free, 10)  # one that was writing to a busy disk takes its time to die
            return any(hits), after
        tracer = family.await_tracer()
        if tracer is None:
            return False, 0.0
        after = self.random.uniform(0, self.timing.tracer)
        if kind == "tracer at work":
            which = self.random.randrange(len(self.timing.stops))
            for _ in range(which):
                self._await_stop(tracer)
                self._await_calm()
            self._await_stop(tracer)
            after = self.random.uniform(0, self.timing.stops[which])
        time.sleep(after)
        return family.kill("tracer"), after

    def _end_all_of_ours(self) -> None:
        while rest := list(self._ours()):
            for pid in rest:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _ours(self) -> Iterator[int]:
        """Processes that are no QEMU, or none yet."""
        for pid in marked(str(self.lab.directory)):
            with contextlib.suppress(OSError):
                if "qemu-system" not in os.readlink(f"/proc/{pid}/exe"):
                    yield pid

    def _finished(self, family: Family) -> None:
        """Whoever was not killed has come to an end, and who was has let go of the guest's lock."""
        family.command.close()
        until(lambda: not list(self._ours()) and not any(map(lives, family.pids.values())), PATIENCE)

    # what became of it ---------------------------------------------------------------------------------------

    def _recovered(self, run_id: str, outcome: dict[str, Any]) -> tuple[str, int, str]:
        """Call `cpr recover` until it has nothing to do: (status as told last, how often it had, what was remarked)."""
        told = outcome or self._journal(run_id)
        calls = 0
        notes = []
        with environment(**self.lab.environment):
            for _ in range(TRIES):
                found = [o for _, o in recover(base=str(self.victim.base))]
                if not found:
                    break
                calls += 1
                told = journal.outcome_json(found[-1])
                notes.append(f"{told['status']} {told['exit_code']}")
                if told["status"] == Status.NEEDS_ATTENTION:
                    time.sleep(0.3)
        remark = re.sub(r"/\S+|\d+(\.\d+)*", "N", str(told.get("error") or "")) if told else ""
        said = " ".join(notes[:-1]) + (f" {remark}" if told.get("exit_code") not in (0, None) else "")
        return str(told.get("status", "")), calls, said.strip()

    def _journal(self, run_id: str) -> dict[str, Any]:
        """The outcome that a keeper left to itself wrote down; {}: there is none."""
        for path in journal.journal_files(str(self.victim.base), run_id):
            return journal.read(path).outcome or {}
        return {}

    def _became(self, before: tuple[int, tuple[int, int]]) -> tuple[str, str]:
        """Which of the outcomes, and what is wrong, if anything is."""
        with contextlib.suppress(AssertionError):
            until(lambda: len(qemus_of(self.lab)) == 1, 10)
        there = qemus_of(self.lab)
        if len(there) != 1:
            return LOST, f"{len(there)} QEMUs are there: {there}" if there else "its process is gone"
        (pid,) = there
        self.victim.follow(pid)
        identity = identity_of(pid)
        if identity == self.victim.target.binary.identity:
            return UPDATED, "" if pid == before[0] else f"it was pid {before[0]} and is {pid}"
        assert identity == before[1]
        return (UNDONE if pid == before[0] else BROUGHT_BACK), ""

    def _counts(self) -> str:
        """What is wrong with the guest."""
        try:
            self.victim.counts()
        except (AssertionError, TimeoutError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def _story(self, run_id: str) -> str:
        """What is on record of a guest that was lost."""
        found = []
        for path in journal.journal_files(str(self.victim.base), run_id):
            with open(path, "rb") as file:
                found.append(file.read().rstrip(b"\0").decode()[-4000:])
        log = self.lab.directory / f"guest{self._guests - 1}.log"
        there = [threads(pid) for pid in qemus_of(self.lab)]
        return "\n".join([*found, *there, log.read_text(errors="replace")[-1000:]])

    def _end_qemus(self) -> None:
        """Those that are left of a guest that was lost, so that the next one is judged by itself."""
        for pid in qemus_of(self.lab):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not qemus_of(self.lab), 10)

    # the table -----------------------------------------------------------------------------------------------

    @property
    def lost(self) -> list[Round]:
        return [r for r in self.rounds if r.became == LOST]

    def table(self) -> str:
        """Kills and outcomes by kind, and what else is worth knowing."""
        kinds: Sequence[str] = [k for k in (*CPR, *TRACER) if any(r.kind == k for r in self.rounds)]
        rows: list[tuple[str, ...]] = [("killed", "times", *OUTCOMES, "recover", "twice")]
        for kind in (*kinds, "together"):
            mine = [r for r in self.rounds if kind in (r.kind, "together")]
            count = Counter(r.became for r in mine)
            calls = [sum(r.recovered >= n for r in mine) for n in (1, 2)]
            rows.append((kind, *map(str, (len(mine), *(count[o] for o in OUTCOMES), *calls))))
        lines = ["  ".join(word.rjust(12) if n else word.ljust(15) for n, word in enumerate(row)) for row in rows]
        stops = ", ".join(f"{stop * 1000:.1f}" for stop in self.timing.stops)
        spent = sorted(r.seconds for r in self.rounds)
        lines += [
            f"an update {self.timing.total:.2f} s, its tracer {self.timing.tracer:.2f} s, at work {stops} ms; "
            f"a round {spent[len(spent) // 2]:.2f} s; {self.too_late} strikes met nobody; "
            f"descriptors {self.descriptors[0]} to {self.descriptors[-1]}; hang-ups {self.rounds[-1].hangups}",
        ]
        remarks = Counter(f"{r.kind}: {r.notes}" for r in self.rounds if r.notes)
        lines += [f"{number} x {remark}" for remark, number in remarks.most_common(20)]
        lines += [f"LOST: {r.kind} after {r.after:.4f} s, told {r.told}: {r.story}" for r in self.lost]
        return "\n".join(lines)

    def close(self) -> None:
        if self._command is not None:
            self._command.close()
            self._command = None

    def __enter__(self) -> Campaign:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lives(pid: int) -> bool:
    """It has not ended, or is about to: a process that is being killed keeps its descriptors for a moment."""
    try:
        return read_stat(pid).state not in ("Z", "X")
    except ProcessLookupError:
        return False


def identity_of(pid: int) -> tuple[int, int]:
    """Of the program that a process runs: device and inode."""
    status = os.stat(f"/proc/{pid}/exe")
    return status.st_dev, status.st_ino
