"""The steps after the commit: the guest runs in the new QEMU, and nothing here may touch that.

Nothing is undone any more; what fails is reported as a difference and the next step is done all the same.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpr import verify
from cpr.engines.prepare import release, set_discard
from cpr.engines.switch import CLIENT
from cpr.errors import CommandFailed, CprError, StepFailed
from cpr.linux import likeness
from cpr.model import Guest, RamBlock, Step
from cpr.qemu import clients, migration

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cpr.run import Run

GAP_SECONDS = 5.0
"""How long an address that the old QEMU held is tried for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndOld(Step):
    """End the old QEMU by SIGKILL: its images are flushed and inactive, and its exit handlers are not wanted.

    They would discard RAM (discard-data), run tap down-scripts, unlink sockets and the pid file.
    """

    def describe(self) -> str:
        return "end the old QEMU (SIGKILL: its exit handlers would undo what was moved)"

    def do(self, run: Run) -> None:
        assert run.old is not None
        run.old.kill()
        run.extra["ended_at"] = time.monotonic()
        if not run.old.wait_dead(15.0):
            raise StepFailed(self.describe(), f"the old QEMU (pid {run.old.pid}) does not die")


@dataclass(frozen=True, slots=True, kw_only=True)
class HandBack(Step):
    """Open again what cannot be passed on: forwarded ports of user networking, and the gdb stub."""

    forwards: tuple[str, ...]
    gdb: str

    def describe(self) -> str:
        return f"open again what cannot be inherited: {', '.join([*self.forwards, *([self.gdb] if self.gdb else [])])}"

    def do(self, run: Run) -> None:
        failed = []
        for command in [*self.forwards, *([self.gdb] if self.gdb else [])]:
            words = self._try(run, command)
            gap = time.monotonic() - run.extra.get("ended_at", time.monotonic())
            if words:
                failed.append(f"{command}: {words}")
            else:
                run.notes.append(f"{command}: nobody listened for {gap * 1000:.0f} ms")
        if failed:
            raise StepFailed(self.describe(), "; ".join(failed))

    def _try(self, run: Run, command: str) -> str:
        deadline = time.monotonic() + GAP_SECONDS
        while True:
            words = str(run.successor.execute("human-monitor-command", command_line=command)).strip()
            if not words or words.startswith("Waiting for gdb connection"):
                return ""
            if time.monotonic() > deadline:
                return words
            time.sleep(0.02)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle(Step):
    """Put back what was switched, on the new QEMU: capabilities, discard-data, statistics, threads, the pid file."""

    guest: Guest
    discarding: tuple[RamBlock, ...]

    def describe(self) -> str:
        return "put settings, thread placement and pid file back, and free the monitors"

    def do(self, run: Run) -> None:
        assert run.new is not None
        failed: list[str] = []
        with _collect(failed):
            migration.restore(run.successor, dict(self.guest.capabilities), self.guest.parameters)
        with _collect(failed):
            set_discard(run.successor, self.discarding, on=True)
        for path, seconds in self.guest.stats_polling:
            with _collect(failed):
                run.successor.execute(
                    "qom-set", path=path, property="guest-stats-polling-interval", value=seconds
                )
        with _collect(failed):
            self._place_threads(run)
        with _collect(failed):
            rewrite_pidfile_of(self.guest.pidfile, self.guest.cwd, self.guest.process.pid, run.new.pid)
        for sock in run.extra.pop("held", []):
            sock.close()
        for name, fd in run.descriptors.items():
            if name.startswith(CLIENT):
                with socket.socket(fileno=os.dup(fd.number)) as sock:
                    clients.narrow(sock)
        release(run)
        if failed:
            raise StepFailed(self.describe(), "; ".join(failed))

    def _place_threads(self, run: Run) -> None:
        """vCPU and I/O threads get the affinity, scheduling and cgroup of those they replace."""
        assert run.new is not None
        before = {p.tid: p for p in run.extra.get("placement", ())}
        now = {int(c["cpu-index"]): int(c["thread-id"]) for c in run.successor.execute("query-cpus-fast")}
        pairs = [(v.thread_id, now[v.index]) for v in self.guest.vcpus if v.index in now]
        io_now = {t["id"]: int(t["thread-id"]) for t in run.successor.execute("query-iothreads")}
        pairs += [(tid, io_now[name]) for name, tid in self.guest.iothreads if name in io_now]
        for old, new in pairs:
            if old in before:
                likeness.apply_placement(new, before[old])


@contextlib.contextmanager
def _collect(failed: list[str]) -> Iterator[None]:
    try:
        yield
    except CommandFailed as error:
        failed.append(error.message)
    except (CprError, OSError) as error:
        failed.append(str(error))


def rewrite_pidfile_of(pidfile: str, cwd: str, old: int, new: int) -> None:
    """Write the new pid into the guest's pid file, in place, if it holds the old one.

    The path is the guest's word, so nothing else is believed of it: it must be a regular file, reached without
    following a link at its end, whose whole content is the old pid.

    Raises:
        OSError: it cannot be read or written.
    """
    if not pidfile:
        return
    path = os.path.join(cwd, pidfile)
    with contextlib.suppress(FileNotFoundError):
        number = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(number, "r+b", buffering=0) as file:
            if file.read(64).strip() != str(old).encode():
                return
            file.seek(0)
            file.write(f"{new}\n".encode())
            file.truncate()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify(Step):
    """Survey the guest again and compare with what it was."""

    guest: Guest

    def describe(self) -> str:
        return "survey the guest again and compare"

    def do(self, run: Run) -> None:
        assert run.new is not None
        run.differences += verify.after_update(self.guest, run.new.pid, run.successor)
