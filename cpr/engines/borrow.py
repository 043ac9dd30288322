"""Clients that hold a monitor of the guest stay connected: their sessions are borrowed, and given back in the new QEMU.

    BorrowMonitors ─► QuietenMonitors ─► exec ─► GiveMonitorsBack
       between two commands   no part of one in QEMU    negotiated as they were, commands go on

Where the guest has no other monitor, BorrowControl comes before all else: the old QEMU is driven beside the client, and
the new one over a connection that only we have.

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
from cpr.errors import CprError, MonitorError, StepFailed
from cpr.linux.tracer import Tracer
from cpr.linux import fds
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


def borrowed_monitors(guest: Guest) -> tuple[Chardev, ...]:
    """QMP monitors whose client, if there is one, can be kept."""
    ours = guest.monitor.label if guest.monitor is not None else ""
    return tuple(c for c in guest.chardevs if c.lends_session and c.label != ours)


def relays(run: Run) -> dict[str, Relay]:
    """By chardev."""
    found: dict[str, Relay] = run.extra.setdefault("relays", {})
    return found


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
    fact = {
        "address": dataclasses.asdict(clients.listen_address(listener, label)),
        "number": number,
        "inode": graft.socket_inode(run.old.pid, number),
        "show": show,
    }
    run.extra.setdefault("borrowed", {})[label] = fact
    run.journal.fact(BORROWED + label, **fact)
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
    relays(run)[label] = relay
    if relay.oob:
        note_number(run, label, number, oob=True)
    return relay


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
        relay = relays(run).pop(label, None)
        if relay is None:
            continue
        if executed(run):
            relay.close()
            run.notes.append(f"{label}: its client was hung up on, on the way back")
            continue
        try:
            with Tracer.start(run.old) as tracer:  # the one before may have ended with what went wrong
                relay.give_back(tracer)
        except (CprError, OSError) as error:
            relay.close()  # QEMU listens again, so that `cpr recover` can
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
        listeners = {c.label: run.descriptors[f"listener:{c.label}"] for c in self.monitors}
        ours = {graft.accepted_of(run.old, sock) for sock in run.extra["held"]}
        for chardev in clients.connected_now(run.old.pid, self.monitors, listeners):
            if chardev.client is not None and chardev.client not in ours:
                listener, tracer = listeners[chardev.label], in_place(run).tracer
                _borrow(run, self, chardev.label, listener, chardev.client, tracer, show=self.show)

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
    """Negotiate with the new QEMU what each client had negotiated, and put its connection there."""

    guest: Guest
    show: bool = False
    """They were told of STOP, and are told of RESUME, which the new QEMU said to us alone."""

    def describe(self) -> str:
        return "give the borrowed monitors back"

    def do(self, run: Run) -> None:
        assert run.new is not None
        failed = []
        for label, relay in list(relays(run).items()):
            sock = run.extra["places"][label]
            run.extra["held"].remove(sock)  # it is the relay's from here on
            try:
                if self.show:
                    tell_resume(relay, run.successor)
                number = graft.accepted_of(run.new, sock)
                if number is None:
                    raise StepFailed(self.describe(), "the new QEMU has not accepted our connection")
                relay.reconnect(sock)
                note_number(run, label, number)
                with Tracer.start(run.new) as tracer:
                    relay.give_back(tracer, number)
            except (CprError, OSError, TimeoutError) as error:
                with contextlib.suppress(Exception):
                    relay.release()  # it goes on through us as long as we live
                failed.append(f"{label}: {error}")
            else:
                del relays(run)[label]
        if failed:
            raise StepFailed(self.describe(), "; ".join(failed))


def tell_resume(relay: Relay, monitor: Monitor) -> None:
    """Have a client that was told of STOP hear of RESUME, as the QEMU behind `monitor` said it; one that is paused has
    not."""
    said = [event for event in monitor.events() if event.name == "RESUME"]
    if said:
        relay.tell(said[-1].message)
