"""The keeper: a process of its own, in its own session, that runs one plan and outlives the command that asked for it.

    command ── length, pickled request, then "interrupt CODE" lines ──► keeper's standard input
    command ◄── JSON lines: steps, blackout, outcome ────────── keeper's standard output

The command may die, its ssh session may end, Ctrl-C may be pressed: a guest is never left standing still. When the
command goes away before the commit, the keeper undoes; after it, it goes on to the end. The lock on the guest falls
with the keeper. `start` and `Handle` are the command's side, `main` is the keeper's.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpr import errors
from cpr.errors import Busy, CprError, Exit, JournalError
from cpr.journal import Journal, journal_path, open_journal_of, read, run_directory
from cpr.linux import ours, proc
from cpr.linux.lock import LOOK, LOOK_SECONDS, LockHeld, holder_of, make_run_directory, patient_lock
from cpr.model import Outcome, Plan, Status
from cpr.run import Bounds, Run

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import BinaryIO

    from cpr.model import ProcessId

LENGTH = struct.Struct("=Q")
BUSY_SECONDS = 60.0
"""How long somebody else is left to recover what our keeper left."""
WAIT = "wait for it, or look at cpr runs"
NICENESS = -10
"""The blackout is a conversation with two QEMUs: on a busy host the keeper should not queue behind vCPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    plan: Plan
    run_id: str
    bounds: Bounds
    base: str


class Handle:
    """A keeper at work, seen from the command."""

    def __init__(self, process: subprocess.Popen[bytes], request: _Request) -> None:
        self._process = process
        self._request = request
        self._outcome: Outcome | None = None
        self._written = threading.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    def events(self) -> Iterator[dict[str, Any]]:
        """What happens, as it happens: {"event": "step", ...}, {"event": "blackout", "seconds": ...}."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if message.get("event") == "outcome":
                    self._outcome = pickle.loads(base64.b64decode(message["value"]))  # noqa: S301 - our own child
                    break
                yield message
        self._process.wait()

    def outcome(self) -> Outcome:
        """How it ended. If the keeper died, what it left is recovered here and now."""
        for _ in self.events():
            pass
        return self._outcome if self._outcome is not None else self._after_death()

    def interrupt(self, code: int = Exit.INTERRUPTED) -> None:
        """Ask it to undo; after the commit it goes on to the end."""
        assert self._process.stdin is not None
        with self._written, contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(f"interrupt {int(code)}\n".encode())
            self._process.stdin.flush()

    def _after_death(self) -> Outcome:
        """What its journal says became of the guest; if nothing, that is brought about here and now."""
        from cpr.recover import recover_one

        guest = self._request.plan.guest
        path = journal_path(self._request.base, self._request.run_id, guest.process)
        status = self._process.returncode
        if not os.path.exists(path):
            return _failed(guest, f"the keeper died before it began (exit status {status})", Exit.FAILED)
        deadline = time.monotonic() + BUSY_SECONDS
        try:
            while True:
                record = read(path)
                try:
                    return recover_one(record, base=self._request.base) if record.open else record.result()
                except Busy:  # somebody else recovers it
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)
        except CprError as error:
            words = error.message
        except (OSError, KeyError, TypeError, ValueError) as error:
            words = f"{path}: {error}"
        return _failed(guest, f"the keeper died ({status}): {words}", Exit.NEEDS_ATTENTION)


def start(plan: Plan, *, run_id: str, bounds: Bounds | None = None, base: str | None = None) -> Handle:
    """Start a keeper on a plan.

    Raises:
        OSError: no process can be started.
    """
    request = _Request(plan=plan, run_id=run_id, bounds=bounds or Bounds(), base=base or run_directory())
    process = subprocess.Popen(
        [sys.executable, "-m", "cpr.keeper"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if os.environ.get("CPR_DEBUG") else subprocess.DEVNULL,
        start_new_session=True,
        env=ours.environment(),
    )
    assert process.stdin is not None
    pickled = pickle.dumps(request)
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(LENGTH.pack(len(pickled)) + pickled)
        process.stdin.flush()
    return Handle(process, request)


def claimed(process: ProcessId, *, base: str | None = None) -> CprError | None:
    """What stands in the way of an update: another run that works on the guest, that was interrupted, or that left a
    journal which cannot be read."""
    base = base or run_directory()
    end = time.monotonic() + LOOK_SECONDS
    while (holder := holder_of(base, process.pid, process.start_time)) and holder.get("command") == LOOK:
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    if holder is not None:
        return Busy(_working(holder), holder, hint=WAIT)
    try:
        uid = proc.read_status(process.pid).uids[0]
    except OSError:
        return None
    try:
        left = open_journal_of(process, base, owner_uid=uid)
    except JournalError as error:
        return error
    return _interrupted(left.run) if left is not None else None


def _working(holder: Mapping[str, Any]) -> str:
    return f"run {holder.get('run', '?')} (pid {holder.get('pid', '?')}) is working on this guest"


def _interrupted(run: str) -> Busy:
    return Busy(f"run {run} was interrupted and is not recovered", {"run": run}, hint=f"cpr recover {run}")


def main() -> None:
    """The keeper itself."""
    ours.outlive()
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    sys.setswitchinterval(0.001)
    request: _Request = pickle.loads(_read(*LENGTH.unpack(_read(LENGTH.size))))  # noqa: S301 - our own parent
    out = sys.stdout.buffer
    outcome = _work(request, out)
    _say(out, {"event": "outcome", "value": base64.b64encode(pickle.dumps(outcome)).decode()})
    os._exit(0)  # nothing is left to do, and the interpreter would flush to a command that may be gone


def _read(size: int) -> bytes:
    """So many bytes of standard input and not one more: an interrupt may follow at once, for `_listen` to read."""
    data = b""
    while len(data) < size:
        part = os.read(0, size - len(data))
        if not part:
            sys.exit("the command went away")
        data += part
    return data


def _work(request: _Request, out: BinaryIO) -> Outcome:
    guest = request.plan.guest
    began = time.monotonic()
    try:
        make_run_directory(request.base)
        with patient_lock(
            request.base,
            guest.process.pid,
            guest.process.start_time,
            boot_id=proc.boot_id(),
            owner_uid=guest.uid,
            holder={"run": request.run_id, "command": "update"},
        ):
            left = open_journal_of(guest.process, request.base, owner_uid=guest.uid)
            if left is not None:
                return _busy(guest, _interrupted(left.run))
            journal = Journal(request.plan, request.run_id, directory=request.base)
            run = Run(
                plan=request.plan,
                journal=journal,
                report=lambda message: _say(out, message),
                bounds=request.bounds,
                began=began,
            )
            threading.Thread(target=_listen, args=(run,), name="control", daemon=True).start()
            signal.signal(signal.SIGTERM, lambda *_: run.interrupt(Exit.TERMINATED))
            gc.collect()
            gc.disable()  # no collection may fall into the blackout
            return run.execute()
    except LockHeld as held:
        return _busy(guest, Busy(_working(held.holder), held.holder, hint=WAIT))
    except CprError as error:
        return _failed(guest, error.message, error.code, error.hint)
    except OSError as error:
        if isinstance(error, PermissionError):
            return _failed(guest, f"{request.base}: {error}", Exit.PRIVILEGES, "run it as root")
        return _failed(guest, f"{request.base}: {error.strerror or error}", Exit.FAILED)


def _listen(run: Run) -> None:
    """Interrupts from the command; its end, before the commit, is one too."""
    rest = b""
    while data := os.read(0, 4096):  # not through sys.stdin: its lock would be held at our end
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            words = line.split()
            if words[:1] == [b"interrupt"]:
                run.interrupt(int(words[1]) if len(words) > 1 else Exit.INTERRUPTED)
    run.interrupt(Exit.INTERRUPTED)


def _say(out: BinaryIO, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError, ValueError):
        out.write(json.dumps(message).encode() + b"\n")
        out.flush()


def _busy(guest: Any, busy: Busy) -> Outcome:
    return Outcome(
        guest=guest.name or str(guest.process.pid),
        uuid=guest.uuid,
        status=Status.BUSY,
        exit_code=int(Exit.BUSY),
        where=errors.UNTOUCHED,
        pid_before=guest.process.pid,
        pid_after=guest.process.pid,
        error=busy.message,
        hint=busy.hint,
    )


def _failed(guest: Any, message: str, code: Exit, hint: str = "") -> Outcome:
    needs = code == Exit.NEEDS_ATTENTION
    return Outcome(
        guest=guest.name or str(guest.process.pid),
        uuid=guest.uuid,
        status=Status.NEEDS_ATTENTION if needs else Status.FAILED,
        exit_code=int(code),
        where=errors.NEEDS_YOU if needs else errors.UNTOUCHED,
        pid_before=guest.process.pid,
        pid_after=guest.process.pid,
        error=message,
        hint=hint,
    )


if __name__ == "__main__":
    main()
