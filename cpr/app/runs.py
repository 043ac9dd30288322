"""What was done and what was left open: recover, runs, log."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from cpr.app.finish import finish
from cpr.app.update import Update
from cpr.app.world import real_world
from cpr.errors import JournalError, NotFound
from cpr.reboot import store

if TYPE_CHECKING:
    from cpr.app.world import World
    from cpr.journal import Record
    from cpr.model import Outcome


def recover(run_id: str | None, world: World | None = None) -> Update:
    """Finish or undo what was interrupted: one run, or all open ones. A save by hand is named by its manifest's path.

    Raises:
        NotFound: no such run.
    """
    from cpr.recover import recover as recover_runs

    world = world or real_world()
    if run_id is not None and "/" in run_id:
        return Update(run_id=run_id, outcomes=finish(os.path.abspath(run_id), world))
    outcomes: tuple[Outcome, ...] = ()
    found = False
    with contextlib.suppress(NotFound):
        path = store.current()
        if run_id in (None, os.path.basename(os.path.dirname(path))):
            found, outcomes = True, finish(path, world)
    with contextlib.suppress(*((NotFound,) if found else ())):
        outcomes += tuple(outcome for _, outcome in recover_runs(run_id))
    return Update(run_id=run_id or "", outcomes=outcomes)


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
