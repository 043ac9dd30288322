"""``python -m tests.bench``: measure, and print the table. See the package for what is measured.

Without options dozens of rows are measured 15 times, which takes hours; --quick takes five minutes. The table goes to
standard output, a line for each sample to standard error. Ctrl-C ends it with the table so far. The exit status is 1
if cpr failed to move a guest; what else fails is a finding and stands under the table.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from typing import TYPE_CHECKING

from tests.bench import measure, table
from tests.bench.guest import LOADS, Case
from tests.bench.host import host
from tests.bench.measure import Cell
from tests.bench.ways import WAYS
from tests.lab import LabError, qemu
from tests.lab.start import kvm_works

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

UNITS = {"K": 10, "M": 20, "G": 30}
RUNS, QUICK_RUNS = 15, 3
SIZES, QUICK_SIZES = "256M,1G,8G", "256M"
PAIRS = "7.2:11.1.a,11.1.a:11.1.b"


def size(text: str) -> int:
    """256M in bytes."""
    if not text[:-1].isdecimal() or text[-1:].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 256M or 8G")
    return int(text[:-1]) << UNITS[text[-1].upper()]


def sizes(text: str) -> list[int]:
    """Some of them."""
    return [size(part) for part in text.split(",")]


def pairs(text: str) -> list[tuple[str, str]]:
    """Keys of the lab's QEMUs, as OLD:NEW."""
    found = [tuple(part.split(":")) for part in text.split(",")]
    for pair in found:
        if len(pair) != 2 or not set(pair) <= set(qemu.SUITES):
            known = ", ".join(qemu.SUITES)
            raise argparse.ArgumentTypeError(f"{':'.join(pair)!r} is not OLD:NEW of {known}")
    return [(pair[0], pair[1]) for pair in found]


def runs(text: str) -> int:
    """At least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of runs")
    return int(text)


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """What turns a list of words into those words, all of which must be known."""

    def words(text: str) -> list[str]:
        for word in text.split(","):
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(known)}")
        return text.split(",")

    return words


def parser() -> argparse.ArgumentParser:
    """The options."""
    it = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").splitlines()[0])
    it.add_argument("--quick", action="store_true", help=f"{QUICK_RUNS} runs of {QUICK_SIZES} if not said otherwise")
    it.add_argument("--runs", type=runs, metavar="N", help=f"rounds ({RUNS})")
    it.add_argument("--sizes", type=sizes, metavar="LIST", help=f"of the guest's RAM ({SIZES})")
    it.add_argument("--pairs", type=pairs, default=PAIRS, metavar="LIST", help=f"OLD:NEW of the lab ({PAIRS})")
    it.add_argument("--load", type=some_of(LOADS), default=list(LOADS), metavar="LIST", help=",".join(LOADS))
    it.add_argument("--ways", type=some_of([*WAYS]), default=[*WAYS], metavar="LIST", help=",".join(WAYS))
    it.add_argument("--accel", choices=("tcg", "kvm"), default="tcg", help="what runs the guest (%(default)s)")
    it.add_argument("--json", metavar="FILE", help="write every sample there")
    return it


def cells(options: argparse.Namespace) -> list[Cell]:
    """All rows of the table. Raises LabError if a QEMU cannot be had."""
    builds = {key: qemu.obtain(key) for key in dict.fromkeys(key for pair in options.pairs for key in pair)}
    for build in builds.values():
        if options.accel == "kvm" and not kvm_works(build):
            raise LabError(f"guests of {build} do not run under KVM here")
    cases = [
        Case(old=builds[old], new=builds[new], size=each, load=load, accel=options.accel)
        for old, new in options.pairs
        for each in options.sizes or sizes(QUICK_SIZES if options.quick else SIZES)
        for load in options.load
    ]
    return [Cell(case, WAYS[way]) for case in cases for way in options.ways]


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = parser().parse_args(arguments)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))  # so that everything started is ended
    status = 0
    try:
        before = host()
        results = measure.plan(cells(options), options.runs or (QUICK_RUNS if options.quick else RUNS))
        try:
            measure.run(results, say)
        except KeyboardInterrupt:
            say("interrupted; this is the table so far")
            status = 130
        after = host()
    except LabError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(table.page(results, before, after))
    if options.json:
        partial = f"{options.json}.partial"
        with open(partial, "w") as file:
            json.dump(table.document(results, before, after), file, indent=1)
            file.write("\n")
        os.replace(partial, options.json)
    return status or int(any(sample.failed and sample.cell.way.ours for sample in results.samples))


if __name__ == "__main__":
    sys.exit(main())
