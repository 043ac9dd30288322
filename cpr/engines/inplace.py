"""What is prepared while the guest runs for replacing QEMU in its own process, and the saving of its state.

The guest's RAM, state and connections are held twice from the moment it stands still: by descriptors of its process
that survive the exec, and by duplicates of them that are ours. Until the exec (`execute.py`) the way back is to go on;
after it, the old program is started again from what we hold (`wayback.py`).
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cpr.engines import dress, fdmap, leftover, stream
from cpr.engines.crossing import narrow
from cpr.engines.prepare import note_settings, same_runstate, shared_files, words_of
from cpr.engines.successor import waiting_chardevs
from cpr.engines.switch import CLIENT, hold, make_room, reconnect, still_calling, take_room_back
from cpr.errors import CommandFailed, StepFailed
from cpr.linux import fds, likeness, terminal
from cpr.linux.address_space import AddressSpace
from cpr.linux.tracer import Attach, Tracer
from cpr.model import Guest, Step
from cpr.qemu import clients, migration

if TYPE_CHECKING:
    from cpr.engines.successor import Successor
    from cpr.linux.process import Process
    from cpr.run import Run

STATE = "cpr-state"


@dataclass(slots=True)
class InPlace:
    """What a run that replaces QEMU in place has in hand."""

    tracer: Tracer
    like: likeness.Likeness
    places: likeness.Places
    binary: fds.Fd
    """The old program, whatever becomes of its file."""
    state: fds.Fd
    """Memory file with the device state; the guest's process has it under `given[STATE]`."""
    ram: set[tuple[tuple[int, int], int]]
    files: set[str] = field(default_factory=set)
    """What the process has open, all that it was given included."""
    given: dict[str, int] = field(default_factory=dict)
    """Numbers in the guest's process of what it was given over its monitor."""
    clients: dict[str, int] = field(default_factory=dict)
    """Numbers in the guest's process of the clients that are kept, by chardev."""
    came: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Number and inode of those of the clients that came when QEMU accepted nobody any more."""
    ptys: dict[str, int] = field(default_factory=dict)
    """Numbers in the guest's process of the masters of its ptys, by chardev."""
    loose: tuple[int, ...] = ()
    """Numbers in the guest's process that would survive an exec by themselves."""
    standing_in: dict[str, socket.socket] = field(default_factory=dict)
    """Our end of the clients that the new QEMU starts with, by chardev."""
    map: fdmap.FdMap = field(default_factory=fdmap.FdMap)
    """What survives the exec in the guest's process."""
    changed: tuple[int, ...] = ()
    """Numbers without FD_CLOEXEC that had it."""
    console: terminal.Console | None = None
    """The terminal of a `stdio` chardev."""
    thread: int = 0
    """That which makes our system calls, when it is stopped."""
    executed: bool = False
    """It is the new program, or not to be known for the old one."""
    old_memory: AddressSpace | None = None
    """Held, so that the exec does not wait until all of it is unmapped; None where that cannot be had."""

    def attach(self, process: Process) -> None:
        """Stop all threads of the new program; by another tracer, if that which executed it was killed. Raises what
        the tracer raises.
        """
        try:
            self.tracer.run(Attach())
        except ConnectionError:
            self.tracer.close()
            self.tracer = Tracer.start(process)
            self.tracer.run(Attach())

    def let_go(self) -> None:
        """End the tracer, and have everything undone that it stopped."""
        self.tracer.close()

    @property
    def left(self) -> fdmap.FdMap:
        """What the new QEMU needs once, and not any more when clients are let in: the state; RAM, of which it opens
        /proc/self/fd/N again; VNC listeners, which come by monitor."""
        kinds = (fdmap.STATE, "ram:", "vnc:")
        return fdmap.FdMap(entries={n: e for n, e in self.map.entries.items() if n.startswith(kinds)})


def in_place(run: Run) -> InPlace:
    value: InPlace = run.extra["in_place"]
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareExec(Step):
    """All that takes time and can be done while the guest runs: what it is to be given, the tracer, the settings."""

    guest: Guest
    successor: Successor

    def describe(self) -> str:
        return f"hold state and program of pid {self.guest.process.pid} ready, and a tracer"

    def do(self, run: Run) -> None:
        assert run.old is not None
        pid = self.guest.process.pid
        run.extra["touched"] = True
        run.words = words_of(run.descriptors.get("stdio:2"))
        like = likeness.likeness_of(pid)
        new = self.successor
        note_settings(run, self.guest, new)
        kept = run.extra["in_place"] = InPlace(
            tracer=Tracer.start(run.old),
            like=like,
            places=likeness.Places(like),
            binary=fds.Fd(os.open(f"/proc/{pid}/exe", os.O_RDONLY | os.O_CLOEXEC)),
            state=fds.Fd(os.memfd_create(STATE, os.MFD_CLOEXEC)),
            ram=shared_files(pid),
        )
        run.closing.callback(kept.let_go)
        run.closing.callback(kept.places.close)
        self._hold_memory(run, kept)
        kept.console = self._console(run)
        names = [STATE, *(e.name for e in new.inherited if e.source is None)]
        run.journal.fact("given", names=[_label(name) for name in (*names, new.control)])
        self._give(run, kept, STATE, kept.state.number)
        for entry in new.inherited:
            if entry.source is None:
                self._give(run, kept, entry.name, run.descriptors[entry.name].number)
        if new.control_number is not None:
            ours, theirs = socket.socketpair()
            run.extra["control"] = ours
            with theirs:
                self._give(run, kept, new.control, theirs.fileno())
        run.notes += new.notes

    def _hold_memory(self, run: Run, kept: InPlace) -> None:
        try:
            kept.old_memory = AddressSpace.hold(self.guest.process.pid)
        except OSError as error:
            run.notes.append(f"the pause is longer, as the old memory is unmapped in it ({error.strerror or error})")
        else:
            run.closing.callback(kept.old_memory.close)

    def _console(self, run: Run) -> terminal.Console | None:
        """The terminal that the new QEMU shall find as the old one found it, and leave so when it ends."""
        stdin = run.descriptors.get("stdio:0")
        if stdin is None or all(c.backend != "stdio" for c in self.guest.chardevs):
            return None
        with contextlib.suppress(OSError):
            if not os.isatty(stdin.number):
                return None
            if (found := terminal.console(self.guest.process.pid, stdin.number)) is not None:
                return found
        run.notes.append("which modes the terminal had is not known: it stays raw when the guest ends (stty sane)")
        return None

    def _give(self, run: Run, kept: InPlace, name: str, number: int) -> None:
        """Send a descriptor, and find out under which number the process has it."""
        assert run.old is not None
        pid = run.old.pid
        before = clients.descriptor_targets(pid)
        run.monitor.send_fd(_label(name), number)
        found = clients.given(pid, before, number)
        if len(found) != 1:
            raise StepFailed(self.describe(), f"{name}: not found again among the descriptors of pid {pid}")
        kept.given[name] = found[0]

    def undo(self, run: Run) -> None:
        kept: InPlace | None = run.extra.get("in_place")
        if kept is None:
            return
        kept.tracer.close()
        if kept.old_memory is not None:
            kept.old_memory.close()
        if kept.executed:
            return
        for name in kept.given:
            with contextlib.suppress(CommandFailed):
                run.monitor.execute("closefd", fdname=_label(name))


def _label(name: str) -> str:
    return name.replace(":", "-")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareSave(Step):
    """Capabilities and parameters for the saving of the state, and the way that it takes to us."""

    guest: Guest

    def describe(self) -> str:
        return f"set {', '.join(migration.ONE_WAY)} for the saving of the state"

    def do(self, run: Run) -> None:
        migration.prepare(run.monitor, migration.ONE_WAY)
        here, there = socket.socketpair()
        run.closing.callback(here.close)
        with there:
            narrow(there)
            run.monitor.send_fd(stream.NAME, there.fileno())
        run.extra["stream"] = here
        kept, pid = in_place(run), self.guest.process.pid
        kept.files = clients.files_among(clients.descriptor_targets(pid))
        kept.loose = tuple(d.number for d in fds.descriptor_table(pid) if d.number > 2 and not d.close_on_exec)

    def undo(self, run: Run) -> None:
        if in_place(run).executed:
            return
        with contextlib.suppress(CommandFailed):
            run.monitor.execute("closefd", fdname=stream.NAME)
        migration.restore(run.monitor, dict(self.guest.capabilities), self.guest.parameters)


def hold_clients(run: Run, guest: Guest) -> dict[str, int]:
    """Duplicate the clients that are connected now, in place of those that were held: {chardev: its number there}."""
    assert run.old is not None
    wanted = waiting_chardevs(guest)
    listeners = {c.label: run.descriptors[f"listener:{c.label}"] for c in wanted}
    found = {}
    for chardev in clients.connected_now(run.old.pid, wanted, listeners):
        if chardev.client is not None:
            found[chardev.label] = chardev.client
    for chardev in still_calling(run, guest):
        assert chardev.client is not None
        found[chardev.label] = chardev.client
    hold(run, CLIENT, found)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeRoom(Step):
    """Let QEMU write what waits for clients that do not read: the new one would write it to those that stand in."""

    guest: Guest

    def describe(self) -> str:
        return "make room for what waits for connected clients"

    def do(self, run: Run) -> None:
        hold_clients(run, self.guest)
        make_room(run, self.describe())

    def undo(self, run: Run) -> None:
        take_room_back(run)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveState(Step):
    """`stop`, and `migrate` into a memory file that the guest's process has too.

    Where the state is complete nothing more is read of what QEMU sends, and so it reads nothing more of what clients
    say, nor accepts anybody (qemu/state_end.py). So its block chains are asked for before.
    """

    guest: Guest

    def describe(self) -> str:
        return "stop the guest and save the device state"

    def do(self, run: Run) -> None:
        same_runstate(run, self.guest, self.describe())
        run.extra["seen_old"] = seen = run.monitor.event_count
        run.blackout_began = time.monotonic()
        if self.guest.running:
            run.monitor.execute("stop")
        run.extra["chains"] = run.monitor.execute("query-block")
        held = stream.save(run, in_place(run).state.number, run.extra.get(dress.MARK), self.describe())
        if not held and (labels := [*hold_clients(run, self.guest)]):
            run.notes.append(f"what was said to {', '.join(labels)} within the pause may be lost")
        if self.guest.running:
            stop = [event for event in run.monitor.events()[seen:] if event.name == "STOP"]
            if not stop:
                raise StepFailed(self.describe(), "the guest did not stop")
            run.stop_time = stop[0].timestamp

    def undo(self, run: Run) -> None:
        kept = in_place(run)
        if kept.executed:
            return
        run.extra["stream"].close()  # it goes on from the middle of its words
        stream.go_on_after_save(run, self.guest)
        if kept.came:
            assert run.old is not None
            reconnect(run, run.monitor, {label: run.descriptors[CLIENT + label] for label in kept.came})
            run.notes += leftover.close_left(run.old, list(kept.came.values()))
