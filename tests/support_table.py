"""What was moved from where to where, as the page of docs/support.md. Values in, text out."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from tests.bench.host import Host, load_words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.lab.qemu import QemuBuild

HEAD = """\
# What was tested with what

Written by `tox -e full` (`pytest --support-table=FILE`), not by hand.

A verdict here is one of the day, of these builds. No test asserts it: each asserts that cpr's verdict is what a real
load of the same guest's state does, that a refused guest runs on where it was, and that one that went over lost nothing
of its RAM, count, disk and connections.

"Born" is the QEMU that the guest was booted in; its state keeps the marks of it. "RAM" in a guest's description is
moved in place, never copied. Blackout: STOP event of the old to RESUME event of the new QEMU, by their own timestamps,
in ms, under TCG on the machine below and with whatever else ran there; `tox -e bench` is the place for figures to
compare.
"""


@dataclass(frozen=True, kw_only=True)
class Move:
    """One update of one guest. blackout: seconds, None where the guest never stood still."""

    born: str
    old: str
    new: str
    machine: str
    guest: str
    status: str
    words: str
    blackout: float | None
    packages: tuple[str, ...]
    """The builds concerned, as they are to be listed above the table."""

    @classmethod
    def of(
        cls,
        born: QemuBuild,
        old: QemuBuild,
        new: QemuBuild,
        outcome: Mapping[str, Any],
        *,
        machine: str,
        guest: str,
    ) -> Self:
        """From the outcome as `cpr update --json` has it."""
        blocking = [f["message"] for f in outcome["findings"] if f["severity"] == "blocker"]
        return cls(
            born=born.version,
            old=old.version,
            new=new.version,
            machine=machine,
            guest=guest,
            status=outcome["status"],
            words="" if outcome["status"] == "updated" else quoted("; ".join(blocking) or outcome["error"] or ""),
            blackout=outcome["blackout_seconds"] if outcome["status"] == "updated" else None,
            packages=tuple(dict.fromkeys(map(str, (born, old, new)))),
        )

    @property
    def row(self) -> tuple[str, ...]:
        """Moves of one row have this in common."""
        return self.old, self.new, self.born, self.machine, self.guest


def quoted(error: str) -> str:
    """QEMU's own words in an error, where it has any."""
    found = re.search(r'"(.*)"', error)
    return (found[1] if found else error).replace("qemu-system-x86_64: ", "")


def page(moves: Sequence[Move], before: Host, after: Host) -> str:
    """The whole document."""
    packages = sorted({package for move in moves for package in move.packages}, key=numbers)
    rows = sorted({move.row for move in moves}, key=lambda row: (row[4], *map(numbers, row[:4])))
    notes: list[str] = []
    guests = dict.fromkeys(row[4] for row in rows)
    parts = [HEAD, *facts(packages, before, after)]
    for guest in guests:
        parts += ["", f"## {guest}", "", *table([r for r in rows if r[4] == guest], moves, notes)]
    if notes:
        parts += ["", "## In QEMU's own words", "", *(f"{n}. `{text}`" for n, text in enumerate(notes, 1))]
    return "\n".join(parts) + "\n"


def facts(packages: Sequence[str], before: Host, after: Host) -> list[str]:
    """Where, when and with what."""
    return [
        f"- Date: {before.date} to {after.date}",
        f"- Host: {before.kernel}, {before.cpus} x {before.cpu}",
        f"- Load: {load_words(before.load)} before, {load_words(after.load)} after",
        *(f"- {package}" for package in packages),
    ]


def table(rows: Sequence[tuple[str, ...]], moves: Sequence[Move], notes: list[str]) -> list[str]:
    """The rows of one kind of guest; `notes` grows by what QEMU said."""
    lines = [
        "| from | to | born | machine | result | n | blackout median | min | max |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mine = [move for move in moves if move.row == row]
        cells = [*row[:4], result(mine, notes), str(len(mine)), *blackout(mine)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def result(moves: Sequence[Move], notes: list[str]) -> str:
    """What came out, how often where it was not always the same, with the numbers of the notes."""
    counts = Counter(move.status for move in moves)
    refused = {"rolled_back": "refused, undone"}
    words = [refused.get(s, s) + (f" ({n})" if len(counts) > 1 else "") for s, n in counts.most_common()]
    for text in dict.fromkeys(move.words for move in moves if move.words):
        if text not in notes:
            notes.append(text)
        words.append(f"[{notes.index(text) + 1}]")
    return " ".join(words)


def blackout(moves: Sequence[Move]) -> tuple[str, str, str]:
    """Median, least and most in ms."""
    figures = [move.blackout * 1000 for move in moves if move.blackout is not None]
    if not figures:
        return "", "", ""
    return f"{statistics.median(figures):.1f}", f"{min(figures):.1f}", f"{max(figures):.1f}"


def numbers(text: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts 7.2 before 10.0."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text) if part)
