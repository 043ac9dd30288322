"""Clients that hold a monitor of the guest stay connected: their sessions are borrowed, and given back in the new QEMU.

    BorrowMonitors ─► QuietenMonitors ─► exec ─► GiveMonitorsBack
       between two commands   no part of one in QEMU    negotiated as they were, commands go on

From the time they are borrowed a relay of ours stands between them and QEMU (relay.py). QEMU's process has their
connections too, so that they live on when we do not (mend.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpr.engines import graft
from cpr.engines.inplace import in_place
from cpr.engines.relay import HIDDEN_WHILE_LOADING, Relay
from cpr.errors import CprError, MonitorError, StepFailed
from cpr.linux.tracer import Tracer
from cpr.model import Chardev, Guest, Step
from cpr.qemu import clients

if TYPE_CHECKING:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class BorrowMonitors(Step):
    """Come in between QEMU and each client that holds a monitor, while the guest runs."""

    guest: Guest
    monitors: tuple[Chardev, ...]

    def describe(self) -> str:
        return f"borrow the monitors that are held: {', '.join(c.label for c in self.monitors)}"

    def do(self, run: Run) -> None:
        assert run.old is not None
        pid = run.old.pid
        listeners = {c.label: run.descriptors[f"listener:{c.label}"] for c in self.monitors}
        ours = {graft.accepted_of(run.old, sock) for sock in run.extra["held"]}
        for chardev in clients.connected_now(pid, self.monitors, listeners):
            if chardev.client is None or chardev.client in ours:
                continue
            address = clients.listen_address(listeners[chardev.label], chardev.label)
            run.journal.fact(
                BORROWED + chardev.label,
                address=dataclasses.asdict(address),
                number=chardev.client,
                inode=graft.socket_inode(pid, chardev.client),
            )
            try:
                relays(run)[chardev.label] = Relay.borrow(
                    run.old,
                    in_place(run).tracer,
                    chardev.client,
                    name=chardev.label,
                    hide=HIDDEN_WHILE_LOADING,
                    until=time.monotonic() + SECONDS,
                )
            except (TimeoutError, MonitorError, OSError) as error:
                raise StepFailed(
                    self.describe(), f"{chardev.label}: {error}", hint="try again when its client is idle"
                ) from None

    def undo(self, run: Run) -> None:
        if in_place(run).executed:
            for label, relay in relays(run).items():
                relay.close()
                run.notes.append(f"{label}: its client was hung up on, on the way back")
            relays(run).clear()
            return
        assert run.old is not None
        for relay in relays(run).values():
            with Tracer.start(run.old) as tracer:  # the one before may have ended with what went wrong
                relay.give_back(tracer)
        relays(run).clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class QuietenMonitors(Step):
    """Hold further commands of theirs back, and wait for the answers to all others: QEMU has no part of any."""

    def describe(self) -> str:
        return "let the clients of the monitors have their answers, and hold further commands back"

    def do(self, run: Run) -> None:
        for label, relay in relays(run).items():
            if not relay.quiesce(QUIET_SECONDS):
                words = f"{label}: a command has not been answered for {QUIET_SECONDS:g} s"
                raise StepFailed(self.describe(), words, hint="try again")

    def undo(self, run: Run) -> None:
        if not in_place(run).executed:
            for relay in relays(run).values():
                relay.release()


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveMonitorsBack(Step):
    """Negotiate with the new QEMU what each client had negotiated, and put its connection there."""

    guest: Guest

    def describe(self) -> str:
        return "give the borrowed monitors back"

    def do(self, run: Run) -> None:
        assert run.new is not None
        failed = []
        for label, relay in list(relays(run).items()):
            sock = run.extra["places"][label]
            run.extra["held"].remove(sock)  # it is the relay's from here on
            try:
                number = graft.accepted_of(run.new, sock)
                if number is None:
                    raise StepFailed(self.describe(), "the new QEMU has not accepted our connection")
                relay.reconnect(sock)
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
