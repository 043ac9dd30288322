"""The switch: state and connections go to the new QEMU, and the commit. What follows is `after.py`.

Between STOP and RESUME nothing sleeps, nothing is spawned, nothing is synced; waiting is on events.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpr.engines import stream
from cpr.engines.doors import go_on, open_doors, stop_accepting
from cpr.engines.prepare import same_runstate
from cpr.engines.successor import callers
from cpr.engines.taps import TapGuard
from cpr.errors import CommandFailed, CprError, NewQemuDied, StepFailed
from cpr.linux import fds, proc
from cpr.model import BlockChain, Chardev, Guest, Runstate, Step
from cpr.qemu import block, clients, migration, qmp
from cpr.run import CommitRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cpr.run import Run


CLIENT, MASTER = "client:", "master:"
"""How the names of held clients, and of held masters of ptys, begin in `Run.descriptors`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassVncListeners(Step):
    """Give the new QEMU the VNC listeners (`display-update`, QEMU 7.1): whoever connects from now on stays."""

    vnc: tuple[tuple[str, tuple[str, ...]], ...]

    def describe(self) -> str:
        return f"pass the VNC listener{'s' if len(self.vnc) > 1 else ''} on"

    def do(self, run: Run) -> None:
        self.give(run, run.successor)

    def give(self, run: Run, monitor: qmp.Monitor) -> None:
        for _, names in self.vnc:
            give_vnc(monitor, {name.replace(":", "-"): run.descriptors[name] for name in names})


def give_vnc(monitor: qmp.Monitor, listeners: Mapping[str, fds.Fd]) -> None:
    """Have a QEMU's VNC server listen on these and no others; the names are for the way only."""
    for name, listener in listeners.items():
        monitor.send_fd(name, listener.number)
    monitor.execute("display-update", type="vnc", addresses=[{"type": "fd", "str": name} for name in listeners])


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareStream(Step):
    """Connect the two for the state: capabilities and parameters on both, and the way of the stream."""

    guest: Guest

    def describe(self) -> str:
        return f"set {', '.join(migration.SWITCHED_ON)} on both and connect them"

    def do(self, run: Run) -> None:
        for monitor in (run.monitor, run.successor):
            migration.prepare(monitor)
        stream.prepare(run, self.guest)

    def undo(self, run: Run) -> None:
        run.kill_new()
        migration.restore(run.monitor, dict(self.guest.capabilities), self.guest.parameters)
        stream.undo(run)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareChains(Step):
    """Device -> node -> file, once more: a snapshot taken since the check would make two QEMUs write one image."""

    guest: Guest
    old: bool = True
    new: bool
    """What the new QEMU opened."""

    def describe(self) -> str:
        if not self.new:
            return "compare device -> node -> file once more"
        return f"compare device -> node -> file of plan{', old' if self.old else ''} and new QEMU"

    def do(self, run: Run) -> None:
        if self.old:
            reply = run.extra.pop("chains", None)
            if reply is None:
                reply = run.monitor.execute("query-block")
            self._compare(reply, "the guest has now")
        if self.new:
            self._compare(run.successor.execute("query-block"), "the new QEMU would use")
        if self.old and self.new:
            busy = run.monitor.execute("query-block-jobs")
            if busy:
                names = ", ".join(str(job.get("device", "?")) for job in busy)
                raise StepFailed(self.describe(), f"a block job began meanwhile: {names}", hint="wait for its end")

    def _compare(self, reply: Any, whose: str) -> None:
        now = {_key(c): c for c in block.parse_chains(reply)}
        planned = {_key(c): c for c in self.guest.chains}
        for name in sorted(now.keys() | planned.keys()):
            was, is_now = planned.get(name), now.get(name)
            if _files(was) != _files(is_now):
                raise StepFailed(
                    self.describe(),
                    f"{name}: planned {_chain(was)}, {whose} {_chain(is_now)}",
                    hint="cpr check shows what to do about it",
                )


def _key(chain: BlockChain) -> str:
    """The drive's name where it has one: QOM paths of unnamed devices are counted differently by each version."""
    return chain.drive or chain.device


def _files(chain: BlockChain | None) -> tuple[str, ...] | None:
    return None if chain is None else chain.files


def _chain(chain: BlockChain | None) -> str:
    return "nothing" if chain is None else " <- ".join(chain.files) or "no medium"


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveState(Step):
    """`migrate`, without `stop`: the setup happens while the guest runs, QEMU stops it at the last moment.

    Only a guest with several queues on a tap is stopped first (taps.py).

    Where the state is complete the old QEMU is stopped (crossing.py; SIGSTOP): it reads nothing more of what clients
    say, accepts nobody, does no command of another monitor's client, and cannot run the guest, whatever it makes of
    the migration. So its block chains are asked for in the last moment before; what is opened after that is seen when
    the clients are moved.

    Allowed because every RAM block is proven to be skipped (check `ram-not-skipped`): one that is not would write stale
    pages over live ones.
    """

    guest: Guest

    def describe(self) -> str:
        return "move the device state; QEMU stops the guest for it"

    def do(self, run: Run) -> None:
        same_runstate(run, self.guest, self.describe())
        seen_old, seen_new = run.monitor.event_count, run.successor.event_count
        run.extra["seen_old"] = seen_old
        run.extra["chains"] = run.monitor.execute("query-block")
        run.blackout_began = time.monotonic()
        guard: TapGuard | None = run.extra.get("taps")
        if guard is not None and guard.several:
            if self.guest.running:
                run.monitor.execute("stop")
            guard.hand_over()
        sending = stream.begin(run, self.guest, seen_old)

        def failed() -> bool:
            return sending.failed or migration.has_failed(run.monitor.events()[seen_old:])

        if self.guest.running:
            stop = run.wait_event(run.monitor, {"STOP"}, self.describe(), after=seen_old, unless=failed)
            run.stop_time = stop.timestamp if stop is not None else None
        if sending.failed:
            sending.result()
        self._await(run, seen_new, failed)
        assert run.old is not None
        if not stream.complete(run):
            stop_accepting(run.old)
            self._unguarded(run)
        if guard is not None:
            guard.stop()
        if any(event.name == "RESUME" for event in run.successor.events()[seen_new:]):
            raise StepFailed(self.describe(), "the new QEMU ran before it was told to")

    def _unguarded(self, run: Run) -> None:
        """The old QEMU could read on after it had saved its state."""
        if labels := [label for label, _ in clients_held(run)]:
            run.notes.append(f"what was said to {', '.join(labels)} within the pause may be lost")

    def _await(self, run: Run, after: int, failed: Callable[[], bool]) -> None:
        """Until the new QEMU has all of it."""
        step = self.describe()
        event = run.wait_event(run.successor, {"MIGRATION"}, step, migration.ended, after=after, unless=failed)
        if event is None or event.data["status"] != "completed":
            assert run.new is not None
            run.new.wait_dead(1.0)
            words = run.words() or (migration.failure(run.successor) if run.new.alive() else "")
            if not words and not stream.complete(run):
                words = migration.failure(run.monitor)
            raise NewQemuDied(self.describe(), "did not take the state", words)

    def undo(self, run: Run) -> None:
        run.kill_new()
        stream.hang_up(run)
        if run.old is not None:
            go_on(run.old)
        stream.go_on_after_save(run, self.guest)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassClients(Step):
    """Send the connected chardev clients ahead as descriptors; the new QEMU does not use them yet."""

    guest: Guest

    def describe(self) -> str:
        labels = [c.label for c in movable(self.guest.chardevs)]
        return f"send the connected clients ahead: {', '.join(labels) or 'none so far'}"

    def do(self, run: Run) -> None:
        assert run.old is not None
        targets = clients.descriptor_targets(run.old.pid)
        run.extra["sockets"] = clients.sockets_among(targets)
        run.extra["files"] = clients.files_among(targets)
        run.extra["sent"] = _send_clients(run, self.guest)
        make_room(run, self.describe())

    def undo(self, run: Run) -> None:
        take_room_back(run)


def make_room(run: Run, step: str) -> None:
    """See that the old QEMU can write all it has for a held client that does not read.

    A byte that waits in the old QEMU's device would wait for ever in the new one: it looks for a client when it loads
    the state, and the client comes after that (hw/char/serial.c, serial_post_load).

    Raises:
        StepFailed: a client has no room, and cannot be given any.
    """
    for label, client in clients_held(run):
        with clients.socket_of(client) as sock:
            if not clients.widen(sock):
                raise StepFailed(
                    step,
                    f"the client of {label} does not read, and what waits for it would be stuck",
                    hint="let it read, or end it",
                )


def take_room_back(run: Run) -> None:
    """Undo `make_room`; what is in the sockets stays."""
    for _, fd in clients_held(run):
        with clients.socket_of(fd) as sock:
            clients.narrow(sock)


def clients_held(run: Run) -> list[tuple[str, fds.Fd]]:
    """Label and descriptor of the clients that were sent ahead."""
    return held(run, CLIENT)


def held(run: Run, kind: str) -> list[tuple[str, fds.Fd]]:
    """Label and descriptor of what is held of a kind (CLIENT, MASTER)."""
    return [(name.removeprefix(kind), fd) for name, fd in run.descriptors.items() if name.startswith(kind)]


def hold(run: Run, kind: str, numbers: Mapping[str, int]) -> None:
    """Duplicate descriptors of the old QEMU, by label, in place of those of the kind that were held. OSError."""
    assert run.old is not None
    for label, _ in held(run, kind):
        run.descriptors.pop(kind + label).close()
    for label, number in numbers.items():
        run.descriptors[kind + label] = fds.take_fd(run.old.pidfd, number)


def reconnect(run: Run, monitor: qmp.Monitor, held: Mapping[str, fds.Fd]) -> None:
    """Clients go on in the old program, by chardev; one whose place somebody has taken is told of."""
    for label, fd in held.items():
        try:
            monitor.send_fd("cpr-client", fd.number)
            monitor.execute("add_client", protocol=label, fdname="cpr-client")
        except CommandFailed as error:
            run.notes.append(f"{label}: its client lost its place on the way back ({error.description})")


def _send_clients(run: Run, guest: Guest) -> dict[str, int]:
    """Pass every client that is connected now to the new QEMU; {label: inode of its socket}."""
    assert run.old is not None
    servers = [c for c in guest.chardevs if f"listener:{c.label}" in run.descriptors and not c.monitor]
    listeners = {c.label: run.descriptors[f"listener:{c.label}"] for c in servers}
    connected = movable(clients.connected_now(run.old.pid, tuple(servers), listeners)) if servers else ()
    sent = {}
    for chardev in (*connected, *still_calling(run, guest)):
        assert chardev.client is not None
        client = fds.take_fd(run.old.pidfd, chardev.client)
        if (before := run.descriptors.pop(CLIENT + chardev.label, None)) is not None:
            before.close()
        run.descriptors[CLIENT + chardev.label] = client
        sent[chardev.label] = os.fstat(client.number).st_ino
        run.successor.send_fd(_client_name(chardev.label), client.number)
    return sent


def still_calling(run: Run, guest: Guest) -> list[Chardev]:
    """Chardevs whose connection QEMU has made and still has."""
    assert run.old is not None
    there = clients.sockets_among(clients.descriptor_targets(run.old.pid))
    inodes = {c.label: os.fstat(run.descriptors[f"connection:{c.label}"].number).st_ino for c in callers(guest)}
    return [c for c in callers(guest) if there.get(inodes[c.label]) == c.client]


def _client_name(label: str) -> str:
    return f"cpr-client-{label}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveClients(Step):
    """Give every connected chardev client to the new QEMU (`add_client` with the chardev's label).

    Not earlier: the new QEMU would swallow their input. If somebody came or went since they were sent ahead, who is
    there now is looked up again; the old QEMU stands still, so that nobody can come to it after that.
    """

    guest: Guest

    def describe(self) -> str:
        return "move the connected clients"

    def do(self, run: Run) -> None:
        assert run.old is not None
        targets = clients.descriptor_targets(run.old.pid)
        if opened := clients.files_among(targets) - run.extra["files"]:
            # a snapshot that was taken after the chains were compared: the new QEMU would write into its base
            raise StepFailed(self.describe(), f"the old QEMU has opened {', '.join(sorted(opened))}", hint="try again")
        sent: dict[str, int] = run.extra["sent"]
        now = clients.sockets_among(targets).keys()
        if now - run.extra["sockets"].keys() or not now >= set(sent.values()):
            sent = _send_clients(run, self.guest)
        open_doors(run, sent)
        asked = {
            label: run.successor.submit("add_client", protocol=label, fdname=_client_name(label)) for label in sent
        }
        for label, pending in asked.items():
            try:
                pending.result()
            except CommandFailed as error:
                raise StepFailed(
                    self.describe(),
                    f"{label}: the new QEMU does not take its client ({error.description})",
                    hint="a second client was waiting for it and came first; end that one and try again",
                ) from None


def movable(chardevs: tuple[Chardev, ...]) -> tuple[Chardev, ...]:
    """Chardevs whose client can be moved: servers, no monitors (a negotiated session would be greeted anew)."""
    return tuple(c for c in chardevs if c.server and not c.monitor and c.client is not None and c.plain and c.in_argv)


@dataclass(frozen=True, slots=True, kw_only=True)
class Continue(Step):
    """The commit: `cont` to the new QEMU."""

    def describe(self) -> str:
        return "the new QEMU runs the guest (commit)"

    def do(self, run: Run) -> None:
        _still_there(run)
        seen = run.successor.event_count
        try:
            run.successor.execute("cont")
        except CommandFailed as error:
            status = run.successor.execute("query-status")["status"]
            ran = any(e.name == "RESUME" for e in run.successor.events()[seen:])
            if status != Runstate.RUNNING and not ran:
                raise CommitRefused(f"the new QEMU refuses to run: {error.description}") from None
            raise
        with contextlib.suppress(TimeoutError, CprError):
            run.resume_time = run.successor.wait_event({"RESUME"}, timeout=2.0, after=seen).timestamp
        report_blackout(run)


def report_blackout(run: Run) -> None:
    if run.stop_time is not None and run.resume_time is not None:
        run.held.append({"event": "blackout", "seconds": max(0.0, run.resume_time - run.stop_time)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Decide(Step):
    """The commit of a paused guest: nothing is sent; the old QEMU will be ended."""

    def describe(self) -> str:
        return "decide for the new QEMU; the guest stays paused (commit)"

    def do(self, run: Run) -> None:
        _still_there(run)


def _still_there(run: Run) -> None:
    """A new QEMU that died or was stopped before it was told anything has run nothing: the way back is open."""
    assert run.new is not None
    if not run.new.alive():
        raise CommitRefused("the new QEMU ended before it was told to run")
    with contextlib.suppress(ProcessLookupError):
        if proc.is_stopped(run.new.pid):
            raise CommitRefused("the new QEMU was stopped (SIGSTOP, or a debugger) before it was told to run")
