"""cpr run: start a guest that can be updated later."""

from __future__ import annotations

from typing import Annotated

import typer

from cpr.cli.options import Json
from cpr.cli.output import Output, say, tell
from cpr.errors import Exit

Arguments = Annotated[
    list[str], typer.Argument(metavar="-- QEMU ARGS...", help="The QEMU and its command line, after --.")
]
Name = Annotated[str, typer.Option("--name", metavar="NAME", help="The guest's name (-name).")]
Pidfile = Annotated[str, typer.Option("--pidfile", metavar="FILE", help="Where its pid is written; updates keep it.")]
Timeout = Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="Until its monitor has to answer.")]


def run_command(
    arguments: Arguments, *, name: Name = "", pidfile: Pidfile = "", timeout: Timeout = 30.0, json: Json = False
) -> int:
    """Start a guest, detached, that can be live-updated later: its RAM shared, a QMP socket at hand."""
    from cpr import app
    from cpr.cli import documents

    started = app.run(arguments, name=name, pidfile=pidfile, timeout=timeout)
    for text in started.notes:
        tell(f"cpr: {text}")
    if json:
        Output(json, "run").document(guest=documents.started(started))
    else:
        say(f"{started.name or 'guest'}: pid {started.pid}, monitor {started.monitor}, log {started.log}")
    return Exit.OK
