"""The counting guest: boots from a disk of its own within a fifth of a second and misses nothing.

`counting.S` says what it does and what it prints.  Here: assembling it (binutils), making a disk of it with
the wanted pace, and understanding its console.

Out of scope: starting a QEMU with it (see ``start``).
"""

import re
import struct
from pathlib import Path
from typing import NamedTuple

from tests.lab import cache, debian, tools
from tests.lab.console import ConsoleLog, largest_gap

SOURCE = Path(__file__).with_name("counting.S")
SECTORS = 4  # that the boot sector loads behind itself
ORIGIN = 0x7C00
HEADER = struct.Struct("<8sIIQ")  # at byte 8 of the disk
HEADER_AT = 8
MAGIC = b"CPRCOUNT"
NO_LIMIT = 0xFFFFFFFF
DISK_SIZE = 1474560  # of a floppy disk, for it can be one too
PAGE = 4096

IDLE_PACE = 8  # pages between two lines of a guest that is said to be idle
BUSY_PACE = 1000  # of one that dirties 400 MB a second, and leaves a processor to others nine tenths of the time


class Tick(NamedTuple):
    """One line of the count: its number, the guest's time stamp counter, and when it arrived."""

    number: int
    tsc: int
    arrived: float


class BadStamp(NamedTuple):
    """A stamp that is not as the guest wrote it.  `want` == `got`: its check word is wrong."""

    address: int
    want: int
    got: int

    @property
    def page(self) -> int:
        """The guest-physical address of the page."""
        return self.address & -PAGE


def disk(path: Path, *, hz: int = 100, pace: int | None = None, limit: int = 0) -> Path:
    """Write a disk with the counting guest to `path`; attach it with `arguments`.

    hz: lines a second, 19 to 10000.  pace: pages walked between two lines once every page was written once;
    None: as many as it can, IDLE_PACE: a guest that mostly halts,
    BUSY_PACE: one that dirties all of its memory all the time.
    limit: bytes of RAM walked, 0: all.
    """
    image = bytearray(program())
    pages = NO_LIMIT if pace is None else pace
    HEADER.pack_into(image, HEADER_AT, MAGIC, hz, pages, limit)
    path.write_bytes(image)
    with path.open("r+b") as file:
        file.truncate(DISK_SIZE)
    return path


def arguments(image: Path) -> list[str]:
    """QEMU's options that attach the disk: IDE on pc machines and AHCI on q35, the quickest to boot."""
    return ["-drive", f"file={image},format=raw,if=ide"]


def program() -> bytes:
    """The guest as the disk's first sectors, assembled if need be.  Raises LabError."""
    return (directory() / "counting.bin").read_bytes()


def directory() -> Path:
    """The artifact that `program` is in."""

    def build(workspace: cache.Workspace) -> None:
        unlinked = workspace.scratch / "counting.o"
        binary = workspace.out / "counting.bin"
        options = ["--64", "--defsym", f"SECTORS={SECTORS}", "-o", str(unlinked)]
        debian.run([*tools.command("as"), *options, str(SOURCE)])
        options = ["-m", "elf_x86_64", f"-Ttext={ORIGIN:#x}", "-e", "start", "--oformat", "binary"]
        debian.run([*tools.command("ld"), *options, "-o", str(binary), str(unlinked)])

    return cache.artifact("counting", f"1 {SECTORS} {ORIGIN} {SOURCE.read_text()}", build)


class CountingLog(ConsoleLog):
    """What the counting guest said.  Numbers are 0 and lists empty until it said something of the kind."""

    def __init__(self) -> None:
        super().__init__()
        self.ticks: list[Tick] = []
        self.lost: list[tuple[int, int]] = []
        self.repeated: list[tuple[int, int]] = []
        self.bad: list[BadStamp] = []
        self.complaints: list[str] = []
        self.bad_in_rounds = 0
        self.starts = 0
        self.pages = 0
        self.round = 0
        self.echoed = bytearray()
        self.garbled: list[str] = []

    @property
    def number(self) -> int:
        """The count as it is now."""
        return self.ticks[-1].number if self.ticks else 0

    @property
    def contiguous(self) -> bool:
        """Nothing of the count was lost or repeated, and no line damaged."""
        return not (self.lost or self.repeated or self.garbled)

    @property
    def sound(self) -> bool:
        """The guest started once, counts without a gap, and found its memory as it left it."""
        found = self.bad or self.complaints or self.bad_in_rounds
        return self.contiguous and self.starts <= 1 and not found

    def largest_gap(self, since: float = 0, until: float | None = None) -> float:
        """The longest silence between two lines of the count, in seconds of time.monotonic."""
        with self.changed:
            return largest_gap([tick.arrived for tick in self.ticks], since, until)

    def largest_tsc_gap(self) -> int:
        """The longest time between two lines by the guest's own clock, in ticks of its time stamp counter."""
        with self.changed:
            return int(largest_gap([tick.tsc for tick in self.ticks]))

    def wait_ticks(self, count: int = 5, seconds: float = 10) -> None:
        """Wait for `count` more lines of the count."""
        end = len(self.ticks) + count
        self.wait(lambda: len(self.ticks) >= end, seconds, f"not {count} more ticks")

    def wait_rounds(self, count: int = 2, seconds: float = 60) -> None:
        """Wait for `count` more rounds; after two, all memory there was at the call has been checked."""
        end = self.round + count
        self.wait(lambda: self.round >= end, seconds, f"not {count} more rounds")

    def problems(self) -> list[str]:
        """Everything that is not as it should be, in words."""
        found = [f"count goes from {a} to {b}" for a, b in self.lost + self.repeated]
        found += [f"page {b.page:#x}: stamp at {b.address:#x} is of {b.got}, not {b.want}" for b in self.bad]
        found += self.complaints + [f"damaged line {line!r}" for line in self.garbled]
        if self.starts > 1:
            found.append(f"the guest started {self.starts} times")
        return found

    def line(self, text: str, when: float) -> None:
        for pattern, understand in self.KINDS:
            if match := pattern.fullmatch(text):
                understand(self, match, when)
                return
        # what the firmware says before, and half a line if we listen from the middle on
        if self.ticks or self.starts > 0:
            self.garbled.append(text)

    def _tick(self, said: re.Match[str], when: float) -> None:
        tick = Tick(int(said[1]), int(said[2], 16), when)
        if self.ticks and tick.number != self.number + 1:
            (self.lost if tick.number > self.number else self.repeated).append((self.number, tick.number))
        self.ticks.append(tick)

    def _round(self, said: re.Match[str], when: float) -> None:
        self.round = int(said[1])
        self.bad_in_rounds += int(said[2])

    def _bad(self, said: re.Match[str], when: float) -> None:
        self.bad.append(BadStamp(int(said[1], 16), int(said[2]), int(said[3])))

    def _complaint(self, said: re.Match[str], when: float) -> None:
        self.complaints.append(said[1])

    def _hello(self, said: re.Match[str], when: float) -> None:
        self.starts += 1
        self.pages = int(said[1])

    def _echo(self, said: re.Match[str], when: float) -> None:
        self.echoed.append(int(said[1], 16))

    def _nothing(self, said: re.Match[str], when: float) -> None:
        pass

    KINDS = (
        (re.compile(r"c (\d+) ([0-9a-f]+)"), _tick),
        (re.compile(r"round (\d+) bad (\d+)"), _round),
        (re.compile(r"BAD page ([0-9a-f]+) want (\d+) got (\d+)"), _bad),
        (re.compile(r"(BAD (?:register|fault).*)"), _complaint),
        (re.compile(r"hello counting 1 pages (\d+) tsc ([0-9a-f]+)"), _hello),
        (re.compile(r"e ([0-9a-f]{2})"), _echo),
        (re.compile(r""), _nothing),
    )
