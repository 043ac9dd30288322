"""Commands about what was done: recover, runs, log."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated

import typer

from cpr.cli.options import Json
from cpr.cli.output import Output, error_json, moment, say, say_error, table
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
    """Runs of this host, the newest last: restarts, reboots, and guests saved by hand."""
    from cpr import app
    from cpr.cli import describe, documents

    restarts = [tuple(group) for _, group in groupby(app.runs(), key=lambda record: record.run)]
    reboots, untold = app.reboots()
    if json:
        entries = [*map(documents.run, restarts), *map(documents.reboot, reboots)]
        entries.sort(key=lambda entry: str(entry["time"]))
        Output(json, "runs").document(runs=entries, unreadable=[error_json(error) for error in untold])
        return Exit.OK
    for error in untold:
        say_error(error)
    dated = [(documents.timestamp(group[0]), [describe.run_row(record) for record in group]) for group in restarts]
    dated += [(moment(it.manifest.time), [describe.reboot_row(it)]) for it in reboots]
    rows = [row for _, several in sorted(dated, key=lambda pair: pair[0]) for row in several]
    say("\n".join(table(("RUN", "GUEST", "ENGINE", "FROM", "TO", "RESULT"), rows)) if rows else "no runs")
    return Exit.OK


def log_command(run: Run, json: Json = False) -> int:
    """One run: the journal of every step and what came out, or what became of every saved guest."""
    from cpr import app
    from cpr.cli import describe, documents

    found = app.log(run)
    if isinstance(found, app.Story):
        if json:
            Output(json, "log").document(**documents.reboot(found))
        else:
            say("\n".join(describe.reboot_lines(found)))
        return Exit.OK
    if json:
        guests = [documents.journal(record) for record in found]
        time = documents.timestamp(found[0])
        Output(json, "log").document(run=run, time=time, mode="restart", guests=guests)
    else:
        say("\n".join(line for record in found for line in describe.journal_lines(record)))
    return Exit.OK
