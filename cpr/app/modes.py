"""Which CPR modes a guest supports: a look, without a rehearsal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpr.app import savable
from cpr.app.examine import Examined, Examiner, find_all
from cpr.app.world import Choices, World, real_world
from cpr.checks import host_checks
from cpr.checks.reboot import kept
from cpr.checks.words import some
from cpr.model import Severity
from cpr.reboot import store

if TYPE_CHECKING:
    from cpr.persistence import Persistence


@dataclass(frozen=True, slots=True, kw_only=True)
class Modes:
    """What was found. The next kernel is the one that `cpr update --kexec` would choose, booted as the running one."""

    examined: Examined
    restart: tuple[str, ...]
    """Engines that nothing blocks."""
    reboot: Examined
    """Looked at for a reboot."""
    ram: tuple[tuple[str, Persistence], ...]
    """(id, what a kexec leaves of it) of every RAM block."""

    @property
    def can_reboot(self) -> bool:
        return self.reboot.guest is not None and self.reboot.error is None

    @property
    def kept(self) -> bool:
        """All of its RAM outlives a kexec."""
        return bool(self.ram) and all(found.kept for _, found in self.ram)

    @property
    def words(self) -> str:
        """Why its RAM outlives a kexec, or why not."""
        if not self.ram:
            return "what its RAM is is not known"
        told = [(id, found) for id, found in self.ram if found.kept is self.kept]
        return some(f"{id}: {found.reason}" for id, found in told)


def info(name: str, choices: Choices, world: World | None = None) -> Modes:
    """Which CPR modes a guest supports: restart by which engines, reboot."""
    world = world or real_world()
    (candidate,) = find_all([name], world)
    examiner = Examiner(world=world, choices=choices, rehearse=False)
    examined = examiner.examine(candidate)
    free = tuple(
        engine for engine, findings in examined.engines if not any(f.severity is Severity.BLOCKER for f in findings)
    )
    kexec = world.next_kernel(store.state_directory(), restoring=False)  # that is the host's, and not asked here
    reboot = savable.examine(examiner, candidate, kexec, passed_over=host_checks())
    ram = tuple((b.id, kept(b, kexec)) for b in reboot.guest.ram) if reboot.guest is not None else ()
    return Modes(examined=examined, restart=free, reboot=reboot, ram=ram)
