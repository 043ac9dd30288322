"""cpr update --kexec: show what would be done, ask once, save all guests, jump."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from cpr.cli.output import say, tell
from cpr.cli.update import open_events, progress_on, signals
from cpr.errors import UNTOUCHED, Exit, Interrupted

if TYPE_CHECKING:
    from cpr.app import Choices, Departure, Jump, RebootCheck, Update
    from cpr.cli.output import Output


def update_kexec(
    guests: list[str], chosen: Choices, wanted: Jump, output: Output, *, dry_run: bool, yes: bool, events: str
) -> int:
    """Called by `update`. Where it returns 0 without --dry-run, the host is going down."""
    from cpr import app

    with signals() as stop, open_events(events) as stream:
        check = app.check_kexec(guests, chosen, wanted)
        if dry_run or not check.possible:
            return _shown(check, output)
        if not yes:
            _ask(check)
        progress = progress_on(sys.stderr, stream)
        left = False

        def leaving(departure: Departure) -> None:
            nonlocal left
            left = True
            progress.close()
            _leaving(departure, output)

        try:
            update = app.perform_reboot(check, chosen, progress, stop, leaving=leaving)
        finally:
            progress.close()
        return update.exit_code if left and update.exit_code is Exit.OK else _told(update, output)


def _shown(check: RebootCheck, output: Output) -> int:
    """What would be done, or why not."""
    from cpr import app
    from cpr.cli import describe, documents

    code = app.worst(check.exit_codes)
    if output.json:
        output.document(**documents.reboot_check(check), run=None, **documents.verdict(code))
    else:
        say("\n".join(describe.reboot_check_lines(check)))
    return code


def _ask(check: RebootCheck) -> None:
    from cpr.cli import describe

    tell("\n".join(describe.reboot_check_lines(check)))
    question = f"Save {len(check.guests)} guest(s) and jump into {check.kexec.release or check.kexec.image}?"
    if not typer.confirm(question, default=False, err=True):
        raise Interrupted("not wanted", where=UNTOUCHED)


def _leaving(departure: Departure, output: Output) -> None:
    """In front of the jump: afterwards nothing may be left that could print."""
    from cpr.cli import describe, documents

    if output.json:
        output.document(**documents.departure(departure))
    else:
        say("\n".join(describe.departure_lines(departure)))
    sys.stdout.flush()


def _told(update: Update, output: Output) -> int:
    from cpr.cli import describe, documents

    if output.json:
        output.document(**{**documents.updated(update), "mode": "reboot"})
    else:
        say("\n".join(describe.update_lines(update)))
    sys.stdout.flush()
    return update.exit_code
