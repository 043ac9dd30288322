"""Borrowing a QMP monitor that somebody else holds: we come in between, and they notice nothing.

    relay = Relay.borrow(process, tracer, number, until=...)
    relay.monitor.execute("query-status")       # ours, among the client's own commands
    relay.quiesce(1.0)                          # QEMU holds no part of any command: it may be replaced
    relay.reconnect(sock)                       # a connection to the new one, for relay.monitor and the client
    relay.give_back(tracer, accepted)

The client's connection is kept in QEMU as well, as `relay.kept`, close-on-exec: whoever replaces QEMU's program clears
FD_CLOEXEC of it, and starts a new tracer. If we die, QEMU takes that for its client's end and listens again, the client
waits, and `mend.repair` gives it its session back. Those of its commands that we had passed on are not answered then.

What cannot be known is whether QEMU's parser holds the beginning of a command when we come in: it reads at once what
there is, and keeps it to itself. So we come in when nothing waits to be read, or what waits begins a command, or ends
one and another one follows (that end is passed on at once). Where nothing waited we then send nothing of our own until
the client has begun a command or `settle` seconds have passed. If it goes on in the middle of one, it gets its
connection back at once, unharmed, and it is tried again. A client that pauses for longer than that within a command (a
person who types one over several lines) is not recognized: its command and our first one become one, which is an error
to QEMU. Nor are descriptors that it sent before we came for a command that comes after: QEMU keeps only those that it
was sent last, so that some of ours would take their place.

Plain sockets only: not telnet, TLS or websockets, and no multiplexed chardev.

Out of scope: human monitors (typed.py), and when to do what.
"""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from cpr.engines import graft
from cpr.engines.entrance import Entrance
from cpr.engines.mend import open_session
from cpr.engines.pump import Pump
from cpr.errors import MonitorError
from cpr.linux import streams
from cpr.qemu import clients, qmp

if TYPE_CHECKING:
    from collections.abc import Collection

    from cpr.engines.graft import Kept, Stopped, Swapped
    from cpr.linux.process import Process
    from cpr.linux.tracer import Tracer
    from cpr.qemu.qmp import Monitor

HIDDEN = frozenset({"STOP", "RESUME", "MIGRATION", "MIGRATION_PASS"})
"""What an update makes QEMU say. Of STOP and RESUME both are hidden or both shown: managers go by them."""
HIDDEN_WHILE_LOADING = HIDDEN | {"VSERPORT_CHANGE"}
SHOWN = frozenset({"STOP", "RESUME"})
"""What may be shown of it."""

SETTLE_SECONDS = 0.05
ANSWER_SECONDS = 5.0
_FENCE = "query-version"
"""Commands are answered in their order, so that when this one is, all before it are."""


class Relay:
    """We between a client and QEMU, since `borrow`. Used by one thread at a time."""

    def __init__(self, process: Process, name: str, number: int, swapped: Swapped, hide: Collection[str]) -> None:
        self.name = name
        self.number = number
        """The accepted descriptor in QEMU that is the client's."""
        self.kept: Kept = swapped.kept
        self.stopped: list[Stopped] = [swapped.stopped]
        """QEMU's stops: for coming in, the last one of them successful, and for giving back."""
        self.oob = False
        """The client negotiated out-of-band execution."""
        self.backed_out = 0
        """How often we came in and found a command begun."""
        self._process = process
        self._client = swapped.client
        self._ours = swapped.ours
        self._asked = False
        """Something of ours was sent to QEMU."""
        self._pump = Pump(swapped.client, swapped.ours, hide=hide)
        self._monitor: Monitor | None = None
        self._attend: qmp.Attend = None
        self._closed = False

    @classmethod
    def borrow(
        cls,
        process: Process,
        tracer: Tracer,
        number: int,
        *,
        name: str = "monitor",
        hide: Collection[str] = HIDDEN,
        until: float,
        settle: float = SETTLE_SECONDS,
        attend: qmp.Attend = None,
    ) -> Self:
        """Come in between QEMU and the client of its accepted descriptor `number`, whose session is negotiated.

        `attend` is that of `monitor` (qmp.negotiate).

        Raises:
            TimeoutError: it was never between two commands by `until` (time.monotonic). MonitorError: QEMU does not
            answer, or the session is not negotiated. StepFailed: the client hung up. ConnectionError: the tracer died.
            OSError. In all cases the client has its connection back.
        """
        stops: list[Stopped] = []
        while True:
            entrance = Entrance()
            swapped = graft.swap_in(process, tracer, number, entrance.is_open, until, entrance.pass_rest)
            stops.append(swapped.stopped)
            relay = cls(process, name, number, swapped, hide)
            relay.stopped, relay.backed_out, relay._attend = stops, len(stops) - 1, attend
            try:
                relay._pump.start()
                if relay._settle(settle, until):
                    relay._open(until)
                    return relay
                relay._back_out(tracer, until)
            except BaseException:
                with contextlib.suppress(Exception):
                    relay._back_out(tracer, time.monotonic() + ANSWER_SECONDS)
                raise
            if time.monotonic() > until:
                raise TimeoutError(f"{name}: its client was never between two commands in {len(stops)} tries")

    def _settle(self, seconds: float, until: float) -> bool:
        """Whether the client has begun a command, or is silent. Only what QEMU says is passed on meanwhile."""
        pump = self._pump
        with pump.changed:
            pump.wait(lambda: pump.cut or pump.client_gone or not pump.unsure, time.monotonic() + seconds)
            pump.unsure = pump.cut
            if pump.cut:
                return False
        while self._rest_unread() and time.monotonic() < until:
            time.sleep(0.001)
        if self._rest_unread():
            raise MonitorError(self.name, "QEMU has stopped to read in the middle of a command")
        return True

    def _rest_unread(self) -> bool:
        """QEMU has not read all of what it had begun to read when we came in."""
        return not self._asked and streams.unsent(self._ours) > 0

    def _open(self, until: float) -> None:
        """The first words of ours; then the client's go on."""
        until = max(until, time.monotonic() + 1.0)
        version = self._ask(_FENCE, until)
        if "return" not in version:
            raise MonitorError(self.name, "its client has not negotiated")
        self.oob = "does not support OOB" in str(self._ask(_FENCE, until, "exec-oob"))
        with self._pump.changed:
            self._pump.greeting = {"QMP": {"version": version["return"], "capabilities": []}}
        self._connect_own()
        self.release()

    def _connect_own(self) -> None:
        self._monitor = qmp.negotiate(self.channel(), self.name, attend=self._attend)

    def channel(self) -> socket.socket:
        """A connection on which QEMU seems to greet: for who is to have the session in place of `monitor`, which is
        hung up."""
        with self._pump.changed:
            sock = self._pump.connect_own()
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        return sock

    def _ask(self, command: str, until: float, key: str = "execute") -> dict[str, Any]:
        pump = self._pump
        self._asked = True
        with pump.changed:
            asked = pump.ask(command, key)
            pump.wait(lambda: pump.reply(asked), until)
            reply = pump.reply(asked)
        if reply is None:
            raise MonitorError(self.name, f"no answer to {command}") from pump.error
        return reply

    # while it is borrowed --------------------------------------------------------------------------------------

    @property
    def monitor(self) -> Monitor:
        """Our own session with QEMU, beside the client's; it sees every event."""
        assert self._monitor is not None
        return self._monitor

    @property
    def passed(self) -> int:
        """Commands of the client that were passed on."""
        return self._pump.passed

    @property
    def answered(self) -> int:
        """Replies that the client was given."""
        return self._pump.answered

    @property
    def begun(self) -> bool:
        """A part of a client's command is here, as it was too long to wait for its end in the kernel's queue."""
        return self._pump.begun

    @property
    def client_gone(self) -> bool:
        """The client hung up. QEMU does not know yet, and will be told by `give_back`."""
        return self._pump.client_gone

    @property
    def undelivered(self) -> int:
        """Bytes for the client that it has no room for, as it does not read."""
        return self._pump.undelivered

    def hidden(self) -> dict[str, int]:
        """How many events of which name were not passed on."""
        with self._pump.changed:
            return dict(self._pump.hidden)

    @property
    def hiding(self) -> frozenset[str]:
        """The events that the client does not see."""
        return self._pump.hide

    def hide(self, names: Collection[str]) -> None:
        """From now on the client does not see these events."""
        with self._pump.changed:
            self._pump.hide = frozenset(names)

    def tell(self, message: dict[str, Any]) -> None:
        """Have the client hear of an event that QEMU did not say on its session."""
        with self._pump.changed:
            self._pump.tell_client(message)

    def quiesce(self, timeout: float) -> bool:
        """Hold the client's further commands back until `release`, and wait until it has the replies to all others.

        True: QEMU holds no part of any command of its. False: not within `timeout` seconds; nothing is held back.
        """
        pump, until = self._pump, time.monotonic() + timeout
        with pump.changed:
            pump.held = True
            quiet = pump.wait(lambda: not pump.begun and not pump.unsent, until)
        try:
            if quiet:
                self._ask(_FENCE, until)
                return True
        except MonitorError:
            pass
        self.release()
        return False

    def release(self) -> None:
        """Pass the client's commands on again."""
        with self._pump.changed:
            self._pump.held = False
            self._pump.wake()

    def reconnect(self, sock: socket.socket, timeout: float = qmp.GREETING_SECONDS) -> None:
        """QEMU is another one now: `sock` is a fresh connection to it, of ours from here on. The session is negotiated
        as the client's was; `monitor` is a new one. The client's commands are held until `release`.

        Raises:
            MonitorError: it does not greet. OSError.
        """
        try:
            greeting = open_session(sock, self.name, oob=self.oob, timeout=timeout)
        except BaseException:
            sock.close()
            raise
        with self._pump.changed:
            self._pump.held = True
            self._pump.go_on_with(sock)
            self._pump.greeting = {"QMP": {**greeting["QMP"], "capabilities": []}}
        self._connect_own()

    @property
    def client_number(self) -> int:
        """Descriptor of ours that is the client's connection."""
        return self._client.fileno()

    def move(self, process: Process, number: int) -> None:
        """QEMU is another process now, which has the client's connection as `number`. Call `reconnect` then."""
        self._process = process
        self.kept = replace(self.kept, number=number)

    # the end ---------------------------------------------------------------------------------------------------

    def give_back(self, tracer: Tracer, number: int | None = None, *, timeout: float = ANSWER_SECONDS) -> None:
        """Have the client's connection take the place of the accepted descriptor `number` of QEMU (of the one that it
        was, if not given), when the client has everything that was said to it. Then the relay is of no use any more.

        Where QEMU was replaced and `reconnect` not called, `number` is a negotiated session of the caller's that is at
        rest: whatever QEMU says there is lost to the client.

        Raises:
            TimeoutError: not within `timeout` seconds: the client does not read, or QEMU does not answer. The relay is
            in place as before. ConnectionError: no tracer lives. StepFailed: no such descriptor. OSError.
        """
        until = time.monotonic() + timeout
        if not self.quiesce(timeout) and not self._pump.qemu_gone:
            raise TimeoutError(f"{self.name}: not everything was answered within {timeout:g} s")
        widened = self._deliver(until)
        try:
            self._put_back(tracer, self.number if number is None else number, until)
        except BaseException:
            self.release()
            raise
        finally:
            if widened:
                clients.narrow(self._client)
        self.close()

    def _deliver(self, until: float) -> bool:
        """Wait until the client has what is for it, with more room for it if need be. Whether there is more room."""
        pump = self._pump
        widened = False
        with pump.changed:
            if not pump.delivered:
                widened = clients.widen(self._client)
                pump.wait(lambda: pump.delivered, until, of_qemu=False)
            if not pump.delivered:
                if not pump.qemu_gone:
                    pump.held = False
                if widened:
                    clients.narrow(self._client)
                raise TimeoutError(f"{self.name}: its client does not read; {pump.undelivered} bytes wait for it")
        return widened

    def _put_back(self, tracer: Tracer, number: int, until: float) -> None:
        pump = self._pump

        def at_rest() -> bool:
            pump.drain()
            return pump.delivered and (pump.at_rest or pump.qemu_gone)

        with pump.changed:
            self.stopped.append(graft.surely_put_back(self._process, tracer, self.kept, number, at_rest, until))

    def _back_out(self, tracer: Tracer, until: float) -> None:
        """Give back what we came into in the wrong moment. Nothing that QEMU has read may be of ours."""
        pump = self._pump

        def as_found() -> bool:
            pump.drain()
            pump.hand_over()
            return pump.delivered and not self._rest_unread()

        with pump.changed:
            graft.surely_put_back(self._process, tracer, self.kept, self.number, as_found, until)
        self.close()

    def close(self) -> None:
        """Let go. Where the client has not got its connection back, QEMU sees it hang up."""
        if self._closed:
            return
        self._closed = True
        self._pump.close()
        self._client.close()
        if self._monitor is not None:
            self._monitor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
