"""The exec itself: all threads are stopped, what is to survive is let survive, and the process becomes the new QEMU.

What follows in the new program is `arrive.py`; the way back is `wayback.py`.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpr.engines import fdmap, ptys, stream, threads
from cpr.engines.borrow import sessions
from cpr.engines.doors import drop
from cpr.engines.inplace import STATE, InPlace, hold_clients, in_place
from cpr.engines.prepare import greet
from cpr.engines.successor import MARK, callers, doors, run_mark, waiting_chardevs
from cpr.engines.switch import CLIENT, MASTER, hold
from cpr.engines.wayback import bring_back
from cpr.errors import CprError, StepFailed
from cpr.linux import fds, proc, status, stub
from cpr.linux.process import Process, open_process
from cpr.linux.tracee import Call
from cpr.linux.tracer import Attach, Batch, Detach, Exec, Follow, Keep, Look, Tracer
from cpr.model import Guest, Step, Target
from cpr.qemu import clients, qmp

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cpr.engines.successor import Inherited, Successor
    from cpr.linux.births import Birth
    from cpr.linux.tracer import Operation
    from cpr.model import Chardev
    from cpr.run import Run

SETTLE_SECONDS = 5.0
RAN_TICKS = 10
"""More time in user mode than the stub takes, in clock ticks (sysconf SC_CLK_TCK)."""
F_SETFD, FD_CLOEXEC, O_CLOEXEC = 2, 1, os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecNew(Step):
    """Stop all threads, see who is connected, let that survive, and have the process execute the new QEMU."""

    guest: Guest
    target: Target
    successor: Successor
    back: Successor
    """How the old program is started again."""
    run_id: str

    def describe(self) -> str:
        return f"execute {self.target.binary} in pid {self.guest.process.pid}"

    def do(self, run: Run) -> None:
        kept = in_place(run)
        try:
            self._stop(run, kept)
            self._stand_in(run, kept)
            calls = list(self._calls(run, kept))
            kept.map = self._map(kept)
            self._record(run, kept)
            run.check(self.describe())
            run.bound = True
            self._exec(run, kept, calls)
        except OSError as error:
            words = f"{error.strerror or error}"
            raise StepFailed(self.describe(), f"the guest's process could not be made to: {words}") from None
        old = run.monitor
        run.new = _same_process(self.guest)
        old.close()
        control = run.extra.pop("control")
        control.setblocking(True)
        run.new_monitor = greet(run, self.describe(), control, stream.load_commands(kept.given[STATE]))
        with contextlib.suppress(ConnectionError):  # said where it is needed
            kept.tracer.post(Look())

    def _stop(self, run: Run, kept: InPlace) -> None:
        """Stop all threads. Who waits to be accepted is so in QEMU's place, or the new one would start with him."""
        ((kept.thread,),) = kept.tracer.run(Attach())
        self._look(run, kept)
        waiting = [c for c in doors(self.guest) if _waited_for(run, c)]
        if not waiting:
            return
        if taken := [c.label for c in waiting if c.label in kept.clients]:
            raise StepFailed(
                self.describe(),
                f"a second client waits for {', '.join(taken)}, and would take the place of the first",
                hint="end the second client and try again",
            )
        if shy := [c.label for c in waiting if not c.plain]:
            raise StepFailed(self.describe(), f"a client has just come to {', '.join(shy)}", hint="try again")
        before = set(kept.clients)
        calls = (Call("accept4", (c.listener or 0, 0, 0, os.O_NONBLOCK | O_CLOEXEC)) for c in waiting)
        kept.tracer.run(Batch(tuple(calls)))
        self._look(run, kept)
        kept.came = {
            label: (number, os.fstat(run.descriptors[CLIENT + label].number).st_ino)
            for label, number in kept.clients.items()
            if label not in before
        }
        run.journal.fact("came", clients=kept.came)
        if more := [c.label for c in waiting if _waited_for(run, c)]:
            raise StepFailed(self.describe(), f"clients keep coming to {', '.join(more)}", hint="try again")

    def _look(self, run: Run, kept: InPlace) -> None:
        """Who is connected, and whether a file was opened since the chains were compared."""
        pid = self.guest.process.pid
        opened = clients.files_among(clients.descriptor_targets(pid)) - kept.files
        if opened:
            raise StepFailed(self.describe(), f"QEMU has opened {', '.join(sorted(opened))}", hint="try again")
        kept.clients = hold_clients(run, self.guest)
        assert run.old is not None
        kept.ptys = ptys.of_chardevs(ptys.named(self.guest.chardevs), ptys.masters(run.old))
        hold(run, MASTER, kept.ptys)

    def _stand_in(self, run: Run, kept: InPlace) -> None:
        """Queue a client of ours at each chardev: the new QEMU starts with that one, and accepts no other."""
        wanted = waiting_chardevs(self.guest)
        inodes = [os.fstat(run.descriptors[f"listener:{c.label}"].number).st_ino for c in wanted]
        run.journal.fact("standing in", at=[(c.listener, inode) for c, inode in zip(wanted, inodes, strict=True)])
        for chardev in wanted:
            listener = run.descriptors[f"listener:{chardev.label}"]
            address = clients.listen_address(listener, chardev.label)
            try:
                clients.lengthen_queue(listener)
                kept.standing_in[chardev.label] = qmp.open_socket(address, self.guest.process.pid)
            except OSError as error:
                raise StepFailed(
                    self.describe(), f"{chardev.label}: nobody can connect to {address} ({error.strerror or error})"
                ) from None

    def _calls(self, run: Run, kept: InPlace) -> Iterator[Call]:
        """Let survive what is to survive. Raises StepFailed where a number is not what it was."""
        pid = self.guest.process.pid
        there = clients.descriptor_targets(pid)
        survive = [*kept.clients.values(), *kept.ptys.values(), kept.given[STATE]]
        survive += [session.kept.number for session in sessions(run).values()]
        moved: list[tuple[int, int]] = []
        for entry in self._inherited(kept):
            if entry.source is not None:
                self._same(run, entry)
                if entry.name not in self.successor.bound:  # whoever dies: the new program can bind their addresses
                    survive.append(entry.source)
            elif entry.target is not None:
                moved.append((kept.given[entry.name], entry.target))
        if self.successor.control_number is not None:
            moved.append((kept.given[self.successor.control], self.successor.control_number))
        if occupied := {target for _, target in moved} & there.keys():
            raise StepFailed(self.describe(), f"descriptors {sorted(occupied)} are taken meanwhile", hint="try again")
        kept.changed = tuple(n for n in dict.fromkeys(survive) if fds.closes_on_exec(pid, n))
        for number in kept.changed:
            yield Call("fcntl", (number, F_SETFD, 0))
        loose = set(kept.loose)
        if self.guest.spice:  # it takes clients without the flag, and they would not hear a hang-up
            loose.update(d.number for d in fds.descriptor_table(pid) if d.number > 2 and not d.close_on_exec)
        for number in loose & there.keys() - set(survive):
            yield Call("fcntl", (number, F_SETFD, FD_CLOEXEC))
        for source, target in moved:
            yield Call("dup3", (source, target, 0))

    def _inherited(self, kept: InPlace) -> list[Inherited]:
        """But for connections that QEMU had made and has no more: the new one finds that its silent one hangs up."""
        gone = {c.label for c in callers(self.guest)} - kept.clients.keys()
        return [e for e in self.successor.inherited if e.name not in {f"connection:{label}" for label in gone}]

    def _same(self, run: Run, entry: Inherited) -> None:
        ours = os.fstat(run.descriptors[entry.name].number)
        with contextlib.suppress(OSError):
            status = os.stat(f"/proc/{self.guest.process.pid}/fd/{entry.source}")
            if (status.st_dev, status.st_ino) == (ours.st_dev, ours.st_ino):
                return
        raise StepFailed(self.describe(), f"descriptor {entry.source} is not {entry.name} any more")

    def _record(self, run: Run, kept: InPlace) -> None:
        """What a recovery finds in the process where: a number counts only with the inode that it has now."""
        there = {name: (entry.number, entry.inode) for name, entry in kept.map.entries.items()}
        run.journal.fact(
            "exec",
            mark=kept.map.run,
            thread=kept.thread,
            state=there[fdmap.STATE],
            clients={label: there[fdmap.client(label)] for label in kept.clients},
            ptys={label: there[fdmap.pty(label)] for label in kept.ptys},
            vnc=[[there[name] for name in names] for _, names in self.successor.vnc],
            left=[there[name] for name in kept.left.entries],
            changed=kept.changed,
            helpers=self.guest.teardown_helpers,
            placed=_placed(self.successor),
        )

    def _exec(self, run: Run, kept: InPlace, calls: Sequence[Call]) -> None:
        """Point of no return: from the reply on the process is the new program."""
        told = [pair for pair in fdmap.encode(kept.map) if pair[0] != fdmap.RUN]  # the mark is there already
        environ = tuple(f"{name}={value}" for name, value in (*self.successor.environ, *told))
        program = Exec(self.target.binary.path, self.successor.argv, environ)
        after: dict[str, Birth] = run.extra.get(threads.AFTER, {})
        if kept.console is not None:
            with contextlib.suppress(OSError):
                kept.console.as_before()
        bound = tuple(e.source for e in self.successor.inherited if e.name in self.successor.bound and e.source)
        first: list[Operation] = [Batch(tuple(calls)), *([Keep(bound)] if bound else []), program]
        replies = kept.tracer.events(*first, Follow(after) if after or bound else Detach())
        try:
            for _ in first:
                next(replies).raise_error()
            kept.executed = True
            next(replies).raise_error()
        except (CprError, OSError) as error:
            if kept.executed and isinstance(error, ConnectionError):
                return
            if kept.executed or not self._became(kept):
                raise

    def _map(self, kept: InPlace) -> fdmap.FdMap:
        """What the new program finds under which number."""
        pid = self.guest.process.pid
        inherited = [e for e in self._inherited(kept) if e.name not in self.successor.bound]
        named = {_map_name(e.name): e.source for e in inherited if e.source is not None}
        named |= {fdmap.pty(label): number for label, number in kept.ptys.items()}
        named |= {fdmap.client(label): number for label, number in kept.clients.items()}
        named[fdmap.STATE] = kept.given[STATE]
        entries = {name: fdmap.Entry(n, os.stat(f"/proc/{pid}/fd/{n}").st_ino) for name, n in named.items()}
        return fdmap.FdMap(run=run_mark(self.run_id, pid), entries=entries)

    def _became(self, kept: InPlace) -> bool:
        """Whether it is the new program nevertheless. One that is gone, or not to be known for either, goes back."""
        kept.tracer.kill()
        found = None
        with contextlib.suppress(ProcessLookupError):
            found = became(self.guest.process.pid, kept.thread, kept.map.run)
        kept.executed = found is not False
        return found is True

    def undo(self, run: Run) -> None:
        kept: InPlace = in_place(run)
        run.bound = False
        while kept.standing_in:
            label, sock = kept.standing_in.popitem()
            with sock, contextlib.suppress(OSError):  # or the next update would find a client that waits there
                clients.withdraw(run.descriptors[f"listener:{label}"], self.guest.process.pid, sock)
        if kept.executed:
            drop(run)
            bring_back(run, self.guest, self.back, kept)
            return
        if kept.console is not None:
            with contextlib.suppress(OSError):
                kept.console.as_now()
        kept.tracer.close()  # its threads run again
        if kept.changed:
            assert run.old is not None
            as_before(run.old, kept.changed, _placed(self.successor))


def _waited_for(run: Run, chardev: Chardev) -> bool:
    """Whether somebody waits to be accepted."""
    return bool(select.select([run.descriptors[f"listener:{chardev.label}"].number], [], [], 0)[0])


def became(pid: int, thread: int, mark: str, seconds: float = SETTLE_SECONDS) -> bool | None:
    """Whether a process is the program with this mark (`run_mark`).

    While it is traced, the tracer may yet have it executed. When that is killed, the thread that was to execute the
    program goes on, and may be in the middle of that. It is not where it waits in another call, or has run in user mode
    for longer than in the stub.

    thread: that one.  seconds: how long to wait until it is known.

    None: it is not that program, as `thread` still may execute it. Raises ProcessLookupError: it is gone.
    """
    until = time.monotonic() + seconds
    began = _user_time(thread)
    while True:
        # asked first, so that a "no" is the last word
        traced = status.read_status(pid).tracer != 0
        waits = not stub.may_execute(pid, thread)
        ran = _user_time(thread) - began > RAN_TICKS
        environ = dict(proc.read_environ(pid))
        if environ.get(MARK) == mark:
            return True
        if not traced and (waits or (ran and environ)):  # half way it has none
            return False
        if time.monotonic() > until:
            return None
        time.sleep(0.001)


def _user_time(thread: int) -> int:
    with contextlib.suppress(ProcessLookupError):
        return status.read_stat(thread).user_time
    return 0


def as_before(process: Process, changed: Sequence[int], placed: Sequence[int]) -> None:
    """FD_CLOEXEC as it was, nothing at the numbers that were given; as far as can be: the guest does not need it."""
    with contextlib.suppress(OSError, CprError):
        there = clients.descriptor_targets(process.pid)
        calls = [Call("fcntl", (n, F_SETFD, FD_CLOEXEC)) for n in changed if n in there]
        calls += [Call("close", (n,)) for n in placed if n in there]
        if calls:
            with Tracer.start(process) as tracer:
                tracer.run(Attach(), Batch(tuple(calls)), Detach())


def _placed(new: Successor) -> list[int]:
    """Numbers in the old process at which its successor finds what it was given."""
    numbers = [e.target for e in new.inherited if e.source is None and e.target is not None]
    return numbers + ([new.control_number] if new.control_number is not None else [])


def _map_name(inherited: str) -> str:
    """What the descriptor map calls an inherited descriptor."""
    kind, _, label = inherited.partition(":")
    if kind in ("listener", "connection"):
        return fdmap.chardev(label)
    return fdmap.ram(label) if kind == "ram" else inherited


def _same_process(guest: Guest) -> Process:
    """A second hold on the guest's process; it may have ended already, which shows in `alive`. Raises StepFailed."""
    try:
        return open_process(guest.process.pid, guest.process.start_time)
    except OSError as error:
        raise StepFailed("execute the new QEMU", f"the process did not survive it: {error}") from None


