"""The new QEMU is in the old one's process: it takes state and connections, and what is left over is closed."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpr.engines import fdmap, ptys, stream
from cpr.engines.doors import drop
from cpr.engines.inplace import in_place
from cpr.engines.leftover import end_helpers
from cpr.engines.prepare import same_ram
from cpr.engines.successor import SILENT, waiting_chardevs
from cpr.engines.switch import CLIENT
from cpr.errors import StepFailed
from cpr.linux.tracee import Call
from cpr.linux.tracer import Batch, Detach
from cpr.model import Guest, Step
from cpr.qemu import clients

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from cpr.engines.inplace import InPlace
    from cpr.engines.successor import Inherited
    from cpr.linux.process import Process
    from cpr.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadState(Step):
    """The new QEMU takes the state that the old one left. Its `undo` is that of `ExecNew`."""

    guest: Guest

    def describe(self) -> str:
        return "load the device state into the new QEMU"

    def do(self, run: Run) -> None:
        kept = in_place(run)
        same_ram(self.guest, kept.ram, self.guest.process.pid, self.describe())  # while it loads
        stream.finish_load(run, run.successor, self.describe())
        if any(event.name == "RESUME" for event in run.successor.events()):
            raise StepFailed(self.describe(), "the new QEMU ran before it was told to")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepClients(Step):
    """Put each client that was connected in the place of ours (dup3 in the process): it never notices. Ptys likewise,
    and connections that QEMU has made.

    Not before the state is loaded: the new QEMU would swallow their input.
    """

    guest: Guest
    silent: tuple[Inherited, ...]
    """What stands in for connections that QEMU has made."""

    def describe(self) -> str:
        return "give the connected clients their places again"

    def do(self, run: Run) -> None:
        kept = in_place(run)
        if not kept.clients and not kept.ptys:
            return
        assert run.new is not None
        moves = (*self._places(run, kept), *self._ptys(run, kept))
        silent: dict[str, socket.socket] = run.extra.get("doors", {})
        among = {**kept.standing_in, **silent}
        ours = {label: among[label] for label in kept.clients}
        try:
            _move(run.new, kept, moves, lambda: self._hand_on(run, ours))
        except OSError as error:
            raise StepFailed(self.describe(), f"{error.strerror or error}") from None
        run.successor.execute("query-status")  # it goes on, or there is still a way back
        for label in ours:
            (silent if label in silent else kept.standing_in).pop(label).close()

    def _hand_on(self, run: Run, ours: Mapping[str, socket.socket]) -> None:
        """What waited in a device for room in a client's socket, the new QEMU wrote to ours as soon as it had loaded
        (hw/char/serial.c, serial_post_load): its first words are the client's. One that has hung up gets none.

        Raises:
            StepFailed: there is no room for them. They are in the state, too: the way back has them.
        """
        for label, sock in ours.items():
            with clients.socket_of(run.descriptors[CLIENT + label]) as client, contextlib.suppress(ConnectionError):
                while words := _waiting(sock):
                    there = clients.widen(client, patience=0.0, room=clients.MORE_ROOM)
                    if not there or client.send(words, socket.MSG_DONTWAIT) < len(words):
                        raise StepFailed(self.describe(), f"the client of {label} does not read what waits for it")

    def _places(self, run: Run, kept: InPlace) -> Iterator[tuple[int, int]]:
        """(number of a client, where it has its place)."""
        wanted = tuple(c for c in waiting_chardevs(self.guest) if c.label in kept.clients)
        listeners = {c.label: run.descriptors[f"listener:{c.label}"] for c in wanted}
        besides = set(kept.clients.values())
        for chardev in clients.connected_now(self.guest.process.pid, wanted, listeners, besides=besides):
            if chardev.client is None:
                raise StepFailed(self.describe(), f"{chardev.label}: the new QEMU has not accepted our client")
            yield kept.clients[chardev.label], chardev.client
        for entry in self.silent:
            if (kept_as := kept.clients.get(entry.name.removeprefix(SILENT))) is not None:
                assert entry.target is not None
                yield kept_as, entry.target

    def _ptys(self, run: Run, kept: InPlace) -> Iterator[tuple[int, int]]:
        """The masters in the places of those that the new QEMU has made."""
        if kept.ptys:
            assert run.new is not None
            made = ptys.places(run.new, run.successor, kept.ptys)
            for label, number in kept.ptys.items():
                yield number, made[label]


def _waiting(sock: socket.socket) -> bytes:
    """What can be read at once."""
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        return sock.recv(65536)
    return b""


def _move(process: Process, kept: InPlace, moves: Sequence[tuple[int, int]], before: Callable[[], None]) -> None:
    """Put descriptors into their places, after `before`, while nobody runs. A tracer that is killed may have moved
    some: another one moves the rest.

    Raises:
        ConnectionError: that was killed, too. What a tracer raises.
    """
    for last in (False, True):
        kept.attach(process)
        try:
            before()
        except BaseException:
            kept.let_go()
            raise
        there = set(fdmap.verify(process.pid, kept.map).good.values())
        calls = [call for number, place in moves if number in there for call in ptys.put(number, place)]
        try:
            kept.tracer.run(Batch(tuple(calls)), Detach())
        except ConnectionError:
            if last:
                raise
        else:
            return


@dataclass(frozen=True, slots=True, kw_only=True)
class LetClientsIn(Step):
    """After the commit: ours hang up, so that the next ones are accepted, and what is left over goes.

    That is descriptors which were needed once, and helpers of async teardown: they hold the old program's memory.
    """

    guest: Guest

    def describe(self) -> str:
        return "let clients in again, and close what is left over"

    def do(self, run: Run) -> None:
        kept = in_place(run)
        assert run.new is not None
        if kept.old_memory is not None:
            kept.old_memory.release()
        for sock in kept.standing_in.values():
            sock.close()
        kept.standing_in.clear()
        drop(run)
        reap = end_helpers(self.guest.teardown_helpers, self.guest.process.pid)
        try:
            kept.attach(run.new)
            there = set(fdmap.verify(self.guest.process.pid, kept.left).good.values())  # QEMU closes some itself
            kept.tracer.run(Batch((*(Call("close", (number,)) for number in there), *reap)), Detach())
        except OSError as error:
            raise StepFailed(self.describe(), f"{error.strerror or error}") from None
        finally:
            with contextlib.suppress(OSError):
                kept.tracer.close()
