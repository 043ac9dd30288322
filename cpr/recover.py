"""Finish or undo what was interrupted: read the journals that nobody closed, and act on what they say.

Before the commit line: the new QEMU is killed, and only when it is dead the old one goes on. After it: the old QEMU is
never resumed, because the new one may have run over the same RAM; the new one is told to go on if it is there, and if
it is not, the guest has crashed and a person must know. A journal of another boot is closed and never acted on; one
whose keeper lives is left alone.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from cpr import errors
from cpr.engines.doors import go_on
from cpr.engines.successor import run_mark
from cpr.engines.taps import restore_queue
from cpr.errors import Busy, CprError, Exit, JournalError, NotFound
from cpr.journal import Record, journal_files, read, run_directory
from cpr.linux import proc
from cpr.linux.fds import take_fd
from cpr.linux.lock import LockHeld, process_lock
from cpr.linux.process import Process, open_process
from cpr.linux.tun import Queue
from cpr.model import MonitorAddress, Outcome, Runstate, Status
from cpr.qemu import migration, qmp
from cpr.run import resume_old

if TYPE_CHECKING:
    from collections.abc import Iterator


def recover(run_id: str | None = None, *, base: str | None = None) -> Iterator[tuple[Record | None, Outcome]]:
    """Recover every open journal of this boot (of one run, if named). Yields what became of each guest.

    Raises:
        NotFound: no such run.
    """
    base = base or run_directory()
    paths = list(journal_files(base, run_id))
    if run_id is not None and not paths:
        raise NotFound(f"no run {run_id!r}", hint="cpr runs lists them")
    for path in paths:
        try:
            record = read(path)
        except (JournalError, NotFound) as error:
            yield None, _unreadable(path, error)
            continue
        if record.open and _trusted(record):
            yield record, recover_one(record, base=base)
        elif record.open:
            yield None, _unreadable(path, JournalError(f"{path}: written by a user whose guest this is not"))


def recover_one(record: Record, *, base: str | None = None) -> Outcome:
    """Recover one guest and close its journal, if it could be brought to an end."""
    if record.header["boot_id"] != proc.boot_id():
        outcome = _outcome(record, Status.FAILED, Exit.OK, "the host has been booted since: nothing to act on", 0)
        record.append_outcome(outcome)
        return outcome
    guest = record.header["guest"]
    try:
        with process_lock(
            base or run_directory(),
            record.pid,
            record.start_time,
            boot_id=proc.boot_id(),
            owner_uid=int(guest.get("uid", 0)),
            holder={"run": record.run, "command": "recover"},
        ):
            record = read(record.path)  # its keeper may have ended it while we waited
            if not record.open:
                return _outcome(record, Status.UNCHANGED, Exit.OK, "the run ended by itself", record.pid)
            outcome = _forward(record) if record.committed else _back(record)
            if outcome.exit_code != Exit.NEEDS_ATTENTION or record.committed or _old(record) is None:
                record.append_outcome(outcome)
            return outcome
    except LockHeld as held:
        raise Busy(f"run {record.run} still works on pid {record.pid}", held.holder) from None


def _trusted(record: Record) -> bool:
    """Anybody may put a file there: root acts on its own journals, and on users' for their own guests."""
    owner = os.stat(record.path).st_uid
    if owner in (0, os.geteuid()):
        return True
    for process in (_old(record), _new(record)):
        if process is not None and proc.read_status(process.pid).uids[0] != owner:
            return False
    return os.geteuid() == 0


def _back(record: Record) -> Outcome:
    """Before the commit: the new QEMU dies, the old one goes on."""
    new = _new(record)
    if new is not None:
        new.kill()
        if not new.wait_dead(15.0):
            where = f"{errors.NEEDS_YOU}: the new QEMU (pid {new.pid}) does not die, so the old one was not resumed"
            return _outcome(record, Status.NEEDS_ATTENTION, Exit.NEEDS_ATTENTION, where, record.pid)
    old = _old(record)
    if old is None:
        where = "the guest's process has ended by itself"
        return _outcome(record, Status.NEEDS_ATTENTION, Exit.NEEDS_ATTENTION, where, 0)
    _restore_taps(record, old)
    go_on(old)
    guest = record.header["guest"]
    try:
        with _monitor(record, record.pid) as monitor:
            status = resume_old(monitor, guest["runstate"])
            migration.restore(monitor, guest["capabilities"], guest["parameters"])
            for path in guest["discarding"]:
                monitor.execute("qom-set", path=path, property="discard-data", value=True)
    except CprError as error:
        where = f"{errors.NEEDS_YOU}: the old QEMU (pid {record.pid}) could not be told to go on"
        return _outcome(record, Status.NEEDS_ATTENTION, Exit.NEEDS_ATTENTION, where, record.pid, error.message)
    if guest["runstate"] == Runstate.RUNNING and status != Runstate.RUNNING:
        where = f"{errors.NEEDS_YOU}: the old QEMU (pid {record.pid}) is {status}"
        return _outcome(record, Status.NEEDS_ATTENTION, Exit.NEEDS_ATTENTION, where, record.pid)
    return _outcome(record, Status.ROLLED_BACK, Exit.ROLLED_BACK, errors.AS_BEFORE, record.pid, runstate=status)


def _restore_taps(record: Record, old: Process) -> None:
    """Header size, offloads and attachment of tap queues, which the new QEMU changed at its start."""
    fact = record.facts.get("taps")
    if fact is None:
        return
    for number, settings in zip(fact["numbers"], fact["settings"], strict=False):
        with contextlib.suppress(OSError, TypeError), take_fd(old.pidfd, int(number)) as fd:
            restore_queue(fd, Queue(**settings))


def _forward(record: Record) -> Outcome:
    """After the commit: never back."""
    new, old = _new(record), _old(record)
    guest = record.header["guest"]
    if new is None:
        kept = f"; the old QEMU (pid {record.pid}) is stopped and must never be resumed: its RAM has moved on"
        where = "the guest crashed: the new QEMU died after the commit" + (kept if old is not None else "")
        return _outcome(record, Status.NEEDS_ATTENTION, Exit.NEEDS_ATTENTION, where, 0)
    if old is not None:
        old.kill()
        old.wait_dead(15.0)
    notes = []
    runstate = ""
    try:
        with _monitor(record, new.pid) as monitor:
            runstate = monitor.execute("query-status")["status"]
            if guest["runstate"] == Runstate.RUNNING and runstate != Runstate.RUNNING:
                monitor.execute("cont")
                runstate = monitor.execute("query-status")["status"]
            migration.restore(monitor, guest["capabilities"], guest["parameters"])
            for path in guest["discarding"]:
                monitor.execute("qom-set", path=path, property="discard-data", value=True)
    except CprError as error:
        notes.append(f"its settings could not be put back: {error.message}")
    from cpr.engines.after import rewrite_pidfile_of

    with contextlib.suppress(OSError):
        rewrite_pidfile_of(guest["pidfile"], guest["cwd"], record.pid, new.pid)
    as_before = (guest["runstate"] == Runstate.RUNNING) == (runstate == Runstate.RUNNING)
    code = Exit.OK if as_before and not notes else Exit.DIFFERS
    return _outcome(record, Status.UPDATED, code, errors.RUNS_NEW, new.pid, "; ".join(notes), runstate=runstate)


def _monitor(record: Record, pid: int) -> qmp.Monitor:
    address = record.header["guest"]["monitor"]
    return qmp.connect(MonitorAddress(**address), pid, timeout=10.0)


def _old(record: Record) -> Process | None:
    with contextlib.suppress(OSError):
        return open_process(record.pid, record.start_time)
    return None


def _new(record: Record) -> Process | None:
    """The new QEMU: by the journal, or, if its keeper died right after starting it, by the mark in its environment."""
    fact = record.facts.get("new")
    if fact is not None:
        with contextlib.suppress(OSError):
            return open_process(int(fact["pid"]), int(fact["start_time"]))
        return None
    if "starting" not in record.facts:
        return None
    mark = run_mark(record.run, record.pid)
    for entry in proc.processes():
        with contextlib.suppress(OSError):
            if dict(proc.read_environ(entry.pid)).get("CPR_RUN") == mark and not entry.zombie:
                return open_process(entry.pid, entry.start_time)
    return None


def _unreadable(path: str, error: CprError) -> Outcome:
    return Outcome(
        guest=path,
        uuid="",
        status=Status.NEEDS_ATTENTION,
        exit_code=int(Exit.NEEDS_ATTENTION),
        where="unknown: what the journal says cannot be read; the guest was left as it is",
        error=error.message,
        hint=error.hint,
    )


def _outcome(
    record: Record, status: Status, code: Exit, where: str, pid: int, error: str = "", runstate: str = ""
) -> Outcome:
    guest: dict[str, Any] = record.header["guest"]
    return Outcome(
        guest=guest["name"] or str(record.pid),
        uuid=guest["uuid"],
        status=status,
        exit_code=int(code),
        where=where,
        engine=str(record.header.get("engine", "")),
        pid_before=record.pid,
        pid_after=pid,
        runstate=runstate,
        error=error,
        notes=("finished by recover",),
    )
