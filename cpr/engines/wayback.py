"""The way back of an update in place: the old program is started again from RAM, state and connections that we hold.

The new program has died, hangs or does not take the state, and has run nothing of the guest. It is killed, a process
in the likeness of the old one executes the old program by the descriptor that we hold, and the guest goes on there.
Only its pid is another one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cpr.engines import graft, leftover, ptys, stream
from cpr.engines.borrow import NOWHERE, note_number, sessions, tell_resume
from cpr.engines.prepare import greet, same_ram, words_of
from cpr.engines.relay import Relay
from cpr.engines.settings import Settings, hand_back, put_back
from cpr.engines.successor import MARK, run_mark
from cpr.engines.switch import MASTER, PassVncListeners, clients_held, held, reconnect
from cpr.errors import CprError, StepFailed
from cpr.linux import likeness
from cpr.linux.process import Process
from cpr.linux.tracer import Tracer
from cpr.qemu import clients, qmp

if TYPE_CHECKING:
    from cpr.engines.inplace import InPlace
    from cpr.engines.successor import Successor
    from cpr.linux.fds import Fd
    from cpr.model import Guest
    from cpr.run import Run

STEP = "start the old QEMU again"
ATTEMPTS = 3
STATE_NUMBER, PROGRAM_NUMBER, CLIENT_NUMBERS = 8, 9, range(10, 20)
"""Below all that a successor is given: the state, for `cpr recover`; the old program where another file stands at its
path now; clients whose monitors were borrowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """What the process has under which (number, inode) in case that we die: `cpr recover` goes on with it."""

    state: tuple[int, int]
    clients: dict[str, tuple[int, int]]
    """By chardev."""
    ptys: dict[str, tuple[int, int]]
    """Masters, by chardev."""
    vnc: list[list[tuple[int, int]]]
    """Listeners of each display."""

    @property
    def left(self) -> list[tuple[int, int]]:
        """What it does not need any more once it has been given it over the monitor."""
        return [*self.clients.values(), *itertools.chain(*self.vnc)]

    def facts(self) -> dict[str, object]:
        lasting = {"state": self.state, "clients": self.clients, "ptys": self.ptys}
        return {**lasting, "vnc": self.vnc, "left": self.left}


def bring_back(run: Run, guest: Guest, back: Successor, kept: InPlace) -> None:
    """Start the old program again and have the guest go on in it; `run.old` is that process afterwards.

    Raises:
        StepFailed, NewQemuDied: it could not be; what is held stays held as long as we live.
    """
    assert run.old is not None
    kept.let_go()  # what a tracer holds does not die
    for unit in _units(guest):
        run.journal.fact("outside", unit=unit)  # before systemd sees it end: see reboot/claims.py
    run.old.kill()
    if not run.old.wait_dead(15.0):
        raise StepFailed(STEP, f"pid {run.old.pid} does not die", hint="cpr recover tries again")
    run.new = None
    for name in back.bound:
        run.descriptors.pop(name).close()  # it binds them again: nobody else has them now
    for attempt in range(ATTEMPTS):
        try:
            process, monitor, placed = _start(run, guest, back, kept)
            break
        except CprError as error:
            if attempt == ATTEMPTS - 1:
                run.extra["lost"] = "the guest is down: the new QEMU failed, and the old one could not be started again"
                raise
            run.notes.append(f"on the way back, tried again: {error.message}")
            if attempt == ATTEMPTS - 2 and back.bound:
                run.notes.append("started without its VNC or SPICE listeners, in case that they are what fails")
                back = replace(back, argv=back.deaf)
    reconnect(run, run.successor, dict(clients_held(run)))
    try:
        ptys.give_back(process, monitor, {label: number for label, (number, _) in placed.ptys.items()})
    except (CprError, OSError) as error:
        run.notes.append(f"{', '.join(placed.ptys)}: the guest has another pty on the way back ({error})")
    seen = monitor.event_count
    if guest.running:
        monitor.execute("cont")
        with contextlib.suppress(TimeoutError, CprError):
            run.resume_time = monitor.wait_event({"RESUME"}, timeout=2.0, after=seen).timestamp
    run.old, run.new = process, None
    run.old_monitor, run.new_monitor = monitor, None
    _put_back(run, guest, back)
    _give_monitors_back(run, process)
    run.notes += leftover.close_left(process, placed.left)
    run.notes += [_outside(unit, process.pid) for unit in _units(guest)]


def _units(guest: Guest) -> list[str]:
    return [supervisor.who for supervisor in guest.supervisors if supervisor.kind == "systemd"]


def _outside(unit: str, pid: int) -> str:
    return (
        f"to systemd {unit} has ended: the guest runs outside of it, in pid {pid}; with Restart= it may be started a "
        f"second time, if it has not the drop-in cpr-guest.conf: `systemctl mask --runtime --now {unit}` keeps it from "
        "that until it is shut down"
    )


def _start(run: Run, guest: Guest, back: Successor, kept: InPlace) -> tuple[Process, qmp.Monitor, Placed]:
    """A process with the old program that has the state and has run nothing; nothing is left of it where it fails."""
    for label in sessions(run):
        with contextlib.suppress(CprError):
            note_number(run, label, NOWHERE)
    given, placed = _given(run, back, kept)
    run.journal.fact("going back", **placed.facts())
    process, control = _launch(run, guest, back, kept, given)
    try:
        run.new = process
        run.journal.fact("back", pid=process.pid, start_time=process.start_time)
        if run.new_monitor is not None:
            run.new_monitor.close()
        os.lseek(kept.state.number, 0, os.SEEK_SET)
        monitor = run.new_monitor = greet(run, STEP, control, stream.load_commands(STATE_NUMBER))
        stream.finish_load(run, monitor, STEP)
        same_ram(guest, kept.ram, process.pid, STEP)
    except BaseException:
        run.kill_new()
        run.new = None
        raise
    return process, monitor, placed


def _given(run: Run, back: Successor, kept: InPlace) -> tuple[dict[int, int], Placed]:
    """{number in the process: ours} of what it is started with, and what of it counts should we die."""
    given = {e.target: run.descriptors[e.name].number for e in back.inherited if e.target is not None}
    given[STATE_NUMBER] = kept.state.number
    given |= dict(zip(CLIENT_NUMBERS, (session.client_number for session in sessions(run).values()), strict=False))
    free = itertools.count(max(*given, *CLIENT_NUMBERS, back.control_number or 0) + 1)

    def place(fd: Fd) -> tuple[int, int]:
        number = next(free)
        given[number] = fd.number
        return number, os.fstat(fd.number).st_ino

    placed = Placed(
        state=(STATE_NUMBER, os.fstat(kept.state.number).st_ino),
        clients={label: place(fd) for label, fd in clients_held(run)},
        ptys={label: place(fd) for label, fd in held(run, MASTER)},
        vnc=[[place(run.descriptors[name]) for name in names] for _, names in back.vnc],
    )
    return given, placed


def _launch(
    run: Run, guest: Guest, back: Successor, kept: InPlace, given: dict[int, int]
) -> tuple[Process, socket.socket]:
    run.words = words_of(run.descriptors.get("stdio:2"))
    ours, theirs = socket.socketpair()
    assert back.control_number is not None
    if kept.console is not None:
        with contextlib.suppress(OSError):
            kept.console.as_before()
    given = {**given, back.control_number: theirs.fileno()}
    with theirs:
        for executable in ((guest.binary.path, guest.binary.identity), (f"/proc/self/fd/{PROGRAM_NUMBER}", None)):
            try:
                launched = likeness.launch(
                    _like(guest, kept),
                    argv=back.argv,
                    environ=back.environ,
                    executable=executable,
                    descriptors=given if executable[1] else {**given, PROGRAM_NUMBER: kept.binary.number},
                    stdin=run.descriptors.get("stdio:0"),
                    stdout=run.descriptors.get("stdio:1"),
                    stderr=run.descriptors.get("stdio:2"),
                    mark=(MARK, run_mark(run.journal.run_id, guest.process.pid)),
                    places=kept.places,
                )
            except OSError as error:
                failure = error
                continue
            return Process(launched.pid, launched.start_time, launched.pidfd), ours
    ours.close()
    raise StepFailed(STEP, f"it cannot be started: {failure.strerror or failure}")


def _like(guest: Guest, kept: InPlace) -> likeness.Likeness:
    """As the old process was; but systemd ends everything in the cgroup of a service whose main process has died."""
    if _units(guest):
        return replace(kept.like, cgroups=())
    return kept.like


def _put_back(run: Run, guest: Guest, back: Successor) -> None:
    """The guest runs; what fails now is told, and nothing more."""
    assert run.old is not None
    settings: Settings = run.extra["settings"]
    failed = put_back(run.monitor, settings, old=guest.process.pid, new=run.old.pid)
    told: list[str] = []
    try:
        if back.vnc:
            PassVncListeners(vnc=back.vnc).give(run, run.monitor)
        told, more = hand_back(run.monitor, settings.hand_back)
        failed += more
    except CprError as error:
        failed.append(error.message)
    run.notes += [*told, *failed]


def _give_monitors_back(run: Run, process: Process) -> None:
    """Clients whose sessions were borrowed have them again, with the old program. One that cannot is told of."""
    for sock in run.extra.get("held", []):
        sock.close()  # they wait for the monitors, or were with the one that failed
    for number, (label, session) in zip(CLIENT_NUMBERS, list(sessions(run).items()), strict=False):
        try:
            session.move(process, number)
            listener = run.descriptors[f"listener:{label}"]
            sock = qmp.open_socket(clients.listen_address(listener, label), process.pid)
            session.reconnect(sock)
            accepted = graft.accepted_of(process, sock)
            if accepted is None:
                raise StepFailed(STEP, "it was not found out which descriptor of QEMU our session is")
            note_number(run, label, accepted)
            if isinstance(session, Relay) and "RESUME" not in session.hiding:
                tell_resume(session, run.monitor)
            with Tracer.start(process) as tracer:
                session.give_back(tracer, accepted)
        except (CprError, OSError) as error:
            run.notes.append(f"{label}: its client lost its session on the way back ({error})")
            session.close()
        del sessions(run)[label]
