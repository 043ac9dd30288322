"""What stands in the way of a new host kernel under the guests: the host and every guest, asked. Nothing is changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cpr.app import savable
from cpr.app.examine import Examined, Examiner, find_all, in_parallel
from cpr.app.world import Choices, World, real_world
from cpr.checks import apply_ignores, host_checks, run_host_checks
from cpr.checks.registry import blockers
from cpr.checks.saveram import amount
from cpr.errors import Exit, UsageError
from cpr.reboot import store

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cpr.model import Candidate, Finding, NextKernel


@dataclass(frozen=True, slots=True, kw_only=True)
class Jump:
    """What the user asked for of the next kernel; empty: the newest that is installed, as the running one was booted.

    `append` alone is the whole command line; with `reuse` it is added to the running one.
    """

    kernel: str = ""
    initrd: str = ""
    append: str = ""
    reuse: bool = False
    abandon: tuple[str, ...] = ()
    """Guests that may be lost, by name."""
    save_ram: str = ""
    """Directory to which RAM is copied that the jump does not leave alone; empty: such a guest is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RebootCheck:
    """All answers: of the host once, and of each guest that would be saved."""

    kexec: NextKernel
    host: tuple[Finding, ...]
    guests: tuple[Examined, ...]
    abandoned: tuple[Candidate, ...] = ()

    @property
    def possible(self) -> bool:
        return not blockers(self.host) and all(e.error is None and not e.blockers for e in self.guests)

    @property
    def exit_codes(self) -> tuple[Exit, ...]:
        return (Exit.BLOCKED if blockers(self.host) else Exit.OK, *(e.exit_code for e in self.guests))


def check_kexec(
    names: Sequence[str],
    choices: Choices,
    jump: Jump,
    *,
    world: World | None = None,
    run_id: str = "",
) -> RebootCheck:
    """The pre-check of a jump that saves the named guests, or all but the abandoned where none is named.

    Raises:
        NotFound: a name that no guest has. UsageError: choices that cannot be meant.
    """
    world = world or real_world()
    everybody = world.candidates()
    abandoned = find_all(jump.abandon, world)
    given_up = {c.process for c in abandoned}
    chosen = find_all(names, world) if names else tuple(c for c in everybody if c.process not in given_up)
    both = [label(c) for c in chosen if c.process in given_up]
    if both:
        raise UsageError(f"{', '.join(both)}: named both to be saved and to be lost (--abandon)")
    saved = {c.process for c in chosen}
    kexec = world.next_kernel(
        store.state_directory(),
        image=jump.kernel,
        initrd=jump.initrd,
        append=jump.append,
        reuse=jump.reuse or not jump.append,
        unsaved=tuple(label(c) for c in everybody if c.process not in saved | given_up),
        save_ram=jump.save_ram,
        timeout=choices.timeout,
    )
    examiner = Examiner(world=world, choices=choices, run_id=run_id)
    asked_once = host_checks()

    def one(candidate: Candidate) -> Examined:
        return savable.examine(examiner, candidate, kexec, passed_over=asked_once)

    guests = in_parallel(one, chosen, choices.jobs)
    host = apply_ignores(run_host_checks(examiner.host(), _with_amounts(kexec, guests)), choices.ignore)
    return RebootCheck(kexec=kexec, host=host, guests=guests, abandoned=abandoned)


def _with_amounts(kexec: NextKernel, guests: Iterable[Examined]) -> NextKernel:
    """What all guests write to the directory of --save-ram."""
    if kexec.save_ram is None:
        return kexec
    amounts = [amount(e.guest, kexec) for e in guests if e.guest is not None]
    likely, most = sum(about for about, _ in amounts), sum(bound for _, bound in amounts)
    return replace(kexec, save_ram=replace(kexec.save_ram, likely=likely, most=most))


def label(candidate: Candidate) -> str:
    """`web1 (pid 4242)`."""
    pid = candidate.process.pid
    return f"{candidate.name} (pid {pid})" if candidate.name else f"pid {pid}"
