"""Finish or undo what was interrupted: read the journals that nobody closed, and act on what they say.

Before the commit line: the new QEMU is killed, and only when it is dead the old one goes on. After it: the old QEMU is
never resumed, because the new one may have run over the same RAM; the new one is told to go on if it is there, and if
it is not, the guest has crashed and a person must know. A journal of another boot is closed and never acted on; one
whose keeper lives is left alone.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cpr import errors, recover_in_place
from cpr.engines import stream, threads
from cpr.engines.after import HandBack
from cpr.engines.doors import go_on
from cpr.engines.execute import as_before
from cpr.engines.reexec import Reexec
from cpr.engines.settings import Settings, hand_back, put_back, set_discard
from cpr.engines.successor import MARK, run_mark
from cpr.engines.taps import restore_queue
from cpr.errors import Busy, CommandFailed, CprError, Exit, JournalError, NotFound
from cpr.journal import Record, journal_files, read, run_directory
from cpr.linux import proc
from cpr.linux.fds import take_fd
from cpr.linux.lock import LockHeld, patient_lock
from cpr.linux.process import Process, open_process
from cpr.linux.tun import Queue
from cpr.model import Outcome, Runstate, Status
from cpr.qemu import migration, qmp
from cpr.run import resume_old

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

BY_US = (Runstate.POSTMIGRATE, Runstate.FINISH_MIGRATE)
"""Where only a migration leads: the journal has lost its end."""
SENDING = ("MoveState", "SaveState")
"""The steps that have QEMU send its state."""
MARK_SCANS = 50
"""Looks at all processes, at most."""


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
        found = _recover_file(path, base)
        if found is not None:
            yield found


def _recover_file(path: str, base: str) -> tuple[Record | None, Outcome] | None:
    """One journal; None where it is closed. Whatever is wrong with it, others are not kept waiting."""
    try:
        record = read(path)
        if not record.open:
            return None
        if not _trusted(record):
            raise JournalError(f"{path}: written by a user whose guest this is not")
        return record, recover_one(record, base=base)
    except Busy as busy:
        outcome = _outcome(record, Status.BUSY, Exit.BUSY, busy.where, record.pid, busy.message)
        return record, replace(outcome, notes=())
    except CprError as error:
        return None, _unreadable(path, error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, _unreadable(path, JournalError(f"{path}: {type(error).__name__}: {error}"))


def recover_one(record: Record, *, base: str | None = None) -> Outcome:
    """Recover one guest and close its journal, if it could be brought to an end.

    Raises:
        Busy: somebody works on it.
        JournalError: the journal cannot be read any more. OSError.
    """
    if record.header["boot_id"] != proc.boot_id():
        outcome = _outcome(record, Status.FAILED, Exit.OK, "the host has been booted since: nothing to act on", 0)
        record.append_outcome(outcome)
        return outcome
    guest = record.header["guest"]
    try:
        with patient_lock(
            base or run_directory(),
            record.pid,
            record.start_time,
            boot_id=proc.boot_id(),
            owner_uid=int(guest["uid"]),
            holder={"run": record.run, "command": "recover"},
        ):
            record = read(record.path)  # its keeper may have ended it while we waited
            if not record.open:
                return record.result()
            try:
                if record.header.get("engine") == Reexec.name:
                    outcome = _in_place(record)
                else:
                    outcome = _forward(record) if record.committed else _back(record)
            except _TryAgain as again:
                return again.outcome
            try:
                record.append_outcome(outcome)
            except OSError as error:
                words = f"{record.path} stays open: {error.strerror or error}"
                outcome = replace(outcome, notes=(*outcome.notes, words))
            return outcome
    except LockHeld as held:
        holder = f"run {held.holder.get('run', '?')} (pid {held.holder.get('pid', '?')})"
        raise Busy(f"{holder} is working on pid {record.pid}", held.holder) from None


class _TryAgain(Exception):
    """It could not be brought to an end yet: the journal stays open."""

    def __init__(self, record: Record, where: str, pid: int, error: str = "", runstate: str = "") -> None:
        super().__init__(where)
        where = f"{errors.NEEDS_YOU}: {where}"
        self.outcome = replace(
            _outcome(record, Status.NEEDS_ATTENTION, Exit.NEEDS_ATTENTION, where, pid, error, runstate=runstate),
            hint=f"cpr recover {record.run} tries again",
        )


def _moved(record: Record) -> bool:
    """Whether the state was about to be sent: from there on the guest may stand still because of us."""
    return any(step.get("id") in SENDING and i in record.steps for i, step in enumerate(record.header["steps"]))


def _trusted(record: Record) -> bool:
    """Anybody may put a file there: root acts on its own journals, and on users' for their own guests."""
    owner = os.stat(record.path, follow_symlinks=False).st_uid
    if owner in (0, os.geteuid()):
        return True
    if os.geteuid() != 0:
        return False
    known = (_old(record), _new(record), *_rehearsing(record), *_marked(record))
    touched = [process for process in known if process is not None]
    return all(proc.read_status(process.pid).uids[0] == owner for process in touched)


def _back(record: Record) -> Outcome:
    """Before the commit: whatever the run has started dies, the old QEMU goes on."""
    for process in filter(None, [_new(record), *_rehearsing(record), *_marked(record)]):
        if process.pid == record.pid:
            continue
        process.kill()
        if not process.wait_dead(15.0):
            where = f"the new QEMU (pid {process.pid}) does not die, so the old one was not resumed"
            raise _TryAgain(record, where, record.pid)
    old = _old(record)
    if old is None:
        where = "the guest's process has ended by itself"
        return _outcome(record, Status.NEEDS_ATTENTION, Exit.NEEDS_ATTENTION, where, 0)
    _restore_taps(record, old)
    if (end := record.facts.get("stream", {}).get("end")) is not None:
        stream.hang_up_on(old.pid, int(end))
    go_on(old)
    guest = record.header["guest"]
    try:
        status, ours = _resume(record, old)
    except CprError as error:
        where = f"the old QEMU (pid {record.pid}) could not be told to go on"
        raise _TryAgain(record, where, record.pid, error.message) from None
    if guest["runstate"] == Runstate.RUNNING and ours and status != Runstate.RUNNING:
        raise _TryAgain(record, f"the old QEMU (pid {record.pid}) is {status}", record.pid, runstate=status)
    return _outcome(record, Status.ROLLED_BACK, Exit.ROLLED_BACK, errors.AS_BEFORE, record.pid, runstate=status)


def _resume(record: Record, old: Process) -> tuple[str, bool]:
    """Have the old QEMU go on: its runstate, and whether it was ours to decide. Raises CprError."""
    guest = record.header["guest"]
    with recover_in_place.session(record, old) as monitor:
        status = str(monitor.execute("query-status")["status"])
        # a guest that is paused though its state was not sent was stopped by somebody who has had a reason
        ours = _moved(record) or status in BY_US
        if ours:
            status = resume_old(monitor, guest["runstate"])
        migration.restore(monitor, guest["capabilities"], guest["parameters"])
        set_discard(monitor, guest["discarding"], on=True)
        for name in (stream.NAME, stream.END, *record.facts.get("given", {}).get("names", ())):
            with contextlib.suppress(CommandFailed):
                monitor.execute("closefd", fdname=name)
    return status, ours


def _in_place(record: Record) -> Outcome:
    """Old and new QEMU are one process; or there is another one: the old program, started again."""
    back = record.facts.get("going back")
    fact = back or record.facts.get("exec", {})
    process = _started_again(record, back) if back else _old(record)
    if process is None:
        when = "after the commit" if record.committed else "before the commit"
        where = f"the guest's process has ended {when}"
        return _outcome(record, Status.NEEDS_ATTENTION, Exit.NEEDS_ATTENTION, where, 0)
    executed = True if back else recover_in_place.executed(record)
    if executed is None:
        where = f"it is in pid {process.pid}, stopped, and that is about to execute the new QEMU, or failing to"
        raise _TryAgain(record, where, process.pid, "the program of the guest's process is not to be known yet")
    if not executed:
        as_before(process, fact.get("changed", ()), fact.get("placed", ()))
        recover_in_place.withdraw(record, process)
        outcome = _back(record)
        lost = recover_in_place.mend_monitors(record, process)
        lost += recover_in_place.let_in(record, process)
        return replace(outcome, notes=(*outcome.notes, *lost))
    try:
        with recover_in_place.session(record, process) as monitor:
            runstate, lost = recover_in_place.arrive(record, process, monitor, fact)
            lost += recover_in_place.put_in_order(record, process, monitor, fact)
            outcome = _arrived(record, monitor, runstate, lost, process.pid)
        outcome = _differing(outcome, recover_in_place.mend_monitors(record, process))
    except (CprError, OSError) as error:
        which = "the old QEMU, started again" if back else "the new QEMU"
        where = f"it is in {which} (pid {process.pid}), which could not be told to go on"
        raise _TryAgain(record, where, process.pid, str(error)) from None
    if back:
        code = Exit.ROLLED_BACK
        return replace(outcome, status=Status.ROLLED_BACK, exit_code=int(code), where=errors.AS_BEFORE)
    return outcome


def _started_again(record: Record, back: Mapping[str, Any]) -> Process | None:
    """The old program in its new process; by its mark and the state that it has where the keeper died before it knew
    the pid."""
    known = record.facts.get("back")
    if known is not None and (process := _alive(int(known["pid"]), int(known["start_time"]))) is not None:
        return process
    number, inode = back["state"]
    for process in _by_mark(record):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{process.pid}/fd/{number}").st_ino == inode:
                return process
    return None


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
        if not old.wait_dead(15.0):  # it listens on the same monitors, and would answer in place of the new one
            raise _TryAgain(record, f"the old QEMU (pid {old.pid}) does not die", new.pid)
    try:
        with recover_in_place.session(record, new) as monitor:
            runstate = monitor.execute("query-status")["status"]
            # once RESUME was seen, what stops it is somebody else's will
            told = record.steps[record.commit_index] == "done"
            if guest["runstate"] == Runstate.RUNNING and runstate != Runstate.RUNNING and not told:
                monitor.execute("cont")
                runstate = monitor.execute("query-status")["status"]
            return _arrived(record, monitor, str(runstate), [], new.pid)
    except CprError as error:
        where = f"it is in the new QEMU (pid {new.pid}), which could not be told to go on"
        raise _TryAgain(record, where, new.pid, error.message) from None


def _arrived(record: Record, monitor: qmp.Monitor, runstate: str, differences: list[str], pid: int) -> Outcome:
    """The guest is in the new QEMU: what it had is put back."""
    guest = record.header["guest"]
    settings = Settings.from_json(record.facts["settings"]["value"])
    differences = differences + put_back(monitor, settings, old=record.pid, new=pid)
    opened = any(record.header["steps"][i]["id"] == HandBack.__name__ for i in _done(record))
    notes, failed = hand_back(monitor, () if opened else settings.hand_back)
    differences += failed
    if pid == record.pid:
        with contextlib.suppress(CprError, OSError):
            were = {name: placement.tid for name, placement in settings.threads.items()}
            notes = [*notes, *threads.changed(were, threads.now(monitor, pid))]
    if (guest["runstate"] == Runstate.RUNNING) != (runstate == Runstate.RUNNING):
        differences.append(f"the guest was {guest['runstate']} and is {runstate}")
    code = Exit.DIFFERS if differences else Exit.OK
    words = "; ".join(differences)
    outcome = _outcome(record, Status.UPDATED, code, errors.RUNS_NEW, pid, words, runstate=runstate)
    return replace(outcome, notes=(*outcome.notes, *notes))


def _differing(outcome: Outcome, lost: list[str]) -> Outcome:
    """With what was lost besides."""
    if not lost:
        return outcome
    words = "; ".join(filter(None, [outcome.error, *lost]))
    return replace(outcome, exit_code=int(Exit.DIFFERS), error=words)


def _done(record: Record) -> list[int]:
    return [index for index, state in record.steps.items() if state == "done"]


def _old(record: Record) -> Process | None:
    return _alive(record.pid, record.start_time)


def _new(record: Record) -> Process | None:
    """The new QEMU, as the journal names it."""
    fact = record.facts.get("new")
    return _alive(int(fact["pid"]), int(fact["start_time"])) if fact is not None else None


def _rehearsing(record: Record) -> list[Process]:
    """QEMUs that were loading the guest's state for practice; they end with their keeper, where that is possible."""
    named = record.facts.get("rehearsing", {}).get("processes", ())
    return [process for pid, start in named if (process := _alive(int(pid), int(start))) is not None]


def _alive(pid: int, start_time: int) -> Process | None:
    with contextlib.suppress(OSError):
        process = open_process(pid, start_time)
        if process.alive():
            return process
        process.close()
    return None


def _marked(record: Record) -> list[Process]:
    """All that the run started: its keeper may have died before it knew a pid."""
    return _by_mark(record) if "starting" in record.facts else []


def _by_mark(record: Record) -> list[Process]:
    """Processes with the run's mark in their environment.

    A helper that is becoming a QEMU has no environment for a moment: looked for again, until nothing new is found.
    """
    mark = run_mark(record.run, record.pid)
    found: dict[int, Process] = {}
    for _ in range(MARK_SCANS):
        between = False
        known = set(found)
        for entry in proc.processes():
            if entry.pid in found or entry.zombie:
                continue
            with contextlib.suppress(OSError):
                environ = dict(proc.read_environ(entry.pid))
                between = between or not (environ or entry.argv or entry.exe is None)
                if environ.get(MARK) == mark:
                    found[entry.pid] = open_process(entry.pid, entry.start_time)
        if found.keys() == known and not between:
            break
        time.sleep(0.01)
    return list(found.values())


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
    record: Record, status: Status, code: Exit, where: str, pid: int, error: str = "", *, runstate: str = ""
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
