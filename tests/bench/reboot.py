"""``python -m tests.bench.reboot``: what a new host kernel under 1, 4, 8 guests takes, by real kexecs in the host VM.

Counting guests with RAM on device DAX under nested KVM; one boot of the host VM, one jump for each number of guests and
run, to and fro between two kernels. The host VM is emulated (TCG, one processor): on hardware every figure is smaller.
A guest that is not sound afterwards makes the exit status 1.

Out of scope: the pause of a restart of QEMU alone (the package's other tables).
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from tests.bench.host import host as machine
from tests.bench.host import load_words
from tests.host import guests, jumps
from tests.host.guests import LASTING, Guest, Lies
from tests.host.jumps import BY_HAND
from tests.host.vm import Host

if TYPE_CHECKING:
    from collections.abc import Sequence

NUMBERS = "1,4,8"
KERNELS = ("7.2", "6.12")
"""Jumped into in turns; the host boots the second one."""
GUEST_MIB, SPARE_MIB = 64, 32
"""Of a guest; and how much larger the memory is that is set aside for it."""
EVENTS = "/state/events"
COLUMNS = ("load", "look", "save", "end", "jump", "restore")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One jump. Seconds: of each part, and for each guest how long it stood still."""

    count: int
    kernel: str
    parts: dict[str, float]
    pauses: tuple[float, ...]
    problems: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Results:
    """All of them."""

    samples: list[Sample] = field(default_factory=list)

    def of(self, count: int) -> list[Sample]:
        return [sample for sample in self.samples if sample.count == count]


def parts(events: Sequence[dict[str, Any]], at: float, restore: float) -> dict[str, float]:
    """What took how long. events: lines of ``--events``. at: when the new kernel's agent answered, by their clock.

    load: of the kernel. look: the guests once more, before the first is paused. save: of all guests, from the first to
    the last. end: of the old QEMUs, with the sync. jump: until the new userland answers.
    """
    begun: dict[str, float] = {}
    for event in events:
        if event.get("event") == "step":
            begun.setdefault(event["text"], datetime.datetime.fromisoformat(event["time"]).timestamp())
    order = ["load the kernel", "look", "save", "end the old QEMUs", "jump into the new kernel"]
    times = [begun[text] for text in order] + [at]
    spans = [end - start for start, end in itertools.pairwise(times)]
    return dict(zip(COLUMNS, [*spans, restore], strict=True))


def table(results: Results) -> str:
    """A row for each number of guests: medians of the parts, and the pauses of all its guests."""
    heads = "".join(f"{name:>9}" for name in COLUMNS)
    lines = [f"{'guests':>6}{'n':>3}{heads}{'pause, s: median':>19}{'min':>7}{'max':>7}"]
    middles: dict[int, dict[str, float]] = {}
    for count in dict.fromkeys(sample.count for sample in results.samples):
        rows = results.of(count)
        middles[count] = middle = {name: statistics.median(row.parts[name] for row in rows) for name in COLUMNS}
        pauses = [pause for row in rows for pause in row.pauses]
        spread = f"{statistics.median(pauses):19.2f}{min(pauses):7.2f}{max(pauses):7.2f}" if pauses else f"{'-':>19}"
        lines.append(f"{count:6}{len(rows):3}" + "".join(f"{middle[name]:9.2f}" for name in COLUMNS) + spread)
        lines += [f"       not sound: {words}" for row in rows for words in row.problems]
    least, most = min(middles, default=0), max(middles, default=0)
    if least != most:
        times = ", ".join(f"{name} {middles[most][name] / middles[least][name]:.1f}" for name in ("save", "restore"))
        lines.append(f"{most} guests take so many times as long as {least}: {times}")
    return "\n".join(lines)


def offset(host: Host) -> float:
    """How much the host VM's clock is ahead of ours, in seconds."""
    before = time.time()
    there = float(host.sh("date +%s.%N"))
    return there - (before + time.time()) / 2


def measure(host: Host, paths: Sequence[str], count: int, kernel: str, key: str, memory: int) -> Sample:
    """Start so many guests, take them over a jump, and end them."""
    started = [
        guests.start(host, key, name=f"guest{number}", memory=f"{memory}M", lies=Lies(LASTING, path))
        for number, path in enumerate(paths[:count])
    ]
    ahead = offset(host)
    jumps.jump(host, kernel, "--all", "--events", EVENTS, *BY_HAND, seconds=600)
    answered = time.time()
    ahead_now = offset(host)
    events = [json.loads(line) for line in host.sh(f"cat {EVENTS}; rm {EVENTS}").splitlines()]
    stopped = {guest["name"]: guest["stopped_at"] - ahead for guest in jumps.saved(host)["guests"]}
    said = jumps.restore(host, seconds=600)
    rows = jumps.back(said)
    # both of the clock of a boot, which is another one by up to a second
    resumed = {name: stopped[name] + ahead + row["blackout_seconds"] - ahead_now for name, row in rows.items()}
    taken = max((row["total_seconds"] for row in rows.values()), default=0.0)
    problems = [] if said.code == 0 else [str(said)]
    for guest in started:
        problems += checked(guest, rows[guest.name]["pid_after"])
    return Sample(
        count=count,
        kernel=kernel,
        parts=parts(events, answered + ahead, taken),
        pauses=tuple(resumed[name] - stopped[name] for name in rows),
        problems=tuple(problems),
    )


def checked(guest: Guest, pid: int) -> list[str]:
    """What is wrong with it; it is ended."""
    guest.pid = pid
    problems = guest.whole(300).problems()
    guest.end()
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.reboot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--guests", default=NUMBERS, metavar="LIST", help=f"how many at a time ({NUMBERS})")
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="jumps for each number (%(default)s)")
    parser.add_argument("--memory", type=int, default=GUEST_MIB, metavar="MIB", help="of each guest (%(default)s)")
    parser.add_argument("--qemu", default="11.1.a", metavar="KEY", help="of the lab (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write every sample there")
    options = parser.parse_args(arguments)
    counts = [int(word) for word in options.guests.split(",")]
    results, before, number = Results(), machine(), 0
    regions = [options.memory + SPARE_MIB] * max(counts)
    with Host(jumps.persistent(regions, kernel=KERNELS[1])) as host:
        paths = jumps.device_dax(host)
        for _ in range(options.runs):
            for count in counts:
                sample = measure(host, paths, count, KERNELS[number % 2], options.qemu, options.memory)
                results.samples.append(sample)
                number += 1
                print(f"{count} guests: {sample}", file=sys.stderr, flush=True)
    after = machine()
    print(f"date    {before.date} to {after.date}\nhost    {before.cpus} x {before.cpu}, the host VM under TCG")
    print(f"busy    load average {load_words(before.load)} before, {load_words(after.load)} after")
    print(f"guest   the counting guest, {options.memory} MiB on device DAX, 1 vCPU, nested KVM, QEMU {options.qemu}\n")
    print(table(results))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"format": "cpr.bench.reboot/1", "samples": [asdict(s) for s in results.samples]}, file, indent=1)
    return int(any(sample.problems for sample in results.samples))


if __name__ == "__main__":
    sys.exit(main())
