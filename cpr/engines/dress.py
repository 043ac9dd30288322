"""The rehearsal of the state: the new QEMU, and the old one started anew, load the guest's own state and are ended.

For engines whose switch burns the bridge: what a load would say is known before, of the way there and of the way back.

    start both ─► have the guest's QEMU send its state ─► STOP ─► both have loaded it ─► "failed" ─► RESUME ─► end both

The guest's QEMU is told that its migration failed, whatever the verdicts: then it takes its images back and goes on by
itself. So it does when we die, for the kernel hangs up in our place. A paused guest is asked for the state of its
devices without a migration, and is not touched at all; that state leaves out names and sizes of RAM and ROMs.

Out of scope: starting them (qemu/state_rehearsal.py), the way of the state (qemu/state_stream.py).
"""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpr.engines import stream, threads
from cpr.engines.prepare import same_runstate
from cpr.errors import CommandFailed, MonitorError, NewQemuDied, StepFailed
from cpr.model import Guest, Step, Target
from cpr.qemu import migration
from cpr.qemu.rehearsal import REHEARSAL_SECONDS, NotStarted
from cpr.qemu.state_rehearsal import CannotRehearse, new_qemu, not_rehearsable, old_qemu
from cpr.qemu.state_stream import Tee, device_state
from cpr.run import resume_old

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cpr.qemu.rehearsal import Started
    from cpr.run import Run

SENT = "rehearsal:sent"
"""In `Run.extra` while the guest's QEMU has settings, or stands still, because of us: how many events came before."""
MARK = "rehearsal:mark"
"""In `Run.extra` afterwards: how the state of a guest that runs has ended."""
PAUSE = "rehearsal:pause"
"""In `Run.extra` afterwards: seconds from STOP to RESUME."""
ENDED = ("none", *migration.ENDED)
END_SECONDS = 5.0
"""Longest that the end of a migration is waited for that was hung up on."""
BARRED = "no way back would be left"


@dataclass(frozen=True, slots=True)
class _Party:
    """A rehearsing QEMU, and how many events it had sent before its load."""

    qemu: Started
    back: bool
    seen: int

    def refusal(self, step: str) -> StepFailed:
        """Its own words, now that it has ended or failed."""
        self.qemu.process.wait_dead(1.0)
        words = self.qemu.words()
        if self.qemu.process.alive():
            words = migration.failure(self.qemu.monitor) or words
        if self.back:
            quoted = f': "{words}"' if words else ""
            reason = f"the old QEMU, started anew, would not take the guest's state back{quoted}"
            return StepFailed(step, reason, hint=BARRED)
        return NewQemuDied(step, "would not take the guest's state", words)


@dataclass(frozen=True, slots=True, kw_only=True)
class RehearseState(Step):
    """Have the new QEMU, and for the way back the old one, load the guest's state over a private mapping of its RAM.

    Does nothing but pause a running guest for a moment. Run.new is left alone: a rehearsing QEMU is not the new one.
    """

    guest: Guest
    target: Target

    def describe(self) -> str:
        return f"rehearse that {self.target.binary} takes the guest's state, and for the way back the old QEMU"

    def do(self, run: Run) -> None:
        left_out = [*not_rehearsable(self.guest), *self._untold()]
        with contextlib.ExitStack() as held:
            try:
                parties = self._start(run, held, state=not left_out)
            except CannotRehearse as error:
                run.notes.append(f"the state was not rehearsed, only the start: {error}")
                self._start(run, held, state=False)
                return
            if left_out:
                run.notes.append(f"the state was not rehearsed, only the start: {', '.join(left_out)} stays out of it")
                return
            same_runstate(run, self.guest, self.describe())
            refusing = self._running(run, parties) if self.guest.running else self._paused(run, parties)
            if refusing is not None:
                raise refusing.refusal(self.describe())

    def _untold(self) -> list[str]:
        """A paused guest gives its state by descriptor only, and none passes a TCP monitor."""
        assert self.guest.monitor is not None
        return [] if self.guest.running or self.guest.monitor.path else ["a paused guest with a TCP monitor"]

    def _start(self, run: Run, held: contextlib.ExitStack, *, state: bool) -> list[_Party]:
        assert run.old is not None
        parties: list[_Party] = []
        for back in (False, True):
            run.check(self.describe())
            seconds = max(0.1, min(REHEARSAL_SECONDS, run.remaining()))
            if back:
                starting = old_qemu(self.guest, run.old, timeout=seconds, attend=run.attend, state=state)
            else:
                starting = new_qemu(
                    self.guest, self.target, run.old, timeout=seconds, attend=run.attend, state=state
                )
            try:
                it = held.enter_context(starting)
            except NotStarted as error:
                if not back:
                    raise NewQemuDied(self.describe(), "does not start", str(error)) from None
                reason = f'the old QEMU does not start any more: "{error}"'
                raise StepFailed(self.describe(), reason, hint=BARRED) from None
            known = [[p.qemu.process.pid, p.qemu.process.start_time] for p in parties]
            run.journal.fact("rehearsing", processes=[*known, [it.process.pid, it.process.start_time]])
            # a stream without RAM is refused by who expects to leave some out (QEMU 8.1, "capabilities")
            if not back:
                threads.learn(run, self.guest, it)
            migration.prepare(it.monitor, migration.SWITCHED_ON if self.guest.running else ("events",))
            parties.append(_Party(it, back, it.monitor.event_count))
        return parties

    # a guest that runs ---------------------------------------------------------------------------------------

    def _running(self, run: Run, parties: list[_Party]) -> _Party | None:
        """Who refused; the guest runs again."""
        seen = run.monitor.event_count
        run.extra["touched"] = True
        run.extra[SENT] = seen
        migration.prepare(run.monitor)
        sinks = [_incoming(party.qemu) for party in parties]
        source = self._send(run)

        def failed() -> bool:
            return migration.has_failed(run.monitor.events()[seen:])

        with _failing(Tee(source, sinks)) as tee:
            # before STOP they are read, and after it compared
            stop = run.wait_event(run.monitor, {"STOP"}, self.describe(), after=seen, unless=failed)
            if stop is None:
                words = migration.failure(run.monitor)
                raise StepFailed(self.describe(), f"the guest's QEMU could not send its state: {words}")
            run.blackout_began = time.monotonic()
            for party in parties:  # what they have seen of its RAM by now was seen while it ran
                if party.qemu.copies is not None:
                    party.qemu.copies.refresh()
            refusing = self._refusing(run, parties, seen)
            run.extra[MARK] = tee.mark
        resume = run.wait_event(run.monitor, {"RESUME"}, self.describe(), after=seen)
        assert resume is not None
        self._settle(run)
        seconds = max(0.0, resume.timestamp - stop.timestamp)
        run.extra[PAUSE] = seconds
        run.held.append({"event": "rehearsal", "seconds": seconds})
        run.notes.append(f"the rehearsal with the guest's state paused it for {seconds * 1000:.1f} ms")
        return refusing

    def _send(self, run: Run) -> socket.socket:
        """Have the guest's QEMU begin; our end of the way."""
        assert self.guest.monitor is not None
        if not self.guest.monitor.path:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                run.monitor.execute("migrate", uri=f"tcp:127.0.0.1:{listener.getsockname()[1]}")
                assert run.old is not None
                return stream.connection_of(run.old.pid, listener)
        return stream.our_end(run.monitor, "migrate")

    def _refusing(self, run: Run, parties: list[_Party], seen: int | None = None) -> _Party | None:
        """The first of them that does not take the state."""

        def failed() -> bool:
            return seen is not None and migration.has_failed(run.monitor.events()[seen:])

        for party in parties:
            try:
                event = run.wait_event(
                    party.qemu.monitor, {"MIGRATION"}, self.describe(), migration.ended, after=party.seen, unless=failed
                )
            except MonitorError:
                if party.qemu.process.wait_dead(1.0):
                    return party
                raise
            if event is None:
                words = migration.failure(run.monitor)
                raise StepFailed(self.describe(), f"the guest's QEMU could not send its state: {words}")
            if event.data["status"] != "completed":
                return party
        return None

    def _settle(self, run: Run) -> None:
        """The guest goes on and has its settings back; nothing happens where that is so already."""
        seen = run.extra.get(SENT)
        if seen is None:
            return
        run.blackout_began = None
        if run.monitor.execute("query-migrate").get("status", "none") not in ENDED:
            with contextlib.suppress(TimeoutError):  # our end is closed: it will notice
                run.monitor.wait_event({"MIGRATION"}, migration.ended, timeout=END_SECONDS, after=seen)
        status = resume_old(run.monitor, self.guest.runstate)
        if status != self.guest.runstate:
            raise StepFailed("undo", f"the guest's QEMU is {status} and does not go on", hint="cpr recover tries again")
        migration.restore(run.monitor, dict(self.guest.capabilities), self.guest.parameters)
        run.extra.pop(SENT)

    def undo(self, run: Run) -> None:
        if SENT in run.extra:
            self._settle(run)
            with contextlib.suppress(CommandFailed):
                run.monitor.execute("closefd", fdname=stream.NAME)

    # a guest that is paused ----------------------------------------------------------------------------------

    def _paused(self, run: Run, parties: list[_Party]) -> _Party | None:
        try:
            data = device_state(run.monitor, self.guest.process.pid, self.guest.machine)
        except CommandFailed as error:
            if error.error_class != "CommandNotFound":
                raise
            run.notes.append(f"the state was not rehearsed, only the start: {error.description}")
            return None
        ours, theirs = socket.socketpair()
        with ours, _failing(Tee(theirs, [_incoming(party.qemu) for party in parties])):
            ours.sendall(data)
            return self._refusing(run, parties)


def _incoming(qemu: Started) -> socket.socket:
    """The way of a state into a rehearsing QEMU."""
    return stream.our_end(qemu.monitor, "migrate-incoming")


@contextlib.contextmanager
def _failing(tee: Tee) -> Iterator[Tee]:
    try:
        yield tee
    finally:
        tee.fail()
