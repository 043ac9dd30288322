"""Bringing one saved guest back: a new QEMU over the RAM that stayed, and the state loaded into it.

    verify ─► bind vfio ─► start in the likeness ─► it maps the very RAM ─► load ─► it is written down ─► go on

Until it is written down nothing of the guest has run, and a failure costs nothing but the new QEMU, which is killed.
From then on its state is never loaded again.

Out of scope: several guests, and what is said about them (app/reboot.py).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cpr.engines import stream
from cpr.engines.prepare import last_words, shared_files
from cpr.engines.settings import put_back
from cpr.engines.successor import MARK, run_mark
from cpr.errors import CommandFailed, CprError, Exit, MonitorError, StepFailed, words
from cpr.linux import likeness, pci
from cpr.linux.fds import Fd, memory_file
from cpr.linux.process import Process
from cpr.model import Runstate
from cpr.qemu import migration, qmp
from cpr.qemu.agent import Agent
from cpr.qemu.cmdline import CommandLineError
from cpr.reboot import ramcopy
from cpr.reboot.afresh import afresh, with_ram_paths
from cpr.reboot.goingon import STANDS_STILL, restore_mode, wake
from cpr.reboot.knowledge import make_directories
from cpr.reboot.manifest import RamCopy, Result
from cpr.reboot.needs import awaited
from cpr.reboot.saving import CPR_REBOOT, has_mode
from cpr.reboot.startable import end_left_behind, like_now, open_log, settings_now
from cpr.reboot.verifying import NotRestorable, located, verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.model import Guest, Target
    from cpr.qemu.qmp import Monitor
    from cpr.reboot.afresh import Afresh
    from cpr.reboot.manifest import Manifest, SavedGuest

START_SECONDS = 60.0
LOAD_SECONDS = 120.0
RESUME_SECONDS = 5.0
CLOCK_SECONDS = 2.0
"""By how much a guest's clock that was set may differ from ours: it took its time to be asked."""
PROGRAM_NUMBER = 9
"""Descriptor by which a copy of the old QEMU is executed: its directory is ours alone, and it may be another user's."""


class NotRestored(CprError):
    """The new QEMU did not take the guest, and is gone."""

    code = Exit.NEEDS_ATTENTION
    where = "saved: it runs nowhere, its RAM and state are as they were"


@dataclass(slots=True)
class Restored:
    """A guest that is back."""

    pid: int
    start_time: int
    runstate: str
    resumed_at: float | None
    """Of QEMU's own event, in seconds since the epoch; None where it was left standing."""
    notes: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The QEMU to start: what it knows, and whether it is the copy of the old one, executed by descriptor."""

    target: Target
    copy: bool = False


def restore(
    saved: SavedGuest,
    manifest: Manifest,
    program: Program,
    *,
    log: str,
    loaded: Callable[[int, int], None],
    attend: Callable[[], None] = lambda: None,
) -> Restored:
    """Bring it back, its output going to the file `log`.

    `loaded` is told pid and start time of the new QEMU when it has the state, and writes down, before it returns, that
    it may not be loaded again. `attend` is called while waiting until then, and may raise.

    Raises:
        NotRestorable: it is not what it was; nothing was started. NotRestored: the new QEMU does not take it.
    """
    mark = run_mark(manifest.run, saved.pid)
    if saved.restore.result is Result.OPEN:
        try:
            end_left_behind(saved, mark)
        except StepFailed as error:
            raise _as_not_restored(saved, error, log) from None
    saved = located(saved)
    guest = saved.guest
    if guest is None or saved.state is None:
        verify(saved, manifest, attend)
        raise NotRestorable(saved.label, ("the manifest has not all that is needed",))
    made = _made(saved, guest, program, mark)
    missing = [f"{subject}: {why}" for subject, why, _ in made.missing]
    hint = made.missing[0][2] if made.missing else "cpr restore (or cpr load) tries again when it is there"
    if saved.restore.result is Result.OPEN:
        missing += awaited(saved, guest, made, attend)
    verify(saved, manifest, attend, missing, hint=hint)
    starting = _Starting(saved, guest, made, program, log, attend, mark)
    try:
        starting.prepare()
        monitor = starting.start()
        starting.same_ram()
        starting.load(monitor)
        attend()
        loaded(starting.process.pid, starting.process.start_time)
    except BaseException as error:
        starting.kill()
        if isinstance(error, (CprError, OSError)):
            raise _as_not_restored(saved, error, log) from None
        raise
    restored = settle(saved, guest, monitor, starting.process.pid, starting.process.start_time)
    restored.notes[:0] = starting.notes
    monitor.close()
    starting.process.close()
    return restored


def _made(saved: SavedGuest, guest: Guest, program: Program, mark: str) -> Afresh:
    """How it is going to be started. Raises NotRestorable: its command line cannot be understood."""
    target = program.target
    if program.copy:  # the copy passes for what it is a copy of
        target = replace(target, binary=replace(target.binary, path=saved.binary_before.path))
    try:
        return afresh(guest, target, mark=mark, anew=[ram.id for ram in saved.ram if ram.volatile])
    except CommandLineError as error:
        raise NotRestorable(saved.label, (f"its command line: {error}",)) from None


def settle(saved: SavedGuest, guest: Guest, monitor: Monitor, pid: int, start_time: int) -> Restored:
    """It is loaded, and goes on or stands as before, with what it had. What fails is told, and no more."""
    before = saved.runstate
    result = Restored(pid, start_time, "", None)
    seen = monitor.event_count
    try:
        status = str(monitor.execute("query-status")["status"])
        if saved.suspended:
            wake(monitor)
        elif before in (Runstate.RUNNING, Runstate.SUSPENDED) and status in STANDS_STILL:
            monitor.execute("cont")
            if before == Runstate.RUNNING:
                with contextlib.suppress(TimeoutError):
                    result.resumed_at = monitor.wait_event({"RESUME"}, timeout=RESUME_SECONDS, after=seen).timestamp
        result.runstate = str(monitor.execute("query-status")["status"])
        result.differences += put_back(monitor, settings_now(saved), old=saved.pid, new=pid)
        restore_mode(monitor, guest)
        migration.close_file(monitor)
    except CprError as error:
        result.differences.append(error.message)
    if not result.runstate or (before == Runstate.RUNNING) != (result.runstate == Runstate.RUNNING):
        result.differences.append(f"it was {before}, and is {result.runstate or 'not to be asked'}")
    if before == Runstate.RUNNING:
        result.notes += set_time(saved, pid)
    return result


def _as_not_restored(saved: SavedGuest, error: CprError | OSError, log: str) -> NotRestored:
    hint = "cpr restore (or cpr load) tries again; with --qemu old, in the QEMU that it was saved from"
    if os.path.exists(log):
        hint += f"; QEMU's own words are in {log}"
    return NotRestored(f"{saved.label} is not restored: {words(error)}", hint=hint)


class _Starting:
    """A new QEMU on its way."""

    def __init__(
        self,
        saved: SavedGuest,
        guest: Guest,
        made: Afresh,
        program: Program,
        log: str,
        attend: Callable[[], None],
        mark: str,
    ) -> None:
        self.saved = saved
        self.guest = guest
        self.made = made
        self.program = program
        self.log = log
        self.attend = attend
        self.mark = mark
        self.notes = list(made.notes)
        self._process: Process | None = None
        self._said_before = 0

    @property
    def process(self) -> Process:
        assert self._process is not None
        return self._process

    def prepare(self) -> None:
        """What a boot takes away: directories on /run, and passed-through devices from their driver."""
        make_directories(self.saved.directories)
        for device in self.saved.vfio:
            try:
                pci.load_driver(device.driver)
                pci.bind(device.address, device.driver)
            except OSError as error:
                raise StepFailed(f"bind {device.address} to {device.driver}", str(error)) from None

    def start(self) -> Monitor:
        ours, theirs = socket.socketpair()
        descriptors: dict[int, int | Fd] = {self.made.control_number: theirs.fileno()}
        binary = self.program.target.binary
        executable: tuple[str, tuple[int, int] | None] = (binary.path, binary.identity)
        argv, environ = list(self._argv()), list(self.made.environ)
        with contextlib.ExitStack() as held:
            held.callback(theirs.close)
            log = held.enter_context(open_log(self.log))
            for memory in self.made.memory:
                given = memory_file(f"cpr-{memory.id}", memory.size, page=memory.page)
                descriptors[memory.number] = held.enter_context(given)
            self._said_before = os.fstat(log.number).st_size
            if self.program.copy:
                descriptors[PROGRAM_NUMBER] = held.enter_context(Fd(os.open(binary.path, os.O_RDONLY | os.O_CLOEXEC)))
                executable = (f"/proc/self/fd/{PROGRAM_NUMBER}", None)
                argv += [word for path in self.saved.data_directories for word in ("-L", path)]
                if self.saved.module_directory:
                    environ.append(("QEMU_MODULE_DIR", self.saved.module_directory))
            like, unmet = like_now(self.saved)
            try:
                launched = likeness.launch(
                    like,
                    argv=argv,
                    environ=environ,
                    executable=executable,
                    descriptors=descriptors,
                    stdout=log,
                    stderr=log,
                    mark=(MARK, self.mark),
                )
            except OSError as error:
                ours.close()
                raise StepFailed("start the new QEMU", str(error)) from None
        self._process = Process.of(launched)
        self.notes += [*unmet, *launched.unmet]
        return self._greet(ours)

    def _argv(self) -> tuple[str, ...]:
        moved = {r.id: r.path for r in self.saved.ram if not r.volatile and r.path != r.storage.path}
        return with_ram_paths(self.made.argv, moved) if moved else self.made.argv

    def _greet(self, control: socket.socket) -> Monitor:
        waiting = select.poll()
        waiting.register(control, select.POLLIN)
        waiting.register(self.process.pidfd.number, select.POLLIN)
        end = time.monotonic() + START_SECONDS
        while not (ready := {number for number, _ in waiting.poll(50)}):
            self.attend()
            if time.monotonic() > end:
                raise StepFailed("start the new QEMU", f"it said nothing for {START_SECONDS:g} s")
        if control.fileno() not in ready:
            raise StepFailed("start the new QEMU", self._words() or "it ended without a word")
        monitor = qmp.negotiate(control, "of the new QEMU", timeout=START_SECONDS, attend=self.attend)
        status = monitor.execute("query-status")["status"]
        if status not in (Runstate.INMIGRATE, Runstate.PRELAUNCH):
            raise StepFailed("start the new QEMU", f"it is {status}, and does not wait for a state")
        return monitor

    def same_ram(self) -> None:
        """It has mapped the very files and devices that were verified, shared; what is made anew is of no matter."""
        mapped = {inode for _, inode in shared_files(self.process.pid)}
        for ram in (ram for ram in self.saved.ram if not ram.volatile):
            if os.stat(ram.path).st_ino not in mapped:
                raise StepFailed("compare RAM", f"the new QEMU does not map the guest's RAM {ram.id} at {ram.path}")

    def load(self, monitor: Monitor) -> None:
        step = "load the state"
        assert self.saved.state is not None
        copy = self.saved.ram_copy
        if lacking := migration.lacking(monitor, ramcopy.CAPABILITIES[copy]):
            raise StepFailed(step, f"it was saved with {', '.join(lacking)}, which this QEMU does not have")
        ramcopy.prepare(monitor, copy)
        if has_mode(monitor):
            monitor.execute("migrate-set-parameters", mode=CPR_REBOOT)
        seen = monitor.event_count
        send = self._by_file if copy is RamCopy.MAPPED else self._by_stream
        why = send(monitor, self.saved.state.path, seen)
        if why:
            raise StepFailed(step, why)

    def _by_stream(self, monitor: Monitor, path: str, seen: int) -> str:
        with open(path, "rb") as file, stream.our_end(monitor, "migrate-incoming") as ours:
            ours.settimeout(LOAD_SECONDS)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, TimeoutError):  # it shows in what follows
                while data := file.read(stream.CHUNK):
                    ours.sendall(data)
                    self.attend()
                ours.shutdown(socket.SHUT_WR)
            return self._judge(monitor, seen, LOAD_SECONDS)

    def _by_file(self, monitor: Monitor, path: str, seen: int) -> str:
        """QEMU reads it itself, by a descriptor of ours."""
        with Fd(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as file:
            monitor.execute("migrate-incoming", uri=migration.file_uri(monitor, file.number))
            return self._judge(monitor, seen, LOAD_SECONDS + ramcopy.patience(self.guest))

    def _judge(self, monitor: Monitor, seen: int, seconds: float) -> str:
        """"" if it has loaded the state; else why not, in QEMU's words. From 9.1 on it ends where it does not."""
        end = time.monotonic() + seconds
        try:
            # while it reads mapped RAM it answers nothing (seen with 10.0 and 11.1: 2.6 s for 1.5 GiB)
            while (status := monitor.execute("query-migrate", timeout=seconds).get("status")) not in migration.ENDED:
                self.attend()
                if time.monotonic() > end:
                    return f"it is not loaded after {seconds:g} s"
                with contextlib.suppress(TimeoutError):
                    monitor.wait_event({"MIGRATION"}, migration.ended, timeout=stream.SLICE, after=seen)
        except MonitorError:
            self.process.wait_dead(2.0)
            return self._words() or "the new QEMU ended without a word"
        if status == "completed":
            return ""
        said = migration.failure(monitor)
        return self._words() or said or f"the migration is {status}"

    def kill(self) -> None:
        """Nothing of the guest has run in it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait_dead(15.0)
            self._process.close()

    def _words(self) -> str:
        with contextlib.suppress(OSError), open(self.log, "rb") as file:
            file.seek(self._said_before)
            return last_words(file.read(65536).decode(errors="replace"))
        return ""


def set_time(saved: SavedGuest, pid: int) -> list[str]:
    """Set the guest's clock by its agent; what came of it, in words. Without one it is behind by the time it stood."""
    if not saved.agent:
        return ["its clock stood still while it was saved, and it has no guest agent by which it could be set"]
    try:
        with Agent(saved.agent, pid=pid) as agent:
            try:
                agent.set_time(time.time())
            except CommandFailed as error:
                if abs(agent.time() - time.time()) > CLOCK_SECONDS:
                    raise
                return [f"its clock was set by the guest agent, but not its hardware clock: {error.message}"]
    except CprError as error:
        return [f"its clock stood still while it was saved, and could not be set: {error.message}"]
    return ["its clock was set by the guest agent"]
