"""What the use cases need of the machine, in one place so that a test gives values instead; and what the user chose."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from cpr.config import Config
from cpr.errors import KexecFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from cpr.engines.base import Engine
    from cpr.errors import CprError
    from cpr.model import Candidate, Guest, Host, NextKernel, Outcome, Plan, ProcessId, Rehearsal, Target

DEFAULTS = Config()


class Handle(Protocol):
    """A keeper at work on one guest."""

    def events(self) -> Iterator[dict[str, Any]]:
        """What it does, until it is through."""

    def outcome(self) -> Outcome:
        """What came out, once the events have ended."""

    def interrupt(self, code: int = ...) -> None:
        """Undo, if the commit is not sent yet."""


def _no_kexec(*_: Any) -> Any:
    raise KexecFailed("there is no kexec here")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The machine, as far as the use cases need it."""

    candidates: Callable[[], tuple[Candidate, ...]]
    find: Callable[[str], Candidate]
    survey: Callable[[Candidate], Guest]
    survey_host: Callable[[], Host]
    ask: Callable[[str, tuple[str, ...]], Target]
    rehearse: Callable[[Guest, Target], Rehearsal]
    start: Callable[[Plan, str, float, float], Handle]
    """(plan, run id, timeout, longest pause), both in seconds."""
    engines: Mapping[str, Engine]
    new_run_id: Callable[[], str]
    claimed: Callable[[ProcessId], CprError | None]
    """Another run that works on the guest, was interrupted and left it, or left a journal that cannot be read."""
    reboot_facts: Callable[[Guest], Guest] = lambda guest: guest
    next_kernel: Callable[..., NextKernel] = _no_kexec
    """(state directory, keywords of reboot.facts.next_kernel)"""
    guard: Callable[[str], AbstractContextManager[Any]] = lambda path: nullcontext()
    """A process that brings the guests of the manifest at this path to an end, if we die within the context."""
    load_kernel: Callable[[NextKernel], str] = _no_kexec
    unload_kernel: Callable[[], None] = _no_kexec
    jump: Callable[[], None] = _no_kexec
    """Into the loaded kernel. Unless it raises, this boot has ended, or soon will."""
    going_down: Callable[[], bool] = lambda: False
    """Whether the host is on its way down: a jump that was asked for is coming."""


def real_world() -> World:
    """This machine. Imported here, so that `cpr --help` need not."""
    from cpr import discover, journal, keeper, lend, survey
    from cpr.app import guardian
    from cpr.app.finish import claimed
    from cpr.engines import ENGINES
    from cpr.linux import kexec
    from cpr.qemu import features, rehearsal
    from cpr.reboot import facts
    from cpr.run import Bounds

    def start(plan: Plan, run_id: str, timeout: float, max_downtime: float) -> Handle:
        bounds = Bounds(timeout=timeout, max_downtime=max_downtime)
        return keeper.start(plan, run_id=run_id, bounds=bounds)

    return World(
        candidates=discover.candidates,
        find=discover.find,
        survey=lend.survey,
        survey_host=survey.survey_host,
        ask=lambda path, options: features.ask(path, extra_options=options),
        rehearse=rehearsal.rehearse,
        start=start,
        engines=ENGINES,
        new_run_id=journal.new_run_id,
        claimed=lambda process: keeper.claimed(process) or claimed(process),
        reboot_facts=facts.with_reboot_facts,
        next_kernel=lambda directory, **named: facts.next_kernel(state_directory=directory, **named),
        guard=guardian.guard,
        load_kernel=lambda kernel: kexec.load(kernel.image, kernel.initrd, kernel.command_line),
        unload_kernel=kexec.unload,
        jump=lambda: kexec.jump(systemd=kexec.systemd_runs()),
        going_down=kexec.going_down,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What the user asked for."""

    qemu: str = ""
    """The new QEMU; "" for the installed one of the same name."""
    qemu_options: tuple[str, ...] = ()
    engine: str = "auto"
    ignore: tuple[str, ...] = ()
    timeout: float = DEFAULTS.timeout
    max_downtime: float = DEFAULTS.max_downtime
    jobs: int = DEFAULTS.jobs
    skip_blocked: bool = False
    show_events: bool = False
    """A client whose monitor is borrowed hears of STOP and RESUME."""
