"""The steps that lead to a new QEMU beside the old one, while the guest runs. The switch is `switch.py`.

A step is frozen; what changes while it runs is in `Run`. `undo` is called also after a `do` that failed half-way, and
in reverse order; every step from `StartNew` on makes sure that the new QEMU is dead before the old one is touched.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpr.engines.doors import Shutting, drop
from cpr.engines.settings import Settings, set_discard
from cpr.engines.successor import MARK, SILENT, run_mark
from cpr.engines.taps import TapGuard
from cpr.errors import MonitorError, MonitorHeld, NewQemuDied, StepFailed
from cpr.linux import fds, likeness, proc, procfile
from cpr.linux.process import Process
from cpr.model import Chardev, Guest, RamBlock, Runstate, Step, Target
from cpr.qemu import clients, first_words, qmp

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cpr.engines.successor import Inherited, Successor
    from cpr.run import Run

WAY_BACK_SECONDS = 60.0
"""For a QEMU that is started on the way back: there is no other way left, so it is not hurried."""

LISTENERS = ("listener:", "vnc:")
"""How the names of inherited listening sockets begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenMonitor(Step):
    """Connect to the guest's monitor and see that the guest is what the plan was made from.

    A second connection is queued right behind the first, for the new QEMU (see `OccupyMonitors`).
    """

    guest: Guest

    def describe(self) -> str:
        return f"connect to the monitor of pid {self.guest.process.pid} at {self.guest.monitor}"

    def do(self, run: Run) -> None:
        assert self.guest.monitor is not None
        assert run.old is not None
        address, pid = self.guest.monitor, self.guest.process.pid
        number = next((c.listener for c in self.guest.chardevs if c.label == address.label), None)
        try:
            if number is None:
                first = qmp.open_socket(address, pid)
            else:
                with fds.take_fd(run.old.pidfd, number) as listener:
                    first, run.extra["second"] = clients.two_places(address, pid, listener)
        except TimeoutError:
            raise MonitorHeld(str(address), "its queue of waiting clients is full", hint="somebody holds it") from None
        run.old_monitor = qmp.negotiate(first, str(address), attend=run.attend)
        same_runstate(run, self.guest, self.describe())

    def undo(self, run: Run) -> None:
        if (second := run.extra.pop("second", None)) is not None:
            second.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeDescriptors(Step):
    """Duplicate RAM, listeners, connections and taps out of the old QEMU: from here on they outlive it."""

    guest: Guest
    inherited: tuple[Inherited, ...]

    def describe(self) -> str:
        kinds: dict[str, int] = {}
        for entry in self.inherited:
            kind = entry.name.split(":")[0]
            kinds[kind] = kinds.get(kind, 0) + 1
        counts = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
        return f"take descriptors from pid {self.guest.process.pid}: {counts or 'none'}"

    def do(self, run: Run) -> None:
        assert run.old is not None
        for entry in self.inherited:
            if entry.name.startswith(SILENT):
                fd = self._silent(run, entry.name.removeprefix(SILENT))
            elif entry.source is None:
                fd = fds.Fd(os.open(entry.path, os.O_RDWR | os.O_CLOEXEC))
            else:
                fd = fds.take_fd(run.old.pidfd, entry.source)
            run.descriptors[entry.name] = fd
            if entry.inode and os.fstat(fd.number).st_ino != entry.inode:
                raise StepFailed(self.describe(), f"descriptor {entry.source} is not {entry.name} any more")
            if entry.name.startswith(LISTENERS):
                # QEMU leaves it blocking: of two that are woken for one client the second would hang in accept,
                # and with it the guest. Left so at an undo: with one QEMU it makes no difference.
                os.set_blocking(fd.number, False)
                clients.lengthen_queue(fd)
        for number in (0, 1, 2):
            with contextlib.suppress(OSError):
                run.descriptors[f"stdio:{number}"] = fds.take_fd(run.old.pidfd, number)

    def _silent(self, run: Run, label: str) -> fds.Fd:
        """A connection for the new QEMU to start with; our end is to be closed when it gets the real one."""
        ours, theirs = socket.socketpair()
        run.extra.setdefault("doors", {})[label] = ours
        return fds.Fd(theirs.detach())

    def undo(self, run: Run) -> None:
        drop(run)
        release(run)


def release(run: Run) -> None:
    """Close our copies of what was taken."""
    for name, fd in run.descriptors.items():
        if name.startswith(LISTENERS):
            clients.shorten_queue(fd)
        fd.close()
    run.descriptors.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class OccupyMonitors(Step):
    """See to it that nobody talks to the new QEMU before the commit.

    A QEMU monitor serves one client and leaves the next ones in its listener's queue. Each monitor of the old QEMU gets
    a client of ours, and right behind it a second one is queued. The new QEMU inherits the listener with `wait=on`: it
    takes exactly that second client before its main loop starts, and no other until we hang up. The second client of
    the guest's own QMP socket is how we drive the new QEMU. Others wait in the queue and are served by whichever QEMU
    lives on; nobody is turned away.
    """

    guest: Guest
    labels: tuple[str, ...]
    control: str

    def describe(self) -> str:
        return f"keep the monitor{'s' if len(self.labels) > 1 else ''} {', '.join(self.labels) or '(none)'} to us"

    def do(self, run: Run) -> None:
        held = run.extra.setdefault("held", [])
        for chardev in self.guest.chardevs:
            if chardev.label not in self.labels:
                continue
            own = self.guest.monitor is not None and chardev.label == self.guest.monitor.label
            second = run.extra.pop("second", None) if own else None
            if second is None:
                second = self._two_places(run, chardev)
            if chardev.label == self.control:
                run.extra["control"] = second
            else:
                held.append(second)

    def _two_places(self, run: Run, chardev: Chardev) -> socket.socket:
        listener = run.descriptors[f"listener:{chardev.label}"]
        address = clients.listen_address(listener, chardev.label)
        first, second = clients.two_places(address, self.guest.process.pid, listener)
        run.extra["held"].append(first)
        run.extra.setdefault("places", {})[chardev.label] = first
        if chardev.connected and clients.others_ahead(first, listener, self.guest.process.pid):
            second.close()  # the new QEMU would serve that one before the commit
            raise MonitorError(str(address), "besides the client that holds it others wait for it", hint="try again")
        # one that was connected at the check goes down with the old QEMU (--ignore); others only ask something
        if not chardev.connected and not select.select([first], [], [], 5.0)[0]:
            second.close()
            raise MonitorError(str(address), "another client came first and stays", hint="try again")
        return second

    def undo(self, run: Run) -> None:
        run.extra.pop("places", None)
        for sock in [*run.extra.pop("held", []), *filter(None, [run.extra.pop("control", None)])]:
            sock.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepRamAtExit(Step):
    """`discard-data=on` would punch out the shared RAM when the old QEMU goes: switch it off and read it back."""

    blocks: tuple[RamBlock, ...]

    def describe(self) -> str:
        return f"switch discard-data off for {', '.join(b.id for b in self.blocks)}"

    def do(self, run: Run) -> None:
        run.extra["touched"] = True
        set_discard(run.monitor, [b.qom_path for b in self.blocks], on=False)

    def undo(self, run: Run) -> None:
        set_discard(run.monitor, [b.qom_path for b in self.blocks], on=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartNew(Step):
    """Start the new QEMU, paused and waiting for the state, in the old one's likeness. The guest still runs."""

    guest: Guest
    target: Target
    successor: Successor
    run_id: str

    def describe(self) -> str:
        return f"start the new QEMU {self.target.binary} in the likeness of pid {self.guest.process.pid}"

    def do(self, run: Run) -> None:
        run.extra["touched"] = True
        ours, theirs = socket.socketpair() if self.successor.control_number is not None else (None, None)
        given = {
            entry.target: run.descriptors[entry.name].number
            for entry in self.successor.inherited
            if entry.target is not None
        }
        if theirs is not None and self.successor.control_number is not None:
            given[self.successor.control_number] = theirs.fileno()
        run.words = words_of(run.descriptors.get("stdio:2"))
        like = likeness.likeness_of(self.guest.process.pid)
        note_settings(run, self.guest, self.successor)
        self._guard_taps(run)
        run.journal.fact("starting", run=self.run_id)
        try:
            launched = likeness.launch(
                like,
                argv=self.successor.argv,
                environ=self.successor.environ,
                executable=(self.target.binary.path, self.target.binary.identity),
                descriptors=given,
                stdin=run.descriptors.get("stdio:0"),
                stdout=run.descriptors.get("stdio:1"),
                stderr=run.descriptors.get("stdio:2"),
                mark=(MARK, run_mark(self.run_id, self.guest.process.pid)),
            )
        finally:
            if theirs is not None:
                theirs.close()
        run.new = Process(launched.pid, launched.start_time, launched.pidfd)
        run.journal.fact("new", pid=run.new.pid, start_time=run.new.start_time)
        run.notes += [*self.successor.notes, *launched.unmet]
        control = ours if ours is not None else run.extra.pop("control")
        doors = Shutting(run, self.guest)
        with contextlib.closing(doors):
            run.new_monitor = greet(run, self.describe(), control, doors.commands)
            doors.settle()
        for name, listener in run.descriptors.items():
            if name.startswith(LISTENERS):
                clients.lengthen_queue(listener)  # the new QEMU has shortened it
        if run.successor.execute("query-status")["status"] != Runstate.INMIGRATE:
            raise StepFailed(self.describe(), "another QEMU answered on the monitor", hint="try again")
        same_ram(self.guest, shared_files(self.guest.process.pid), run.new.pid, self.describe())
        different = likeness.differences(like, likeness.likeness_of(run.new.pid), unmet=launched.unmet)
        if different:
            raise StepFailed(self.describe(), "it is not like the old one: " + "; ".join(different))

    def _guard_taps(self, run: Run) -> None:
        shared = {e.name: run.descriptors[e.name] for e in self.successor.inherited if e.name.startswith("tap:")}
        if not shared:
            return
        guard = run.extra["taps"] = TapGuard(shared)
        numbers = [e.source for e in self.successor.inherited if e.name in shared]
        run.journal.fact("taps", numbers=numbers, settings=guard.settings())
        guard.start()

    def undo(self, run: Run) -> None:
        run.kill_new()
        drop(run)
        guard: TapGuard | None = run.extra.pop("taps", None)
        if guard is not None:
            guard.restore()
        if run.new_monitor is not None:
            run.new_monitor.close()
        run.new_monitor = None


def note_settings(run: Run, guest: Guest, new: Successor) -> None:
    """Keep what is to be put back on the new QEMU, for `Settle` and in the journal."""
    settings = Settings.of(guest, likeness.thread_placement(guest.process.pid), new.opened_again)
    run.extra["settings"] = settings
    run.journal.fact("settings", value=settings.json())


def same_runstate(run: Run, guest: Guest, step: str) -> None:
    """Raise StepFailed unless the guest is as it was when it was checked."""
    status = run.monitor.execute("query-status")["status"]
    if status != guest.runstate:
        raise StepFailed(step, f"the guest was {guest.runstate} when checked and is {status} now")


def greet(
    run: Run, step: str, control: socket.socket, first: Sequence[first_words.Command] = ()
) -> qmp.Monitor:
    """Wait for the new QEMU's greeting, or for its end; `first` are the first things that it does."""
    assert run.new is not None
    waiting = select.poll()
    waiting.register(control, select.POLLIN)
    waiting.register(run.new.pidfd.number, select.POLLIN)
    while not (ready := {fd for fd, _ in waiting.poll(50)}):
        run.attend()
    if control.fileno() not in ready:
        run.new.wait_dead(1.0)
        raise NewQemuDied(step, "ended at its start", run.words())
    seconds = WAY_BACK_SECONDS if run.undoing else max(1.0, run.remaining())
    return qmp.negotiate(control, "of the new QEMU", timeout=seconds, attend=run.attend, first=first)


def shared_files(pid: int) -> set[tuple[tuple[int, int], int]]:
    """Device and inode of what a process has mapped shared. Raises ProcessLookupError.

    It is asked for in a blackout, so only the few lines that matter are taken apart.
    """
    shared = "\n".join(line for line in procfile.read_text(pid, "maps").split("\n") if "s " in line[:80])
    return {(m.device, m.inode) for m in proc.parse_maps(shared) if "s" in m.perms and m.inode}


def same_ram(guest: Guest, old: set[tuple[tuple[int, int], int]], pid: int, step: str) -> None:
    """Raise StepFailed unless the process has mapped the very pages of the old one, shared."""
    both = shared_files(pid) & old
    for ram in guest.ram:
        if not any(inode == ram.inode for _, inode in both):
            raise StepFailed(step, f"the new QEMU does not map the guest's RAM {ram.id}")


def words_of(stderr: fds.Fd | None) -> Callable[[], str]:
    """Reads what is written to a log file from now on; nothing where standard error is no regular file."""
    position = 0
    path = f"/proc/self/fd/{stderr.number}" if stderr is not None else ""
    with contextlib.suppress(OSError):
        position = os.stat(path).st_size if path and os.path.isfile(path) else -1

    def read() -> str:
        if position < 0 or not path:
            return ""
        with contextlib.suppress(OSError), open(path, "rb") as file:
            file.seek(position)
            return last_words(file.read(65536).decode(errors="replace"))
        return ""

    return read


def last_words(text: str) -> str:
    """The lines of QEMU's standard error that tell why: without warnings and notes, at most four."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "warning:" not in line and " info: " not in line]
    return " / ".join((telling or lines)[-4:])
