"""The steps after the commit: the guest runs in the new QEMU, and nothing here may touch that.

Nothing is undone any more; what fails is reported as a difference and the next step is done all the same.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpr import verify
from cpr.engines import threads
from cpr.engines.prepare import release
from cpr.engines.settings import Settings, hand_back, put_back
from cpr.engines.switch import take_room_back
from cpr.errors import CprError, StepFailed
from cpr.model import Guest, Step

if TYPE_CHECKING:
    from cpr.run import Run


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

    commands: tuple[str, ...]

    def describe(self) -> str:
        return f"open again what cannot be inherited: {', '.join(self.commands)}"

    def do(self, run: Run) -> None:
        told, failed = hand_back(run.successor, self.commands, run.extra.get("ended_at"))
        run.notes += told
        if failed:
            raise StepFailed(self.describe(), "; ".join(failed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle(Step):
    """Put back what was switched, on the new QEMU: capabilities, discard-data, statistics, threads, the pid file."""

    guest: Guest

    def describe(self) -> str:
        return "put settings, thread placement and pid file back, and free the monitors"

    def do(self, run: Run) -> None:
        assert run.new is not None
        settings: Settings = run.extra["settings"]
        failed = put_back(run.successor, settings, old=self.guest.process.pid, new=run.new.pid)
        if run.new.pid == self.guest.process.pid:
            with contextlib.suppress(CprError, OSError):
                run.notes += threads.changed(threads.of_guest(self.guest), threads.now(run.successor, run.new.pid))
        for sock in run.extra.pop("held", []):
            sock.close()
        take_room_back(run)
        release(run)
        if failed:
            raise StepFailed(self.describe(), "; ".join(failed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify(Step):
    """Survey the guest again and compare with what it was."""

    guest: Guest

    def describe(self) -> str:
        return "survey the guest again and compare"

    def do(self, run: Run) -> None:
        assert run.new is not None
        run.differences += verify.after_update(self.guest, run.new.pid, run.successor)
