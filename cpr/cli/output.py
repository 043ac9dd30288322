"""What is printed, and where: results on standard output, everything said on the way on standard error.

Plain aligned columns; colour only underlines what the words say already.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from cpr.errors import Exit

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cpr.errors import CprError
    from cpr.model import Finding

_COLORS = {"blocker": "31", "warning": "33", "note": "2", "error": "31", "bold": "1"}
_color = "auto"


def use_color(when: str) -> None:
    """`auto`, `always` or `never`."""
    global _color
    _color = when


def colored(text: str, kind: str, *, err: bool = False) -> str:
    """`text` in the colour of `kind`, where colour is wanted and seen (NO_COLOR, TERM=dumb and pipes: never)."""
    stream = sys.stderr if err else sys.stdout
    wanted = _color == "always" or (
        _color == "auto" and stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )
    return f"\x1b[{_COLORS[kind]}m{text}\x1b[0m" if wanted else text


class Ended(BaseException):
    """A signal before anything was done: no error of one guest, but the end of the command."""

    def __init__(self, code: Exit) -> None:
        super().__init__("interrupted")
        self.exit_code = code


@dataclass(frozen=True, slots=True)
class Output:
    """How one command answers: as a document or in words."""

    json: bool
    command: str

    def document(self, **content: Any) -> None:
        """The one document of this call."""
        typer.echo(json.dumps({"format": f"cpr.{self.command}/1", **content}, indent=1))

    def failed(self, error: CprError, code: Exit | None = None) -> int:
        """Say what happened, where the guest is now and the way out; returns the exit code."""
        code = error.code if code is None else code
        say_error(error)
        if self.json:
            self.document(status="error", exit_code=int(code), error=error_json(error))
        return int(code)


def say(text: str) -> None:
    """A line of the result."""
    typer.echo(text, color=True)  # coloured or not was decided already


def tell(text: str) -> None:
    """A line on the way."""
    typer.echo(text, err=True, color=True)


def say_error(error: CprError) -> None:
    """What happened, where the guest is now, hint."""
    tell(f"{colored('cpr:', 'error', err=True)} {error.message}")
    if error.code is not Exit.USAGE and error.where:
        tell(f"     now: {error.where}")
    if error.hint:
        tell(f"     hint: {error.hint}")


def error_json(error: CprError) -> dict[str, Any]:
    return {"message": error.message, "kind": type(error).__name__, "where": error.where, "hint": error.hint or None}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Aligned columns; the last one is not padded."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def facts(pairs: Mapping[str, str] | Iterable[tuple[str, str]], indent: str = "  ") -> list[str]:
    """`name  value` lines, aligned; what is empty is left out."""
    known = [(name, value) for name, value in dict(pairs).items() if value]
    width = max((len(name) for name, _ in known), default=0)
    return [f"{indent}{name.ljust(width)}  {value}" for name, value in known]


def finding_lines(findings: Iterable[Finding], indent: str = "  ") -> list[str]:
    """Each finding: severity, id, subject, message; the way out on a line of its own."""
    lines = []
    for finding in findings:
        kind = colored(str(finding.severity), str(finding.severity))
        only = f" (engine {', '.join(finding.engines)})" if finding.engines else ""
        lines.append(f"{indent}{kind} [{finding.check}] {finding.subject}: {finding.message}{only}")
        if finding.hint:
            lines.append(f"{indent}    way out: {finding.hint}")
    return lines


def moment(seconds: float) -> str:
    """A time (seconds since the epoch) as RFC 3339."""
    import datetime

    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat("T", "seconds")
