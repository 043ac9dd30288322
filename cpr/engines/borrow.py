"""Clients that hold a monitor of the guest stay connected: their sessions are borrowed, and given back in the new QEMU.

    BorrowMonitors ─► QuietenMonitors ─► exec ─► GiveMonitorsBack
       between two commands   no part of one in QEMU    negotiated as they were, commands go on

Where the guest has no other monitor, BorrowControl comes before all else: the old QEMU is driven beside the client, and
the new one over a connection that only we have. Human monitors are borrowed at the last moment (BorrowPrompts).

From the time they are borrowed a relay of ours stands between them and QEMU (relay.py). QEMU's process has their
connections too, so that they live on when we do not (mend.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpr.engines import graft
from cpr.engines.inplace import InPlace, in_place
from cpr.engines.prepare import OpenMonitor, same_runstate
from cpr.engines.relay import HIDDEN, HIDDEN_WHILE_LOADING, SHOWN, Relay
from cpr.engines.typed import Typed
from cpr.errors import CprError, MonitorError, StepFailed
from cpr.linux import fds
from cpr.linux.tracer import Tracer
from cpr.model import Chardev, Guest, Step
from cpr.qemu import clients

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cpr.qemu.qmp import Monitor
    from cpr.run import Run

BORROWED = "borrowed "
"""How the names of the journal's facts begin that say whose session is borrowed."""

SECONDS = 10.0
"""How long a moment between two commands of a client is waited for."""
QUIET_SECONDS = 5.0
"""How long the answers to all that was passed on may take."""
PROMPT_SECONDS = 1.0
"""How long an empty prompt is waited for: each look at one that is not has its line drawn anew."""


def borrowed_monitors(guest: Guest) -> tuple[Chardev, ...]:
    """QMP monitors whose client, if there is one, can be kept."""
    ours = guest.monitor.label if guest.monitor is not None else ""
    return tuple(c for c in guest.chardevs if c.lends_session and c.label != ours)


def borrowed_prompts(guest: Guest) -> tuple[Chardev, ...]:
    """Human monitors at which somebody was when the guest was checked."""
    return tuple(c for c in guest.chardevs if c.lends_prompt and c.connected)


def sessions(run: Run) -> dict[str, Relay | Typed]:
    """What is borrowed, by chardev."""
    found: dict[str, Relay | Typed] = run.extra.setdefault("sessions", {})
    return found


def relays(run: Run) -> dict[str, Relay]:
    """Those of them that speak QMP."""
    return {label: one for label, one in sessions(run).items() if isinstance(one, Relay)}


def executed(run: Run) -> bool:
    """Whether the guest's process has become the new program."""
    kept: InPlace | None = run.extra.get("in_place")
    return kept is not None and kept.executed


def _borrow(run: Run, step: Step, label: str, listener: fds.Fd, number: int, tracer: Tracer, *, show: bool) -> Relay:
    """Come in between QEMU and the client of its descriptor `number`; the journal knows before it is done.

    Raises:
        StepFailed: it cannot be; the client has its session.
    """
    assert run.old is not None
    _note(run, label, listener, number, show=show)
    try:
        relay = Relay.borrow(
            run.old,
            tracer,
            number,
            name=label,
            hide=HIDDEN - SHOWN if show else HIDDEN,
            until=time.monotonic() + SECONDS,
            attend=run.attend,
        )
    except (TimeoutError, MonitorError, OSError) as error:
        raise StepFailed(step.describe(), f"{label}: {error}", hint="try again when its client is idle") from None
    sessions(run)[label] = relay
    if relay.oob:
        note_number(run, label, number, oob=True)
    return relay


def _note(run: Run, label: str, listener: fds.Fd, number: int, **more: Any) -> None:
    assert run.old is not None
    run.extra.setdefault("borrowed", {})[label] = {
        "address": dataclasses.asdict(clients.listen_address(listener, label)),
        "inode": graft.socket_inode(run.old.pid, number),
    }
    note_number(run, label, number, **more)


NOWHERE = -1
"""The number of a client's connection that is not anybody's place yet."""


def note_number(run: Run, label: str, number: int, **more: Any) -> None:
    """In the journal: which descriptor of QEMU is to be the client's connection, which is kept as another one yet."""
    fact = run.extra["borrowed"][label]
    fact |= {"number": number, **more}
    run.journal.fact(BORROWED + label, **fact)


def _give_back(run: Run, labels: Iterable[str]) -> None:
    """On the way back. Raises what went wrong, when all was tried."""
    assert run.old is not None
    failed: list[Exception] = []
    for label in labels:
        session = sessions(run).pop(label, None)
        if session is None:
            continue
        if executed(run):
            session.close()
            run.notes.append(f"{label}: its client was hung up on, on the way back")
            continue
        try:
            with Tracer.start(run.old) as tracer:  # the one before may have ended with what went wrong
                session.give_back(tracer)
        except (CprError, OSError) as error:
            session.close()  # QEMU listens again, so that `cpr recover` can
            failed.append(error)
    if failed:
        raise failed[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class BorrowControl(Step):
    """Come in between QEMU and the client that holds the guest's only monitor, and drive QEMU beside it."""

    guest: Guest
    show: bool = False
    """The client hears of STOP and RESUME."""

    def describe(self) -> str:
        pid = self.guest.process.pid
        return f"borrow the monitor of pid {pid} at {self.guest.monitor} from the client that holds it"

    def do(self, run: Run) -> None:
        assert self.guest.monitor is not None
        assert run.old is not None
        label = self.guest.monitor.label
        number = next(c.listener for c in self.guest.chardevs if c.label == label and c.listener is not None)
        with fds.take_fd(run.old.pidfd, number) as listener:
            held = clients.accepted(run.old.pid, {label: listener}, alive=True)[label]
            if not held:  # it has left since the check
                return OpenMonitor(guest=self.guest).do(run)
            if len(held) > 1:
                raise StepFailed(self.describe(), "another client came in between", hint="try again")
            with Tracer.start(run.old) as tracer:
                relay = _borrow(run, self, label, listener, held[0], tracer, show=self.show)
        run.old_monitor = relay.monitor
        return same_runstate(run, self.guest, self.describe())

    def undo(self, run: Run) -> None:
        OpenMonitor(guest=self.guest).undo(run)
        assert self.guest.monitor is not None
        if self.guest.monitor.label in relays(run) and not executed(run):
            with contextlib.suppress(CprError):
                run.last_runstate = str(run.monitor.execute("query-status", timeout=QUIET_SECONDS)["status"])
        _give_back(run, [self.guest.monitor.label])


@dataclass(frozen=True, slots=True, kw_only=True)
class BorrowMonitors(Step):
    """Come in between QEMU and each client that holds another monitor, while the guest runs."""

    guest: Guest
    monitors: tuple[Chardev, ...]
    show: bool = False
    """The clients hear of STOP and RESUME."""

    def describe(self) -> str:
        return f"borrow the monitors that are held: {', '.join(c.label for c in self.monitors)}"

    def do(self, run: Run) -> None:
        assert run.old is not None
        for label, number in _held_by_others(run, self.monitors).items():
            listener, tracer = run.descriptors[f"listener:{label}"], in_place(run).tracer
            _borrow(run, self, label, listener, number, tracer, show=self.show)

    def undo(self, run: Run) -> None:
        _give_back(run, [c.label for c in self.monitors])


def _held_by_others(run: Run, monitors: tuple[Chardev, ...]) -> dict[str, int]:
    """{label: descriptor of the client} of those that somebody else than we holds now."""
    assert run.old is not None
    listeners = {c.label: run.descriptors[f"listener:{c.label}"] for c in monitors}
    ours = {graft.accepted_of(run.old, sock) for sock in run.extra["held"]}
    now = clients.connected_now(run.old.pid, monitors, listeners)
    return {c.label: c.client for c in now if c.client is not None and c.client not in ours}


@dataclass(frozen=True, slots=True, kw_only=True)
class BorrowPrompts(Step):
    """Take the place of each client of a human monitor while it is at an empty prompt. Late: it waits from here on."""

    monitors: tuple[Chardev, ...]

    def describe(self) -> str:
        return f"borrow the human monitors that are held: {', '.join(c.label for c in self.monitors)}"

    def do(self, run: Run) -> None:
        assert run.old is not None
        for label, number in _held_by_others(run, self.monitors).items():
            _note(run, label, run.descriptors[f"listener:{label}"], number, human=True)
            until, tracer = time.monotonic() + PROMPT_SECONDS, in_place(run).tracer
            try:
                sessions(run)[label] = Typed.borrow(run.old, tracer, number, name=label, until=until)
            except (TimeoutError, MonitorError, OSError) as error:
                hint = "finish what is typed there, or end that session, and try again"
                raise StepFailed(self.describe(), str(error), hint=hint) from None

    def undo(self, run: Run) -> None:
        _give_back(run, [c.label for c in self.monitors])


@dataclass(frozen=True, slots=True, kw_only=True)
class QuietenMonitors(Step):
    """Hold further commands of theirs back, and wait for the answers to all others: QEMU has no part of any."""

    show: bool = False

    def describe(self) -> str:
        return "let the clients of the monitors have their answers, and hold further commands back"

    def do(self, run: Run) -> None:
        for label, relay in relays(run).items():
            if not relay.quiesce(QUIET_SECONDS):
                words = f"{label}: a command has not been answered for {QUIET_SECONDS:g} s"
                raise StepFailed(self.describe(), words, hint="try again")
            relay.hide(HIDDEN_WHILE_LOADING - SHOWN if self.show else HIDDEN_WHILE_LOADING)

    def undo(self, run: Run) -> None:
        if not executed(run):
            for relay in relays(run).values():
                relay.hide(HIDDEN - SHOWN if self.show else HIDDEN)
                relay.release()


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveMonitorsBack(Step):
    """Bring a session with the new QEMU to where each client's was, negotiated or at the prompt, and put it there."""

    guest: Guest
    show: bool = False
    """They were told of STOP, and are told of RESUME, which the new QEMU said to us alone."""

    def describe(self) -> str:
        return "give the borrowed monitors back"

    def do(self, run: Run) -> None:
        assert run.new is not None
        failed = []
        for label, session in list(sessions(run).items()):
            sock = run.extra["places"][label]
            run.extra["held"].remove(sock)  # it is the session's from here on
            try:
                if self.show:
                    tell_resume(session, run.successor)
                number = graft.accepted_of(run.new, sock)
                if number is None:
                    raise StepFailed(self.describe(), "the new QEMU has not accepted our connection")
                session.reconnect(sock)
                note_number(run, label, number)
                with Tracer.start(run.new) as tracer:
                    session.give_back(tracer, number)
            except (CprError, OSError, TimeoutError) as error:
                with contextlib.suppress(Exception):
                    if isinstance(session, Relay):
                        session.release()  # it goes on through us as long as we live
                failed.append(f"{label}: {error}")
            else:
                del sessions(run)[label]
        if failed:
            raise StepFailed(self.describe(), "; ".join(failed))


def tell_resume(session: Relay | Typed, monitor: Monitor) -> None:
    """Have a client that was told of STOP hear of RESUME, as the QEMU behind `monitor` said it; one that is paused has
    not."""
    said = [event for event in monitor.events() if event.name == "RESUME"]
    if said and isinstance(session, Relay):
        session.tell(said[-1].message)
