"""What is compared: a table of ways to put a guest on a new QEMU, and cpr's own among them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tests.bench import WayFailed, native
from tests.bench.guest import BenchGuest, Case
from tests.bench.native import Moved
from tests.qemu.conftest import Command

COPIES_RARELY = 2 * 2**30
"""From this size on, ways that copy all RAM are measured in every fifth round only: they take a minute."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way.

    mode: the migration mode that both QEMUs must know. native: the guest is started for QEMU's own CPR modes.
    client: somebody is connected to the guest's console. copies: RAM a second time, and O(RAM). ours: it is
    cpr that does it.
    """

    name: str
    move: Callable[[BenchGuest], Moved]
    mode: str = ""
    native: bool = False
    client: bool = True
    copies: bool = False
    ours: bool = False

    def missing(self, case: Case) -> str | None:
        """Why the two QEMUs of a case cannot do it, or None."""
        for build in (case.old, case.new):
            if self.mode and self.mode not in native.migration_modes(build):
                return f"QEMU {build.version} does not know the migration mode {self.mode}"
        return None

    def memory(self, case: Case) -> int:
        """How many bytes of RAM the host needs for it beside the guest's."""
        own = 512 * 2**20 + (case.size if self.native else 0)
        return own + (case.size * 5 // 4 if self.copies else 0)

    def due(self, case: Case, round_: int) -> bool:
        """Whether it is measured in a round, counted from 0."""
        return not (self.copies and case.size >= COPIES_RARELY) or round_ % 5 == 0


def update(guest: BenchGuest, engine: str) -> Moved:
    """`cpr update --restart`, as a user calls it. Raises WayFailed with what it said."""
    command = Command(guest.lab, engine)
    began = time.monotonic()
    result = command.update(guest.process.pid, guest.case.new)
    seconds = time.monotonic() - began
    if result.code:
        raise WayFailed(f"cpr update: {result}")
    answer = result.guest
    if answer["status"] != "updated" or answer["engine"] != engine:
        raise WayFailed(f"cpr update: {answer['status']} by {answer['engine']}")
    process = guest.lab.adopt(answer["pid_after"])
    return Moved(process=process, blackout=answer["blackout_seconds"], seconds=seconds, console=guest.old.console)


def handover(guest: BenchGuest) -> Moved:
    return update(guest, "handover")


def reexec(guest: BenchGuest) -> Moved:
    return update(guest, "reexec")


WAYS: Mapping[str, Way] = MappingProxyType(
    {
        way.name: way
        for way in (
            Way(name="handover", move=handover, client=False, ours=True),
            Way(name="handover+console", move=handover, ours=True),
            Way(name="reexec", move=reexec, client=False, ours=True),
            Way(name="reexec+console", move=reexec, ours=True),
            Way(name="cpr-transfer", move=native.cpr_transfer, mode="cpr-transfer", native=True),
            Way(name="cpr-exec", move=native.cpr_exec, mode="cpr-exec", native=True),
            Way(name="live-migration", move=native.live, copies=True),
            Way(name="save-restart", move=native.save_and_restart, copies=True),
        )
    }
)
