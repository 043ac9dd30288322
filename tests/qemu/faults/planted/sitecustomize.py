"""Loaded by every Python that finds it; acts in a keeper, and there on what CPR_TEST_FAULTS (JSON) orders.

    [{"at": MOMENT, "do": ACTION, "stage": PATH of a UNIX socket, "argument": ...}, ...]

Each fault happens once, and says so at its stage before it happens. Moments:

    step:INDEX:doing    the journal has the line, nothing is done    step:INDEX:done     it is done, not in the journal
    step:INDEX:undoing  likewise, on the way back                    step:INDEX:undone
    fact:NAME           before the journal has it
    closed              the journal has the outcome, the command has not
    sent:COMMAND:new    (or :old) a monitor command was given away; that QEMU may or may not have got it
    launching           the helper that becomes the new QEMU was told everything, and has done nothing yet
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from typing import Any, NoReturn

ORDERS: list[dict[str, Any]] = []
STAY: list[object] = []
"""Descriptors that have to stay open."""


def happens(moment: str, run: Any = None, helper: int = 0) -> None:
    """Do what is ordered for this moment."""
    for order in [order for order in ORDERS if order["at"] == moment]:
        ORDERS.remove(order)
        new = getattr(run, "new", None)
        pid = new.pid if new is not None else 0
        with socket.socket(socket.AF_UNIX) as stage:
            stage.connect(order["stage"])
            stage.sendall(json.dumps({"at": moment, "keeper": os.getpid(), "new": pid, "helper": helper}).encode())
            stage.sendall(b"\n")
            ACTIONS[order["do"]](order, run, stage, pid or helper)


def fail(order: dict[str, Any], run: Any, stage: socket.socket, pid: int) -> NoReturn:
    from cpr.errors import StepFailed

    raise StepFailed("planted", f"it fails at {order['at']}")


def no_room(order: dict[str, Any], run: Any, stage: socket.socket, pid: int) -> NoReturn:
    from cpr.errors import JournalError

    raise JournalError("the journal cannot be written: No space left on device")


def kill_new(order: dict[str, Any], run: Any, stage: socket.socket, pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([pidfd], [], [], 10)
    os.close(pidfd)


def kill_new_and_go_on(order: dict[str, Any], run: Any, stage: socket.socket, pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def stop_new(order: dict[str, Any], run: Any, stage: socket.socket, pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    while True:
        with open(f"/proc/{pid}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] in "Tt":
                return


def kill_keeper(order: dict[str, Any], run: Any, stage: socket.socket, pid: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def resume_helper(order: dict[str, Any], run: Any, stage: socket.socket, pid: int) -> None:
    os.kill(pid, signal.SIGCONT)


def stop_new_and_kill_keeper(order: dict[str, Any], run: Any, stage: socket.socket, pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    kill_keeper(order, run, stage, pid)


def go_on(order: dict[str, Any], run: Any, stage: socket.socket, pid: int) -> None:
    """It is only announced."""


def wait(order: dict[str, Any], run: Any, stage: socket.socket, pid: int) -> None:
    """Until the stage says so, or has gone."""
    with contextlib.suppress(OSError):
        stage.recv(1)


def until_interrupted(order: dict[str, Any], run: Any, stage: socket.socket, pid: int) -> None:
    while not run.interrupted:
        time.sleep(0.001)


def fill(order: dict[str, Any], run: Any, stage: socket.socket, pid: int) -> None:
    """Not a byte is left in the file system at `argument`."""
    with open(os.path.join(order["argument"], "full"), "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def lock(order: dict[str, Any], run: Any, stage: socket.socket, pid: int) -> None:
    """Nobody else may take the image at `argument` for writing (QEMU's RAW_LOCK_SHARED_BASE + BLK_PERM_WRITE)."""
    fd = os.open(order["argument"], os.O_RDWR)
    flock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 200 + 1, 1, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, flock)
    STAY.append(fd)


def unlock(order: dict[str, Any], run: Any, stage: socket.socket, pid: int) -> None:
    for fd in STAY:
        os.close(int(str(fd)))
    STAY.clear()


ACTIONS = {
    action.__name__: action
    for action in (
        go_on, fail, no_room, kill_new, kill_new_and_go_on, stop_new, kill_keeper, stop_new_and_kill_keeper,
        resume_helper, wait, until_interrupted, fill, lock, unlock,
    )
}  # fmt: skip


def plant() -> None:
    """Patch what the keeper is about to use."""
    import cpr.journal
    import cpr.linux.launch
    import cpr.qemu.qmp
    import cpr.run

    tell, write_fact, close = cpr.run.Run._tell, cpr.journal.Journal.fact, cpr.journal.Journal.close
    submit, spawn, send = cpr.qemu.qmp.Monitor.submit, cpr.linux.launch._spawn, cpr.linux.launch._send
    runs: list[Any] = []

    def told(run: Any, index: int, step: Any, state: str, error: str = "") -> None:
        runs[:] = [run]
        moment = f"step:{index}:{state}"
        if state in ("done", "undone"):
            happens(moment, run)
        tell(run, index, step, state, error)
        if state in ("doing", "undoing"):
            happens(moment, run)

    def wrote(journal: Any, name: str, **values: Any) -> None:
        happens(f"fact:{name}", runs[0])
        write_fact(journal, name, **values)

    def closed(journal: Any, outcome: Any) -> None:
        close(journal, outcome)
        happens("closed", runs[0])

    def submitted(monitor: Any, command: str, **arguments: Any) -> Any:
        pending = submit(monitor, command, **arguments)
        if runs and monitor is runs[0].new_monitor:
            happens(f"sent:{command}:new", runs[0])
        elif runs:
            happens(f"sent:{command}:old", runs[0])
        return pending

    helpers: list[int] = []

    def spawned(*arguments: Any) -> Any:
        result = spawn(*arguments)
        helpers[:] = [result[2]]
        if any(order["at"] == "launching" for order in ORDERS):
            os.kill(helpers[0], signal.SIGSTOP)
        return result

    def sent(*arguments: Any) -> None:
        send(*arguments)
        happens("launching", runs[0] if runs else None, helpers[0])

    for owner, name, patched in (
        (cpr.run.Run, "_tell", told),
        (cpr.journal.Journal, "fact", wrote),
        (cpr.journal.Journal, "close", closed),
        (cpr.qemu.qmp.Monitor, "submit", submitted),
        (cpr.linux.launch, "_spawn", spawned),
        (cpr.linux.launch, "_send", sent),
    ):
        setattr(owner, name, patched)


if "CPR_TEST_FAULTS" in os.environ and "cpr.keeper" in sys.orig_argv:
    ORDERS += json.loads(os.environ["CPR_TEST_FAULTS"])
    plant()
