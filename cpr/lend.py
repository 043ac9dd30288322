"""Looking at a guest whose QMP monitors are all held: one session is borrowed for as long as the survey takes.

    command ── which monitor ──────────► lender    locks the guest, borrows (engines/relay.py)
            ◄── a QMP channel ──────────           QEMU serves us beside the client, which notices nothing
            ── hangs up, or dies ──────►           gives the session back, unlocks the guest, ends

The lender is a process of its own that ignores signals: a command that is interrupted or killed leaves the client with
its session. Should the lender be killed, QEMU listens again and keeps the client's connection, which nobody reads; that
is seen from QEMU alone, and whoever looks at the guest next gives it back.

Out of scope: borrowing for an update, where the keeper is such a process (engines/borrow.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from cpr import survey as surveying
from cpr import survey_process
from cpr.engines import graft, mend
from cpr.engines.relay import Relay
from cpr.errors import CprError, MonitorError, MonitorHeld
from cpr.journal import run_directory
from cpr.linux import ours, proc
from cpr.linux.lock import LOOK, LOOK_SECONDS, LockHeld, ProcessLock, make_run_directory, patient_lock
from cpr.linux.process import Process, open_process
from cpr.linux.tracer import Tracer
from cpr.model import MonitorAddress
from cpr.qemu import clients, qmp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cpr.model import Candidate, Guest, ProcessId
    from cpr.qemu.qmp import Monitor
    from cpr.survey import Lent

BORROW_SECONDS = 5.0
"""How long a moment between two commands of the client is waited for."""
START_SECONDS = LOOK_SECONDS + BORROW_SECONDS + 20.0
GIVE_BACK_SECONDS = 60.0
"""How long it is tried to give a session back: QEMU may be busy, and the client slow to read."""

_PROGRAM = "from cpr.lend import main; main()"


def survey(candidate: Candidate) -> Guest:
    """Everything about one guest (survey.py), also where clients hold all its monitors.

    Raises:
        MonitorHeld: each is held, and no session can be borrowed; it says why. Otherwise as `survey.survey`.
    """
    try:
        try:
            with surveying.open_monitor(candidate) as monitor:
                left = _left_behind(candidate, monitor)
                if left is None:
                    return surveying.survey(candidate, monitor)
            mend_session(candidate.process, left)
            return survey(candidate)
        except MonitorHeld as held:
            return _survey_borrowed(candidate, held)
    except MonitorError:
        surveying.same_process(candidate)
        raise


def _survey_borrowed(candidate: Candidate, held: MonitorHeld) -> Guest:
    address = next((a for a in candidate.monitors if a.path and holders(candidate.process.pid, a)), None)
    if address is None:
        raise held
    lacking = survey_process.untraceable(candidate.process.pid)
    if lacking is not None:
        raise _refusal(address, f"{lacking.why}: that takes system calls in QEMU's own process", lacking.way_out)
    with borrowed(candidate.process, address) as (monitor, lent):
        return surveying.survey(candidate, monitor, lent)


def _refusal(address: MonitorAddress, why: str, way_out: str = "") -> MonitorHeld:
    hint = "; or ".join(filter(None, [way_out, surveying.HELD_HINT]))
    return MonitorHeld(str(address), f"another client holds it, and its session cannot be borrowed: {why}", hint=hint)


def holders(pid: int, address: MonitorAddress) -> list[int]:
    """As `clients.holders`; none where we may not look."""
    try:
        return clients.holders(pid, address)
    except OSError:
        return []


@contextlib.contextmanager
def borrowed(process: ProcessId, address: MonitorAddress) -> Iterator[tuple[Monitor, Lent]]:
    """A session beside that of the client which holds the monitor; given back at the end, or when we die.

    Raises:
        MonitorHeld: it cannot be borrowed, or somebody works on the guest.
    """
    here, there = socket.socketpair()
    with here, there:
        try:
            lender = _start(process, address, there)
        except OSError as error:
            raise _refusal(address, f"no process can be started ({error.strerror or error})") from None
        there.close()
        here.settimeout(START_SECONDS)
        try:
            told, channel = _hear(here)
            if channel is None:
                why = told.get("error", "the process that was to do it was ended")
                raise _refusal(address, why, told.get("hint", ""))
            with qmp.negotiate(channel, str(address)) as monitor:
                yield monitor, surveying.Lent(number=told["number"], inode=told["inode"])
        finally:
            with contextlib.suppress(OSError):
                here.shutdown(socket.SHUT_WR)
                _hear(here)  # that it is given back
            _reap(lender)


def _start(process: ProcessId, address: MonitorAddress, there: socket.socket) -> subprocess.Popen[bytes]:
    request = {
        "pid": process.pid,
        "start_time": process.start_time,
        "address": dataclasses.asdict(address),
        "base": run_directory(),
    }
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _PROGRAM, json.dumps(request)],
        stdin=there.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=None if os.environ.get("CPR_DEBUG") else subprocess.DEVNULL,
        start_new_session=True,
        env=ours.environment(),
    )


def _hear(sock: socket.socket) -> tuple[dict[str, Any], socket.socket | None]:
    """What the lender says, with the channel that comes with it; nothing where it has ended. Raises OSError."""
    data, numbers, _, _ = socket.recv_fds(sock, 65536, 1)
    channel = socket.socket(fileno=numbers[0]) if numbers else None
    return (json.loads(data) if data else {}), channel


def _reap(lender: subprocess.Popen[bytes]) -> None:
    """It ends by itself; one that is still at it (its client does not read) is left to it."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        lender.wait(1.0)


# what a lender left that was killed ----------------------------------------------------------------------------


def _left_behind(candidate: Candidate, monitor: Monitor) -> MonitorAddress | None:
    """The address of our session, if QEMU has another living connection to it: that one is not served."""
    address = next((a for a in candidate.monitors if str(a) == monitor.address and a.path), None)
    return address if address is not None and len(holders(candidate.process.pid, address)) > 1 else None


def mend_session(process: ProcessId, address: MonitorAddress) -> None:
    """Give a client its session back that was borrowed from it by somebody who died.

    Raises:
        MonitorHeld: it cannot be given back now. MonitorError: QEMU does not answer.
    """
    try:
        with lock(process, run_directory()), open_process(process.pid, process.start_time) as held:
            end = time.monotonic() + mend.SECONDS
            while len(left := holders(process.pid, address)) != 1:  # a session of ours that is just being closed
                if not left:
                    return
                if time.monotonic() > end:
                    raise _refusal(address, "it was borrowed and not given back, and others come in between")
                time.sleep(0.01)
            kept = graft.Kept(number=left[0], inode=graft.socket_inode(process.pid, left[0]))
            with Tracer.start(held) as tracer:
                mend.repair(held, tracer, address, kept)
    except LockHeld as locked:
        raise _refusal(address, _working(locked)) from None
    except OSError as error:
        why = f"it was borrowed and not given back, and that cannot be done now ({error.strerror or error})"
        raise _refusal(address, why) from None


# the lender ----------------------------------------------------------------------------------------------------


def lock(process: ProcessId, base: str) -> ProcessLock:
    """The guest's lock, for one who only looks. Raises LockHeld, OSError."""
    make_run_directory(base)
    return patient_lock(
        base,
        process.pid,
        process.start_time,
        boot_id=proc.boot_id(),
        owner_uid=proc.read_status(process.pid).uids[0],
        holder={"command": LOOK},
    )


def _working(locked: LockHeld) -> str:
    return f"run {locked.holder.get('run', '?')} (pid {locked.holder.get('pid', '?')}) is working on this guest"


def main() -> None:
    """The lender itself. It ends by the end of its socket only."""
    ours.outlive((*ours.HANG_UPS, signal.SIGTERM))
    sys.setswitchinterval(0.001)
    sock = socket.socket(fileno=os.dup(0))
    request = json.loads(sys.argv[1])
    try:
        _lend(sock, request)
        told: dict[str, Any] = {}
    except LockHeld as locked:
        told = {"error": _working(locked)}
    except CprError as error:
        told = {"error": getattr(error, "reason", error.message), "hint": error.hint}
    except TimeoutError as error:
        told = {"error": str(error), "hint": "try again when the client is idle"}
    except OSError as error:
        told = {"error": f"{error.strerror or error}"}
    with contextlib.suppress(OSError):
        sock.sendall(json.dumps(told).encode())
    os._exit(0)


def _lend(sock: socket.socket, request: dict[str, Any]) -> None:
    from cpr.model import ProcessId

    address = MonitorAddress(**request["address"])
    identity = ProcessId(request["pid"], request["start_time"])
    with (
        lock(identity, request["base"]),
        open_process(identity.pid, identity.start_time) as process,
        Tracer.start(process) as tracer,
    ):
        held = holders(process.pid, address)
        if len(held) != 1:
            which = "several connections to it are open" if held else "it has just hung up"
            raise MonitorHeld(str(address), which, hint="try again")
        until = time.monotonic() + BORROW_SECONDS
        relay = Relay.borrow(process, tracer, held[0], name=str(address), hide=(), until=until)
        try:
            with relay.channel() as channel:
                told = {"number": relay.number, "inode": relay.kept.inode}
                socket.send_fds(sock, [json.dumps(told).encode()], [channel.fileno()])
            sock.recv(1)
        except OSError:
            pass  # the command has died
        finally:
            _give_back(relay, process, tracer)


def _give_back(relay: Relay, process: Process, tracer: Tracer) -> None:
    end = time.monotonic() + GIVE_BACK_SECONDS
    while True:
        try:
            return relay.give_back(tracer)
        except TimeoutError:  # it goes on through us meanwhile
            if time.monotonic() > end or not process.alive():
                raise
