"""The page that is printed, and the document with the same figures and every single sample.

Values in, text out; nothing is measured or judged here.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tests.bench.guest import HZ, Case, size_name
from tests.bench.host import Host, load_words
from tests.lab.counting import IDLE_PACE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.bench.measure import Cell, Results, Sample

COLUMNS = f"{'':18}{'blackout, ms':^25}{'total, s':^23}{'':5}{'kept':>15}\n" + (
    f"  {'way':16}{'median':>9}{'min':>8}{'max':>8}{'median':>9}{'min':>7}{'max':>7}{'n':>5}"
    f"{'pid':>6}{'connection':>13}{'RAM':>6}"
)


@dataclass(frozen=True)
class Summary:
    """Of some figures."""

    median: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, figures: Sequence[float]) -> Summary:
        """Of at least one."""
        return cls(statistics.median(figures), min(figures), max(figures), len(figures))


def blackout(results: Results, cell: Cell) -> Summary | None:
    """The blackouts of a cell in seconds, None without a good sample."""
    figures = [sample.blackout for sample in results.good(cell)]
    return Summary.of(figures) if figures else None


class Notes:
    """Remarks under the table, each with a number that rows refer to."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def add(self, text: str) -> str:
        """The reference to a remark; the same remark has one number."""
        if text not in self._texts:
            self._texts.append(text)
        return f" [{self._texts.index(text) + 1}]"

    @property
    def lines(self) -> list[str]:
        return [f"[{number}] {text}" for number, text in enumerate(self._texts, 1)]


def page(results: Results, before: Host, after: Host) -> str:
    """Header, one block a case, and what is to be said about some rows."""
    notes = Notes()
    blocks = [block(results, case, notes) for case in results.cases]
    return "\n".join([*header(results, before, after), "", COLUMNS, *blocks, "", *notes.lines])


def header(results: Results, before: Host, after: Host) -> list[str]:
    """Where, when and what."""
    builds = dict.fromkeys(build for case in results.cases for build in (case.old, case.new))
    accelerators = ", ".join(sorted({case.accel for case in results.cases}))
    return [
        f"date    {before.date} to {after.date}",
        f"host    {before.kernel}, {before.cpus} x {before.cpu}",
        f"busy    load average {load_words(before.load)} before, {load_words(after.load)} after",
        f"runs    {results.runs}, in turns: each round measures every row once, with a new guest each",
        *(f"QEMU    {str(build).removeprefix('QEMU ')}" for build in builds),
        f"guest   the counting guest, 1 vCPU, {accelerators}, all of its RAM in use",
        f"load    idle: it writes {IDLE_PACE * HZ} pages a second; dirty: all of its RAM, again and again",
        "Blackout: STOP event of the old to RESUME event of the new QEMU, by their own timestamps. Total: from the",
        "first action to the guest in its new QEMU and the old one gone; for handover the whole call of `cpr update`.",
        "A row's samples count only if the guest goes on counting without a gap and finds all of its RAM intact.",
    ]


def block(results: Results, case: Case, notes: Notes) -> str:
    """The rows of a case."""
    title = f"\n{case.old.version} -> {case.new.version}, {size_name(case.size)}, {case.load}"
    return "\n".join([title, *(row(results, cell, notes) for cell in results.cells if cell.case == case)])


def row(results: Results, cell: Cell, notes: Notes) -> str:
    """The line of a cell."""
    name, good, failed = cell.way.name, results.good(cell), [one for one in results.of(cell) if one.failed]
    marks = notes.add(f"{name}: {results.missing[cell]}") if cell in results.missing else ""
    if failed:
        tried = len(good) + len(failed)
        given_up = ", not tried again" if results.hopeless(cell) else ""
        marks += notes.add(f"{cell}: {len(failed)} of {tried} failed{given_up}: {failed[0].failed[:400]}")
    if not good:
        return f"  {name:16}{'-':>9}{marks}"
    spans = (Summary.of([one.blackout * 1000 for one in good]), Summary.of([one.seconds for one in good]))
    dark, total = spans
    return (
        f"  {name:16}{dark.median:9.1f}{dark.least:8.1f}{dark.most:8.1f}"
        f"{total.median:9.2f}{total.least:7.2f}{total.most:7.2f}{dark.count:5}"
        f"{kept(good, 'pid'):>6}{kept(good, 'connection'):>13}{kept(good, 'ram'):>6}{marks}"
    )


def kept(samples: Iterable[Sample], what: str) -> str:
    """yes, no, so many of so many, or - where there was nothing to keep."""
    answers = [getattr(one.kept, what) for one in samples if one.kept is not None]
    answers = [answer for answer in answers if answer is not None]
    if not answers:
        return "-"
    if len(set(answers)) == 1:
        return "yes" if answers[0] else "no"
    return f"{sum(answers)}/{len(answers)}"


def document(results: Results, before: Host, after: Host) -> dict[str, Any]:
    """Everything as JSON: seconds and bytes as numbers."""
    return {
        "format": "cpr.bench/1",
        "runs": results.runs,
        "before": asdict(before),
        "after": asdict(after),
        "cells": [
            {
                **cell_document(cell),
                "missing": results.missing.get(cell),
                "samples": [
                    {"failed": one.failed}
                    if one.failed or one.kept is None
                    else {"blackout_seconds": one.blackout, "total_seconds": one.seconds, "kept": asdict(one.kept)}
                    for one in results.of(cell)
                ],
            }
            for cell in results.cells
        ],
    }


def cell_document(cell: Cell) -> dict[str, Any]:
    """What a cell is about."""
    case = cell.case
    return {
        "old": {"version": case.old.version, "package": case.old.package},
        "new": {"version": case.new.version, "package": case.new.package},
        "ram_bytes": case.size,
        "load": case.load,
        "accel": case.accel,
        "way": cell.way.name,
    }
