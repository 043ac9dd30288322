"""Move guests under nested KVM from one QEMU to the next, and note what they and their users saw.

The guest counts, its RAM (the counting guest) or its disk, its TCP stream and its clock (the Linux guest) are watched
all the while.  Two QEMUs make a round; with ``--back`` the next round takes the same guest the other way.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.host.inside.silence import describe
from tests.lab import qemu, tap
from tests.lab.linux import LinuxLog
from tests.lab.start import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.counting import CountingLog
    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Guest

START_SECONDS = 90.0
SILENCES: list[str] = []
"""What was to see of each guest that fell silent."""
HZ = 25  # each byte on the console is an exit of the nested guest, and dear
CLOCK_SECONDS = 10.0
"""How long lines are compared with our clock, at most, before an update and behind it."""
MAX_DOWNTIME = "30"
"""All is emulated here, and beside other work a pause of two seconds may be one of ten."""
NICENESS = 10  # of a guest while it is moved: the host VM has one processor, and the Linux guest would take most of it


def note(text: str) -> None:
    """Say how far it has come, for somebody who waits in vain."""
    print(f"{time.monotonic():.1f} {text}", file=sys.stderr, flush=True)


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--guest", choices=("counting", "linux"), default="counting")
    parser.add_argument("--memory", default="256M")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--accel", default="kvm")
    parser.add_argument("--back", action="store_true")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--cpus", type=int, default=1, help="of the Linux guest")
    options = parser.parse_args()
    builds = qemu.obtain(options.old), qemu.obtain(options.new)
    document: dict[str, Any] = {
        "versions": [build.version for build in builds], "starts": [], "rounds": [], "silences": SILENCES,
    }  # fmt: skip
    while len(document["rounds"]) < options.rounds:
        with started(builds[0], options.guest, options.memory, options.accel, options.cpus) as subject:
            document["starts"].append(subject.seconds)
            note(f"counts after {subject.seconds:.1f} s")
            route = [builds[1], builds[0]] * options.rounds if options.back else [builds[1]]
            for target in route[: options.rounds - len(document["rounds"])]:
                document["rounds"].append(subject.move(target, options.engine))
    json.dump(document, sys.stdout)
    return 0


class Subject:
    """A guest and its users.  seconds: from the start of its QEMU until it counted."""

    def __init__(self, lab: Lab, guest: Guest[Any], seconds: float, stream: tap.Stream | None) -> None:
        self.lab = lab
        self.guest = guest
        self.seconds = seconds
        self.stream = stream
        self.pid = guest.pid
        self.ended = 0.0
        """When the last update had, by the monotonic clock."""

    def move(self, target: QemuBuild, engine: str) -> dict[str, Any]:
        """Update it, wait until it has shown that it is well, and say what was seen."""
        log = self.guest.log
        try:
            log.wait_ticks(20, 30)
            if isinstance(log, LinuxLog):
                blocks = log.disk_ok
                log.wait(lambda: log.disk_ok > blocks, 60, "no blocks written and verified")
        except TimeoutError:
            self.look()
            raise
        before = offset(log, max(self.ended, time.monotonic() - CLOCK_SECONDS))
        renice(self.pid, NICENESS)
        note("update")
        began = time.monotonic()
        words = ["update", "--restart", str(self.pid), "--qemu", str(target.binary), "-y", "--json"]
        words += ["--engine", engine, "--max-downtime", MAX_DOWNTIME]
        command = [sys.executable, "-m", "cpr", *words]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - began
        if not done.stdout.startswith("{"):
            return {"status": "no answer", "code": done.returncode, "err": done.stderr[-3000:]}
        (answer,) = json.loads(done.stdout)["guests"]
        with contextlib.suppress(ProcessLookupError, TypeError):
            self.lab.adopt(answer["pid_after"])
        self.pid = answer["pid_after"] or self.pid
        renice(self.pid, 0)
        self.ended = time.monotonic()
        note(f"{answer['status']} after {seconds:.1f} s")
        problems = self._after(began)
        note("watched")
        silence = log.largest_gap(began)
        return {
            "status": answer["status"],
            "same process": answer["pid_before"] == answer["pid_after"],
            "code": done.returncode,
            "blackout": answer.get("blackout_seconds"),
            "seconds": seconds,
            "silence": silence,
            "clock": drift(log, before, self.ended, silence),
            "problems": problems,
            "stream": None if self.stream is None else self.stream.received,
            "error": answer.get("error"),
            "findings": [finding["message"] for finding in answer.get("findings", [])],
        }

    def look(self) -> None:
        """Note what is to see of the guest, which is silent."""
        SILENCES.append(describe(self.pid, self.guest.qmp))
        note(SILENCES[-1])

    def _after(self, began: float) -> list[str]:
        log = self.guest.log
        problems: list[str] = []
        try:
            log.wait_ticks(50, 60)
            if isinstance(log, LinuxLog):
                blocks = log.disk_ok
                log.wait(lambda: log.disk_ok >= blocks + 20, 60, "no blocks written and verified")
            else:
                self.guest.console.send(b"D")
                log.wait_rounds(2, 120)
                self.guest.console.send(b"I")
            self.guest.console.send(b"x\n")
            log.wait(lambda: log.echoed, 10, "the console does not answer")
            if self.stream is not None:
                self.stream.wait_arrivals(20)
        except (TimeoutError, OSError, ValueError) as error:
            problems.append(str(error))
            self.look()
        if self.stream is not None and not self.stream.sound:
            problems.append(f"TCP stream: {self.stream.error}")
        problems += log.problems()
        if problems:
            SILENCES.append(f"its console, before the update at {began:.1f} and after:\n{said(log)}")
        return problems


def renice(pid: int, niceness: int) -> None:
    """Set the niceness of a process and of its whole session, among the others; nothing if it is gone.

    That of its threads would count within the session only.
    """
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        Path("/proc", str(pid), "autogroup").write_text(str(niceness))


def said(log: CountingLog | LinuxLog) -> str:
    """The end of what it said, and before that what was around the first number that is missing; where it has booted
    twice, what came before the second time."""
    text = bytes(log.text).decode("ascii", "replace")
    before = ""
    if isinstance(log, LinuxLog) and log.jumps:
        last, first = (next(tick for tick in log.ticks if tick.number == number) for number in log.jumps[0])
        at = text.find(f"tick {last.number} ")
        before = f"{last} and {first}, and there:\n{text[max(0, at - 500) : at + 1500]!r}\n[...]\n"
    again = text.rfind("Linux version")
    if again > 5000:
        before += text[again - 5000 : again]
    return before + text[-3000:]


def offset(log: CountingLog | LinuxLog, since: float) -> float | None:
    """By how much our clock is ahead of the guest's uptime, in seconds, by the least delayed line since `since`.

    None: it has no clock.
    """
    if not isinstance(log, LinuxLog):
        return None
    with log.changed:
        return min((tick.arrived - tick.uptime for tick in log.ticks if tick.arrived >= since), default=None)


def drift(log: CountingLog | LinuxLog, before: float | None, since: float, silence: float) -> float | None:
    """By how much the guest's clock fell behind ours, in seconds.

    Lines are late where processors are scarce, and never early: until one shows no more than the silence, the next ones
    are awaited. A clock that fell behind stays so.
    """
    until = time.monotonic() + CLOCK_SECONDS
    while True:
        after = offset(log, since)
        if before is None or after is None:
            return None
        if after - before <= silence or time.monotonic() > until:
            return after - before
        time.sleep(0.1)


@contextlib.contextmanager
def started(build: QemuBuild, kind: str, memory: str, accel: str, cpus: int) -> Iterator[Subject]:
    """A guest that counts, with its RAM in a file of tmpfs, which every QEMU leaves out of the stream."""
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab())
        # in huge pages: 512 times fewer faults of the nested guest, each of which takes half a millisecond
        ram = f"memory-backend-file,share=on,mem-path={lab.directory}/ram,align=2M"
        began = time.monotonic()
        if kind == "counting":
            guest: Guest[Any] = lab.counting(
                build, memory=memory, accel=accel, backend=ram, hz=HZ, seconds=START_SECONDS
            )
            seconds = time.monotonic() - began
            guest.log.wait_rounds(1, 120)  # without a halt
            yield Subject(lab, guest, seconds, None)
            return
        network = stack.enter_context(tap.Tap())
        image = lab.directory / "disk"
        with image.open("wb") as file:
            file.truncate(64 << 20)
        guest = lab.linux(
            build,
            *("-smp", str(cpus), "-drive", f"file={image},format=raw,if=virtio", *network.arguments()),
            memory=memory,
            accel=accel,
            backend=ram,
            words=[network.guest_word],
            seconds=START_SECONDS,
        )
        seconds = time.monotonic() - began
        yield Subject(lab, guest, seconds, stack.enter_context(tap.Stream(network.guest)))


if __name__ == "__main__":
    sys.exit(main())
