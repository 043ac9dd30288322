"""Saving one guest: its state goes to a file of ours, its RAM stays where it is, and until `quit` there is a way back.

    saver = Saver(guest, "/var/lib/cpr/reboot/RUN/web1.state")
    known = saver.prepare()       # nothing is changed yet; `known` is enough to undo by
    saver.suspend(60)             # VFIO only: the guest is put to sleep by its agent
    saver.save(30)                # it stands still from here on
    sealed = saver.seal()         # with checksum of the state, stamps of the RAM, identities of the disks
    saver.quit()                  # or saver.undo()

The state comes to us through a socket pair, and we write it: QEMU may run as a user who may not open the directory.
Where the RAM is in it (ramcopy.py), QEMU itself may write the file, by a descriptor of ours.

Out of scope: several guests (app/reboot.py), what is written down of them (manifest.py), loading (restoring.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from cpr.engines import stream
from cpr.engines.settings import set_discard
from cpr.errors import AgentError, Blocked, CommandFailed, MonitorError, StepFailed
from cpr.linux.process import Process, open_process
from cpr.model import Runstate
from cpr.persistence import identity
from cpr.qemu import migration, qmp
from cpr.qemu.agent import Agent
from cpr.reboot import ramcopy, stamp
from cpr.reboot.files import disk, seal
from cpr.reboot.goingon import go_on
from cpr.reboot.knowledge import known_of
from cpr.reboot.manifest import RamCopy

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from cpr.model import Guest, Target
    from cpr.qemu.qmp import Monitor
    from cpr.reboot.goingon import WentOn
    from cpr.reboot.manifest import SavedGuest, SavedRam

GREETING_SECONDS = 60.0
"""Before the first guest is stopped: many that are busy, on few processors, are asked at once."""
SAVE_SECONDS = 60.0
SUSPEND_SECONDS = 60.0
QUIT_SECONDS = 20.0
SLICE = 0.1
"""Seconds between two looks at an interrupt and at the deadline."""
CPR_REBOOT = "cpr-reboot"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Saver:
    """One guest on its way to a file. Used by one thread at a time."""

    def __init__(
        self,
        guest: Guest,
        path: str,
        *,
        target: Target | None = None,
        pinned: str = "",
        lost: Collection[str] = (),
        attend: Callable[[], None] = lambda: None,
    ) -> None:
        """`path`: of the state, which must not be there yet. `attend` is called while waiting, and may raise.

        `target`: the QEMU that is to load it; `pinned`: the copy of the old one. `lost`: ids of RAM blocks for whose
        sake all of the RAM goes into the state.
        """
        self.guest = guest
        self._lost = frozenset(lost)
        self.copy = ramcopy.how(guest, target, self._lost)
        self.path = path
        self._target = target
        self._pinned = pinned
        self._attend = attend
        self._process: Process | None = None
        self._monitor: Monitor | None = None
        self._known: SavedGuest | None = None
        self._touched = False
        self._asleep = False

    @property
    def monitor(self) -> Monitor:
        assert self._monitor is not None, "prepare() comes first"
        return self._monitor

    @property
    def process(self) -> Process:
        assert self._process is not None, "prepare() comes first"
        return self._process

    def touched(self) -> None:
        """Somebody has changed its settings: `undo` puts them back."""
        self._touched = True

    @property
    def stuck(self) -> bool:
        """It is saved and sealed while it sleeps: the way back leads through its state (`goingon.is_stuck`)."""
        sealed = self._known is not None and self._known.state is not None
        return sealed and (self._asleep or self.guest.runstate == Runstate.SUSPENDED)

    @property
    def known(self) -> SavedGuest:
        """What is known by now."""
        assert self._known is not None, "prepare() comes first"
        return self._known

    def prepare(self) -> SavedGuest:
        """Connect, see that the guest is what was examined, and write down what can be read of a living process only.

        Raises:
            Blocked: its RAM could not be found again. MonitorError, CommandFailed, OSError. Nothing was changed.
        """
        guest = self.guest
        assert guest.monitor is not None
        self._process = open_process(guest.process.pid, guest.process.start_time)
        self._monitor = qmp.connect(guest.monitor, guest.process.pid, timeout=GREETING_SECONDS)
        status = str(self._monitor.execute("query-status")["status"])
        if status != guest.runstate:
            raise Blocked(f"{guest.label} was {guest.runstate} when it was examined and is {status} now", hint="again")
        self._known = known_of(
            guest, target=self._target, pinned=self._pinned, lost=self._lost, copy=self.copy, path=self.path
        )
        return self._known

    def suspend(self, timeout: float = SUSPEND_SECONDS) -> None:
        """Have the guest suspend itself to RAM, and wait for it. A guest that does not is to be undone.

        Raises:
            StepFailed: it refuses, or did not within `timeout` seconds.
        """
        step = f"suspend {self.guest.label}"
        self._touched = True
        self._asleep = True
        seen = self.monitor.event_count
        try:
            with Agent(self.known.agent, pid=self.guest.process.pid) as agent:
                agent.suspend_ram()
        except (AgentError, CommandFailed) as error:
            raise StepFailed(step, error.message, hint=error.hint) from None
        end = time.monotonic() + timeout
        while self._runstate() != Runstate.SUSPENDED:
            self._attend()
            if time.monotonic() > end:
                raise StepFailed(step, f"it is not suspended after {timeout:g} s", hint="look into the guest's own log")
            with contextlib.suppress(TimeoutError):
                self.monitor.wait_event({"SUSPEND"}, timeout=SLICE, after=seen)

    def save(self, timeout: float = SAVE_SECONDS) -> None:
        """Stop the guest, and have QEMU send its state to the file. It stands still from here on.

        `timeout`: for the state of its devices; for RAM there is more.

        Raises:
            StepFailed: QEMU could not, in its own words, or not within `timeout` seconds; it is to be undone.
            CprError, OSError: likewise.
        """
        end = time.monotonic() + timeout
        if self.copy is not RamCopy.NONE:
            end += ramcopy.patience(self.guest)
        step = f"save {self.guest.label}"
        monitor, seen = self.monitor, self.monitor.event_count
        self._touched = True
        set_discard(monitor, [b.qom_path for b in self.guest.ram if b.discard_data], on=False)
        ramcopy.prepare(monitor, self.copy)
        if has_mode(monitor):
            monitor.execute("migrate-set-parameters", mode=CPR_REBOOT)
        elif self.guest.running:
            monitor.execute("stop")
        number = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if self.copy is RamCopy.MAPPED:
                monitor.execute("migrate", uri=migration.file_uri(monitor, number))
                self._await(step, end, seen)
            else:
                with self._sending() as ours:
                    self._receive(ours, number, step, end, seen)
            self._completed(step, end)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise StepFailed(step, f"{self.path}: {error.strerror}", hint=f"make room in {self._directory}") from None
        finally:
            os.close(number)
        stops = [e for e in monitor.events()[seen:] if e.name == "STOP"]
        self._known = replace(self.known, stopped_at=stops[0].timestamp if stops else None)

    def _sending(self) -> socket.socket:
        """Have QEMU begin; our end of the way. No descriptor passes a TCP monitor."""
        assert self.guest.monitor is not None
        assert self._process is not None
        if self.guest.monitor.path:
            return stream.our_end(self.monitor, "migrate")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.monitor.execute("migrate", uri=f"tcp:127.0.0.1:{listener.getsockname()[1]}")
            return stream.connection_of(self._process.pid, listener)

    def _receive(self, ours: socket.socket, number: int, step: str, end: float, seen: int) -> None:
        ours.settimeout(SLICE)
        while True:
            self._attend()
            if time.monotonic() > end:
                raise StepFailed(step, "its state did not come to an end in time")
            try:
                data = ours.recv(stream.CHUNK)
            except TimeoutError:
                if migration.has_failed(self.monitor.events()[seen:]):
                    return
                continue
            if not data:
                return
            while data:
                data = data[os.write(number, data) :]

    def _await(self, step: str, end: float, seen: int) -> None:
        """QEMU writes the file itself."""
        while not any(e.name == "MIGRATION" and migration.ended(e) for e in self.monitor.events()[seen:]):
            self._attend()
            if time.monotonic() > end:
                raise StepFailed(step, "its RAM and state were not written in time")
            with contextlib.suppress(TimeoutError):
                self.monitor.wait_event({"MIGRATION"}, migration.ended, timeout=SLICE, after=seen)

    def _completed(self, step: str, end: float) -> None:
        """QEMU has closed its end; whether it is content shows a moment later."""
        while (status := self.monitor.execute("query-migrate").get("status")) not in migration.ENDED:
            self._attend()
            if time.monotonic() > end:
                raise StepFailed(step, f"its migration is still {status}")
            time.sleep(0.005)
        if status != "completed":
            hint = f"see how much room there is in {self._directory}" if self.copy is not RamCopy.NONE else ""
            raise StepFailed(step, migration.failure(self.monitor) or f"the migration is {status}", hint=hint)

    def seal(self) -> SavedGuest:
        """What makes the saved guest known again: nobody writes RAM and disks any more, and the state is on disk.

        Raises:
            FileError, StampError: something cannot be read; it is to be undone.
        """
        guest = self.known
        self._known = replace(
            guest,
            state=seal(self.path, sparse=self.copy is not RamCopy.NONE, attend=self._attend),
            ram=tuple(r if r.volatile else self._stamped(r) for r in guest.ram),
            disks=tuple(disk(s.path) for s in self.guest.disks),
        )
        return self._known

    def _stamped(self, ram: SavedRam) -> SavedRam:
        return replace(ram, stamp=stamp.take(ram.path, ram.size, identity(ram.storage), offset=ram.offset))

    def undo(self) -> WentOn:
        """The guest goes on as it was, if anything was done to it at all; its state is void and removed.

        Never raises: what failed is in the answer.
        """
        if not self._touched or self._monitor is None or self._known is None:
            self.close()
            return go_on(self.guest, None, suspended=False)
        went = go_on(self.guest, self._monitor, suspended=self._asleep)
        if went.well:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        self.close()
        return went

    def quit(self, timeout: float = QUIT_SECONDS) -> None:
        """End the old QEMU, whose RAM must not be thrown away with it, and wait until it is gone.

        Raises:
            StepFailed: discard-data is on and does not go off: it was not ended. Or it does not die.
        """
        end(self.monitor, self.process, self.guest, timeout)
        self.close()

    def close(self) -> None:
        """Hang up. The guest is not touched."""
        if self._monitor is not None:
            self._monitor.close()
        if self._process is not None:
            self._process.close()
        self._monitor = self._process = None

    @property
    def _directory(self) -> str:
        return os.path.dirname(self.path)

    def _runstate(self) -> str:
        return str(self.monitor.execute("query-status")["status"])


def end(monitor: Monitor, process: Process, guest: Guest, timeout: float = QUIT_SECONDS) -> None:
    """End the QEMU of a guest that is saved. Raises as `Saver.quit`."""
    set_discard(monitor, [b.qom_path for b in guest.ram if discards(monitor, b.qom_path)], on=False)
    with contextlib.suppress(MonitorError):
        monitor.execute("quit", timeout=timeout)
    if not process.wait_dead(timeout):
        process.kill()  # its images are inactive, its state is sealed: nothing is left to be flushed
        if not process.wait_dead(timeout):
            raise StepFailed(f"end pid {process.pid}", "it does not die, though it was killed")


def discards(monitor: Monitor, qom_path: str) -> bool:
    """Whether a memory backend would be punched out at QEMU's end."""
    try:
        return bool(monitor.execute("qom-get", path=qom_path, property="discard-data"))
    except CommandFailed:  # only memory-backend-file has it
        return False


def has_mode(monitor: Monitor) -> bool:
    """Whether this QEMU has migration modes, and cpr-reboot among them (8.2)."""
    return "mode" in monitor.execute("query-migrate-parameters")
