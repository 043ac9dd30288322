"""What was done and what was left open: recover, runs, reboots, log."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from cpr.app.finish import finish
from cpr.app.update import Update
from cpr.app.world import real_world
from cpr.errors import JournalError, NotFound
from cpr.reboot import store, story

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cpr.app.world import World
    from cpr.errors import CprError
    from cpr.journal import Record
    from cpr.model import Outcome
    from cpr.reboot.story import Story


def recover(run_id: str | None, world: World | None = None) -> Update:
    """Finish or undo what was interrupted: one run, or all open ones. A save by hand is named by its manifest's path.

    Raises:
        NotFound: no such run, or saved guests that nobody can tell of; what was restarted is recovered all the same.
    """
    from cpr.recover import recover as recover_runs

    world = world or real_world()
    if run_id is not None and "/" in run_id:
        return Update(run_id=run_id, outcomes=finish(os.path.abspath(run_id), world))
    path = ""
    outcomes: tuple[Outcome, ...] = ()
    failed: NotFound | None = None
    with contextlib.suppress(NotFound):
        path = store.current()
    mine = bool(path) and run_id in (None, os.path.basename(os.path.dirname(path)))
    if mine:
        try:
            outcomes = finish(path, world)
        except NotFound as error:
            failed = error
    with contextlib.suppress(*((NotFound,) if mine else ())):
        outcomes += tuple(outcome for _, outcome in recover_runs(run_id))
    if failed is not None:
        raise failed
    return Update(run_id=run_id or "", outcomes=outcomes)


def runs() -> tuple[Record, ...]:
    """The journals of this host, oldest first; one that cannot be read is left out here and named by `log`."""
    from cpr import journal

    found = []
    for path in journal.journal_files():
        with contextlib.suppress(JournalError, NotFound):
            found.append(journal.read(path))
    return tuple(found)


def reboots() -> tuple[Sequence[Story], Sequence[CprError]]:
    """Reboots of this host, oldest first; and what keeps others from being told."""
    return story.stories()


def log(run_id: str) -> tuple[Record, ...] | Story:
    """One run: the journals of its guests, or what the manifest of a reboot tells.

    Raises:
        NotFound: there is no such run.
        JournalError, ManifestError: it cannot be read.
    """
    from cpr import journal

    records = tuple(journal.read(path) for path in journal.journal_files(run_id=run_id))
    if records:
        return records
    try:
        found = story.find(run_id)
    except OSError as error:
        raise NotFound(f"no run {run_id!r}, as far as {error.filename} can be read", hint=story.AS_ROOT) from None
    if found is None:
        raise NotFound(f"no run {run_id!r}", hint="cpr runs lists them")
    return found
