"""``python -m tests.bench.reboot``: what a new host kernel under 1, 4, 8 guests takes, by real kexecs in the host VM.

Counting guests with RAM on device DAX under nested KVM; one boot of the host VM for each size of them, one jump for
each number of guests and run, to and fro between two kernels. The host VM is emulated (TCG, one processor): on hardware
every figure is smaller. A guest that is not sound afterwards makes the exit status 1.

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
from tests.host.guests import HZ, LASTING, Guest, Lies
from tests.host.jumps import BY_HAND
from tests.host.vm import Host

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.lab.counting import CountingLog

NUMBERS = "1,4,8"
KERNELS = ("7.2", "6.12")
"""Jumped into in turns; the host boots the second one."""
MEMORIES = "64,640"
SPARE_MIB = 32
"""How much larger than a guest the memory is that is set aside for it."""
RUNS = 3
MOST = 6.0
"""Times as long as one guest that saving and restoring eight may take; and growing with RAM is none of it."""
NICENESS = 10
"""Of the guests until they are saved."""
EVENTS = "/state/events"
COLUMNS = ("load", "look", "save", "end", "jump", "restore")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One jump. Seconds: of each part, and for each guest how long it stood still, by our clock and by its own (`seen`:
    the time stamp counter). memory: MiB of each guest.
    """

    count: int
    kernel: str
    parts: dict[str, float]
    pauses: tuple[float, ...]
    memory: int = 64
    seen: tuple[float, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Results:
    """All of them."""

    samples: list[Sample] = field(default_factory=list)

    def rows(self) -> dict[tuple[int, int], list[Sample]]:
        """By memory and number of guests, in the order of the first of each."""
        found: dict[tuple[int, int], list[Sample]] = {}
        for sample in self.samples:
            found.setdefault((sample.memory, sample.count), []).append(sample)
        return found


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
    """A row for each memory and number of guests: medians of the parts, and the pauses of all its guests."""
    heads = "".join(f"{name:>9}" for name in COLUMNS)
    lines = [f"{'MiB':>6}{'guests':>7}{'n':>3}{heads}{'save/guest':>12}{'pause, s: median':>18}{'max':>8}{'seen':>7}"]
    middles: dict[tuple[int, int], dict[str, float]] = {}
    for (memory, count), rows in results.rows().items():
        middles[memory, count] = middle = {n: statistics.median(row.parts[n] for row in rows) for n in COLUMNS}
        pauses = [seconds for row in rows for seconds in row.pauses]
        seen = [seconds for row in rows for seconds in row.seen]
        lines.append(
            f"{memory:6}{count:7}{len(rows):3}"
            + "".join(f"{middle[name]:9.2f}" for name in COLUMNS)
            + f"{middle['save'] / count:12.2f}"
            + (f"{statistics.median(pauses):18.2f}{max(pauses):8.2f}" if pauses else f"{'-':>26}")
            + (f"{max(seen):7.2f}" if seen else f"{'-':>7}")
        )
        lines += [f"       not sound: {words}" for row in rows for words in row.problems]
    return "\n".join([*lines, *_ratios(middles)])


def _ratios(middles: dict[tuple[int, int], dict[str, float]]) -> list[str]:
    """How much longer more guests take than one, and one of more memory."""
    if not middles:
        return []
    memory, least = min(middles)
    one, lines = middles[memory, least], []
    most = max(count for size, count in middles if size == memory)
    largest = max(size for size, _ in middles)
    if most != least:
        times = ", ".join(f"{name} {middles[memory, most][name] / one[name]:.1f}" for name in ("save", "restore"))
        lines.append(f"{most} guests take so many times as long as {least}: {times} (at most {MOST:g})")
    if largest != memory and (largest, least) in middles:
        times = ", ".join(f"{name} {middles[largest, least][name] / one[name]:.2f}" for name in ("save", "restore"))
        lines.append(f"{largest} MiB take so many times as long as {memory}: {times}")
    return lines


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
    for guest in started:  # the host VM has one processor, which eight guests that count would leave little of
        host.sh(f"echo {NICENESS} > /proc/{guest.pid}/autogroup")
    ahead = offset(host)
    jumps.jump(host, kernel, "--all", "--events", EVENTS, *BY_HAND, seconds=1200)
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
        guest.pid = rows[guest.name]["pid_after"]
    seen = [by_its_clock(guest.goes_on(5, 120)) for guest in started]
    pids = " ".join(str(guest.pid) for guest in started)
    host.sh(f"kill -STOP {pids}")  # they are looked through one by one
    for guest in started:
        host.sh(f"kill -CONT {guest.pid}")
        problems += checked(guest).problems()
    return Sample(
        count=count,
        kernel=kernel,
        parts=parts(events, answered + ahead, taken),
        pauses=tuple(resumed[name] - stopped[name] for name in rows),
        memory=memory,
        seen=tuple(seen),
        problems=tuple(problems),
    )


def checked(guest: Guest) -> CountingLog:
    """What it has said, with all of its memory checked; it is ended."""
    log = guest.whole(300)
    guest.end()
    return log


def by_its_clock(log: CountingLog) -> float:
    """The longest time between two lines by the guest's own clock, in seconds; between most of them it is 1 / HZ."""
    usual = statistics.median(b.tsc - a.tsc for a, b in itertools.pairwise(log.ticks))
    return log.largest_tsc_gap() / usual / HZ


def run(results: Results, memory: int, counts: Sequence[int], runs: int, key: str) -> None:
    """So many jumps with each number of guests, in one boot of a host VM."""
    regions = [memory + SPARE_MIB] * max(counts)
    with Host(jumps.persistent(regions, kernel=KERNELS[1])) as host:
        paths = jumps.device_dax(host)
        for number, count in enumerate(count for _ in range(runs) for count in counts):
            sample = measure(host, paths, count, KERNELS[number % 2], key, memory)
            results.samples.append(sample)
            print(f"{count} guests: {sample}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.reboot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--guests", default=NUMBERS, metavar="LIST", help=f"how many at a time ({NUMBERS})")
    parser.add_argument("--runs", type=int, default=RUNS, metavar="N", help="jumps for each number (%(default)s)")
    sizes = f"of each guest; of those behind the first one guest of each ({MEMORIES})"
    parser.add_argument("--memory", default=MEMORIES, metavar="LIST", help=f"MiB {sizes}")
    parser.add_argument("--qemu", default="11.1.a", metavar="KEY", help="of the lab (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write every sample there")
    options = parser.parse_args(arguments)
    counts = [int(word) for word in options.guests.split(",")]
    first, *others = (int(word) for word in options.memory.split(","))
    results, before = Results(), machine()
    for memory, numbers in ((first, counts), *((other, [1]) for other in others)):
        run(results, memory, numbers, options.runs, options.qemu)
    after = machine()
    print(f"date    {before.date} to {after.date}\nhost    {before.cpus} x {before.cpu}, the host VM under TCG")
    print(f"busy    load average {load_words(before.load)} before, {load_words(after.load)} after")
    print(f"guest   the counting guest on device DAX, 1 vCPU, nested KVM, QEMU {options.qemu}")
    print("seen    the longest pause by a guest's own clock\n")
    print(table(results))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"format": "cpr.bench.reboot/1", "samples": [asdict(s) for s in results.samples]}, file, indent=1)
    return int(any(sample.problems for sample in results.samples))


if __name__ == "__main__":
    sys.exit(main())
