"""The record of a run: one append-only file for each guest, written before and after every step.

    RUN_DIRECTORY/runs/<run>/<pid>-<start time>.journal

One JSON object a line. The first is the header; then `{"step": i, "state": "doing"}` before the world is changed and
`{"step": i, "state": "done"}` after; `{"fact": name, ...}` is what a recovery needs to know (the new process, what was
switched off); the last, `{"outcome": ...}`, closes it. The space is allocated before anything is touched, so that a
full disk is met there and not in a blackout. A restart's journal lies on /run and is not fsync'ed: it is worth nothing
after a reboot, and `boot_id` says which boot it belongs to.

What the lines mean for a guest is decided in `recover.py`; here they are only written and read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cpr.errors import JournalError, NotFound
from cpr.linux.appendfile import AppendFile, read_records
from cpr.linux.lock import make_run_directory
from cpr.linux.proc import boot_id
from cpr.model import Binary, Finding, Outcome, Severity, Status
from cpr.qemu.migration import STREAM

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cpr.model import Plan, ProcessId

FORMAT = "cpr.journal/1"
RESERVED = 64 * 1024
"""Bytes allocated in advance; the longest journal seen in tests is below 12 KiB."""

DEFAULT_DIRECTORY = "/run/cpr"


def run_directory() -> str:
    """Where locks and journals lie: /run/cpr, or $CPR_RUN_DIR."""
    return os.environ.get("CPR_RUN_DIR") or DEFAULT_DIRECTORY


def new_run_id() -> str:
    """E.g. 20261120T101500-3f2a: sorts by time, and two at once differ."""
    return time.strftime("%Y%m%dT%H%M%S") + "-" + secrets.token_hex(2)


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """The outcome as `cpr update --json` shows it."""

    def binary(value: Any) -> dict[str, Any] | None:
        return {"path": value.path, "version": value.version} if value else None

    return {
        "name": outcome.guest,
        "uuid": outcome.uuid,
        "status": str(outcome.status),
        "exit_code": int(outcome.exit_code),
        "where": outcome.where,
        "engine": outcome.engine,
        "pid_before": outcome.pid_before,
        "pid_after": outcome.pid_after,
        "runstate": outcome.runstate,
        "binary_before": binary(outcome.binary_before),
        "binary_after": binary(outcome.binary_after),
        "blackout_seconds": outcome.blackout_seconds,
        "total_seconds": round(outcome.total_seconds, 4),
        "findings": [f.json() for f in outcome.findings],
        "notes": list(outcome.notes),
        "error": outcome.error or None,
        "hint": outcome.hint or None,
    }


def outcome_from_json(value: Mapping[str, Any]) -> Outcome:
    """The inverse; of a binary only path and version are known. Raises KeyError, TypeError, ValueError."""

    def binary(value: Any) -> Binary | None:
        return Binary(path=value["path"], version=value["version"]) if value else None

    return Outcome(
        guest=value["name"],
        uuid=value["uuid"],
        status=Status(value["status"]),
        exit_code=int(value["exit_code"]),
        where=value["where"],
        engine=value["engine"],
        pid_before=int(value["pid_before"]),
        pid_after=int(value["pid_after"]),
        runstate=value["runstate"],
        binary_before=binary(value["binary_before"]),
        binary_after=binary(value["binary_after"]),
        blackout_seconds=value["blackout_seconds"],
        total_seconds=float(value["total_seconds"]),
        findings=tuple(
            Finding(**{**f, "severity": Severity(f["severity"]), "engines": tuple(f["engines"])})
            for f in value["findings"]
        ),
        error=value["error"] or "",
        hint=value["hint"] or "",
        notes=tuple(value["notes"]),
    )


class Journal:
    """The journal of one guest in one run, being written.

    Raises:
        JournalError: it cannot be created or written (a full disk, a read-only /run, no permission).
    """

    def __init__(self, plan: Plan, run_id: str, *, directory: str | None = None) -> None:
        base = directory or run_directory()
        guest = plan.guest
        self.run_id = run_id
        self.path = journal_path(base, run_id, guest.process)
        try:
            make_run_directory(base)
            os.makedirs(os.path.dirname(self.path), mode=0o755, exist_ok=True)
            self._file = AppendFile(self.path, RESERVED)
        except OSError as error:
            raise JournalError(
                f"no journal can be written at {self.path}: {error.strerror or error}",
                hint="make room there, or name another directory in CPR_RUN_DIR",
            ) from None
        self._write(
            {
                "format": FORMAT,
                "run": run_id,
                "boot_id": boot_id(),
                "time": time.time(),
                "keeper": os.getpid(),
                "engine": plan.engine,
                "guest": {
                    "pid": guest.process.pid,
                    "start_time": guest.process.start_time,
                    "name": guest.name,
                    "uuid": guest.uuid,
                    "runstate": guest.runstate,
                    "uid": guest.uid,
                    "monitor": dataclasses.asdict(guest.monitor) if guest.monitor else None,
                    "monitor_held": guest.monitor_held,
                    "capabilities": dict(guest.capabilities),
                    "parameters": {k: guest.parameters[k] for k in STREAM if k in guest.parameters},
                    "discarding": [b.qom_path for b in guest.ram if b.discard_data],
                    "pidfile": guest.pidfile,
                    "cwd": guest.cwd,
                },
                "binary_before": {"path": guest.binary.path, "version": guest.binary.version},
                "binary_after": {"path": plan.target.binary.path, "version": plan.target.binary.version},
                "ignored": list(plan.ignored),
                "options": list(plan.target.extra_options),
                "steps": [
                    {"id": s.id, "text": s.describe(), "commit": s.commit, "blackout": s.blackout} for s in plan.steps
                ],
            }
        )

    def step(self, index: int, state: str, error: str = "") -> None:
        self._write({"step": index, "state": state, "time": time.time(), **({"error": error} if error else {})})

    def fact(self, name: str, **values: Any) -> None:
        self._write({"fact": name, **values})

    def close(self, outcome: Outcome) -> None:
        self._write({"outcome": outcome_json(outcome), "time": time.time()})
        with contextlib.suppress(OSError):
            self._file.trim()  # journals stay until the next boot, in RAM
        self._file.close()

    def abandon(self) -> None:
        """Leave it open, for `cpr recover`."""
        self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        try:
            self._file.append(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            raise JournalError(f"the journal {self.path} cannot be written: {error.strerror or error}") from None


@dataclass(slots=True)
class Record:
    """A journal, read: `steps[i]` is the last state of step i, `facts` the last values of each fact."""

    path: str
    header: dict[str, Any]
    steps: dict[int, str] = field(default_factory=dict)
    times: dict[tuple[int, str], float] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    outcome: dict[str, Any] | None = None

    @property
    def run(self) -> str:
        return str(self.header.get("run", ""))

    @property
    def open(self) -> bool:
        return self.outcome is None

    @property
    def pid(self) -> int:
        return int(self.header["guest"]["pid"])

    @property
    def start_time(self) -> int:
        return int(self.header["guest"]["start_time"])

    @property
    def commit_index(self) -> int:
        return next((i for i, s in enumerate(self.header["steps"]) if s.get("commit")), len(self.header["steps"]))

    @property
    def committed(self) -> bool:
        """Whether the commit was begun: from that line on there is no way back, unless it says that it was taken."""
        went_back = ("refused", "undoing", "undone")
        return self.commit_index in self.steps and self.steps[self.commit_index] not in went_back

    def append_outcome(self, outcome: Outcome) -> None:
        """Close a journal that its keeper could not close, in the space allocated for that. OSError."""
        line = json.dumps({"outcome": outcome_json(outcome), "time": time.time()}, separators=(",", ":")) + "\n"
        with AppendFile.resume(self.path) as file:
            file.append(line.encode())
            with contextlib.suppress(OSError):
                file.trim()
        self.outcome = outcome_json(outcome)

    def result(self) -> Outcome:
        """The outcome of a closed journal. Raises KeyError, TypeError, ValueError where it is none."""
        assert self.outcome is not None
        return outcome_from_json(self.outcome)


def journal_path(base: str, run_id: str, process: ProcessId) -> str:
    return os.path.join(base, "runs", run_id, f"{process.pid}-{process.start_time}.journal")


def read(path: str) -> Record:
    """Read a journal. Raises `JournalError` where it is not one, or is cut before its header's end."""
    try:
        lines = list(read_records(path))
    except FileNotFoundError:
        raise NotFound(f"no journal {path}", hint="cpr runs lists them") from None
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror or error}") from None
    hint = "the guest was left as it is; look at it with cpr list, and remove the file when it is well"
    try:
        header = json.loads(lines[0])
        if header["format"] != FORMAT:
            raise JournalError(f"{path}: format {header['format']!r} is not {FORMAT}", hint=hint)
        _check(header)
        record = Record(path, header)
        for line in lines[1:]:
            _take(record, json.loads(line))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise JournalError(f"{path}: not a readable journal ({error})", hint=hint) from None
    return record


def _check(header: Any) -> None:
    """It has all that a recovery acts on, of the right kinds. Raises KeyError, TypeError."""
    texts = [header["run"], header["boot_id"], *(step["id"] for step in header["steps"])]
    guest = header["guest"]
    texts += [guest[name] for name in ("name", "uuid", "runstate", "pidfile", "cwd")] + guest["discarding"]
    numbers = [guest[name] for name in ("pid", "start_time", "uid")]
    mappings = [guest["capabilities"], guest["parameters"], guest["monitor"]]
    for kind, values in ((str, texts), (int, numbers), (dict, mappings)):
        for value in values:
            if not isinstance(value, kind):
                raise TypeError(f"{value!r} where {kind.__name__} is meant")


def _take(record: Record, line: dict[str, Any]) -> None:
    if "step" in line:
        record.steps[int(line["step"])] = str(line["state"])
        record.times[int(line["step"]), str(line["state"])] = float(line.get("time", 0))
        if line.get("error"):
            record.errors.append(str(line["error"]))
    elif "fact" in line:
        record.facts[str(line["fact"])] = line
    elif "outcome" in line:
        record.outcome = dict(line["outcome"])


def journal_files(base: str | None = None, run_id: str | None = None) -> Iterator[str]:
    """Paths of all journals, oldest run first."""
    runs = os.path.join(base or run_directory(), "runs")
    try:
        names = sorted(os.listdir(runs))
    except OSError:
        return
    for name in names:
        if run_id and name != run_id:
            continue
        directory = os.path.join(runs, name)
        try:
            files = sorted(os.listdir(directory))
        except OSError:
            continue
        for file in files:
            if file.endswith(".journal"):
                yield os.path.join(directory, file)


def open_journal_of(process: ProcessId, base: str | None = None, *, owner_uid: int) -> Record | None:
    """A journal of this boot for this very process that nobody closed, if there is one.

    Everybody may put a file there, so it is believed of root, of us and of `owner_uid`, the guest's user.

    Raises:
        JournalError: there is one that cannot be read: nobody knows what was done to this process.
    """
    wanted = f"{process.pid}-{process.start_time}.journal"
    for path in journal_files(base):
        if os.path.basename(path) == wanted:
            try:
                if os.stat(path, follow_symlinks=False).st_uid not in (0, os.geteuid(), owner_uid):
                    continue
                record = read(path)
            except (NotFound, OSError):
                continue
            if record.open and record.header["boot_id"] == boot_id():
                return record
    return None
