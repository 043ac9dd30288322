"""Commands about what was done: recover, runs, log."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated

import typer

from cpr.cli.options import Json
from cpr.cli.output import Output, say, table
from cpr.errors import Exit

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run as `cpr runs` names it.")]
OneRun = Annotated[str | None, typer.Argument(metavar="[RUN]", help="One run; default: every open one.")]


def recover_command(run: OneRun = None, json: Json = False) -> int:
    """Finish or undo what was interrupted."""
    from cpr import app
    from cpr.cli import describe, documents

    update = app.recover(run)
    if json:
        Output(json, "recover").document(**documents.updated(update))
    else:
        say("\n".join(describe.update_lines(update)) if update.outcomes else "nothing to recover")
    return update.exit_code


def runs_command(json: Json = False) -> int:
    """Runs of this host, the newest last."""
    from cpr import app
    from cpr.cli import describe, documents

    grouped = [tuple(group) for _, group in groupby(app.runs(), key=lambda record: record.run)]
    if json:
        Output(json, "runs").document(runs=[documents.run(group) for group in grouped])
    elif not grouped:
        say("no runs")
    else:
        rows = [describe.run_row(record) for group in grouped for record in group]
        say("\n".join(table(("RUN", "GUEST", "ENGINE", "FROM", "TO", "RESULT"), rows)))
    return Exit.OK


def log_command(run: Run, json: Json = False) -> int:
    """The journal of one run: every step, and what came out."""
    from cpr import app
    from cpr.cli import describe, documents

    records = app.log(run)
    if json:
        guests = [documents.journal(record) for record in records]
        Output(json, "log").document(run=run, time=documents.timestamp(records[0]), guests=guests)
    else:
        say("\n".join(line for record in records for line in describe.journal_lines(record)))
    return Exit.OK
