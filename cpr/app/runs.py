"""What was done and what was left open: recover, runs, log."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from cpr.app.update import Update
from cpr.errors import JournalError, NotFound

if TYPE_CHECKING:
    from cpr.journal import Record


def recover(run_id: str | None) -> Update:
    """Finish or undo what was interrupted: one run, or all open ones."""
    from cpr.recover import recover as recover_runs

    return Update(run_id=run_id or "", outcomes=tuple(outcome for _, outcome in recover_runs(run_id)))


def runs() -> tuple[Record, ...]:
    """The journals of this host, oldest first; one that cannot be read is left out here and named by `log`."""
    from cpr import journal

    found = []
    for path in journal.journal_files():
        with contextlib.suppress(JournalError, NotFound):
            found.append(journal.read(path))
    return tuple(found)


def log(run_id: str) -> tuple[Record, ...]:
    """The journals of one run, one for each guest.

    Raises:
        NotFound: there is no such run.
        JournalError: its journal cannot be read.
    """
    from cpr import journal

    records = tuple(journal.read(path) for path in journal.journal_files(run_id=run_id))
    if not records:
        raise NotFound(f"no run {run_id!r}", hint="cpr runs lists them")
    return records
