"""What can go wrong, as facts: every error carries attributes, a hint and the exit code of its kind.

The exit codes are published (docs/overview.md) and never re-used: they answer "was anything changed, and is the
guest well?". Printing is not done here; `cli/` prints `message`, `where` and `hint`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Exit(IntEnum):
    """Exit codes of the command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    BLOCKED = 3
    PRIVILEGES = 4
    NOT_FOUND = 5
    ROLLED_BACK = 6
    NEEDS_ATTENTION = 7
    DIFFERS = 8
    WOULD_UPDATE = 9
    BUSY = 75
    INTERRUPTED = 130
    TERMINATED = 143


UNTOUCHED = "the guest was not touched"
AS_BEFORE = "the guest runs in the old QEMU as before"
RUNS_NEW = "the guest runs in the new QEMU"
NEEDS_YOU = "the guest needs you"


class CprError(Exception):
    """Base: `message` says what happened, `where` says where the guest is now, `hint` the way out."""

    code: ClassVar[Exit] = Exit.FAILED
    where: str = UNTOUCHED

    def __init__(self, message: str, *, hint: str = "", where: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if where is not None:
            self.where = where


class UsageError(CprError):
    """The command was called in a way that cannot be meant."""

    code = Exit.USAGE


class PrivilegeError(CprError):
    """An ability is missing; `ability` names it (CAP_SYS_PTRACE, ...)."""

    code = Exit.PRIVILEGES

    def __init__(self, message: str, *, ability: str, hint: str = "", where: str | None = None) -> None:
        super().__init__(message, hint=hint, where=where)
        self.ability = ability


class NotFound(CprError):
    """No such guest, run, binary or manifest."""

    code = Exit.NOT_FOUND


class NoSuchGuest(NotFound):
    """Nothing on this host answers to `wanted`."""

    def __init__(self, wanted: str, candidates: Sequence[str] = (), *, hint: str = "") -> None:
        known = f"; guests here: {', '.join(candidates)}" if candidates else ""
        super().__init__(f"no guest {wanted!r}{known}", hint=hint or "cpr list shows the guests of this host")
        self.wanted = wanted
        self.candidates = tuple(candidates)


class AmbiguousGuest(NotFound):
    """More than one guest answers to `wanted`."""

    def __init__(self, wanted: str, candidates: Sequence[str]) -> None:
        super().__init__(
            f"{wanted!r} could mean {len(candidates)} guests: {', '.join(candidates)}", hint="name one by its pid"
        )
        self.wanted = wanted
        self.candidates = tuple(candidates)


class NotQemu(NotFound):
    """The pid exists but is no QEMU."""

    def __init__(self, pid: int, what: str) -> None:
        super().__init__(f"pid {pid} is not a QEMU guest: {what}", hint="cpr list shows the guests of this host")
        self.pid = pid


class BinaryUnusable(NotFound):
    """The new QEMU's binary is missing, no program, of another architecture, or does not answer."""

    def __init__(self, path: str, reason: str, *, hint: str = "") -> None:
        super().__init__(f"{path}: {reason}", hint=hint)
        self.path = path
        self.reason = reason


class GuestVanished(CprError):
    """The process ended, or its pid belongs to another process now."""

    where = "the guest's process has ended"

    def __init__(self, pid: int, doing: str) -> None:
        super().__init__(f"pid {pid} vanished while {doing}", hint="look at the guest's own log")
        self.pid = pid


class MonitorError(CprError):
    """QEMU's monitor could not be used: no answer, nonsense, or it hung up. `address` says which one."""

    def __init__(self, address: str, reason: str, *, hint: str = "", where: str | None = None) -> None:
        super().__init__(f"monitor {address}: {reason}", hint=hint, where=where)
        self.address = address
        self.reason = reason


class MonitorHeld(MonitorError):
    """Nobody answers on the monitor because another client holds it."""


class CommandFailed(CprError):
    """QEMU answered a command with an error; `error_class` and `description` are its own words."""

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"{command}: {description}")
        self.command = command
        self.error_class = error_class
        self.description = description


class Blocked(CprError):
    """The pre-check refuses."""

    code = Exit.BLOCKED


class Busy(CprError):
    """Another run holds the guest; `holder` has its pid, run and since."""

    code = Exit.BUSY

    def __init__(self, message: str, holder: Mapping[str, object], *, hint: str = "") -> None:
        super().__init__(message, hint=hint, where="the other run has the guest")
        self.holder = dict(holder)


class StepFailed(CprError):
    """A step of a plan could not be done; `step` names it. What follows is decided by `run.py`."""

    def __init__(self, step: str, reason: str, *, hint: str = "") -> None:
        super().__init__(f"{step}: {reason}", hint=hint)
        self.step = step
        self.reason = reason


class NewQemuDied(StepFailed):
    """The new QEMU ended; `words` is what it said last on its standard error."""

    def __init__(self, step: str, status: str, words: str) -> None:
        super().__init__(step, f"the new QEMU {status}" + (f': "{words}"' if words else ""))
        self.words = words


class DeadlinePassed(StepFailed):
    """Something took longer than allowed."""


class Interrupted(CprError):
    """Ctrl-C, SIGTERM, or the command went away, before the commit."""

    code = Exit.INTERRUPTED


class KexecFailed(CprError):
    """A kernel could not be loaded, or the jump into it was not made; `errno` is 0 where no system call said it."""

    def __init__(self, message: str, *, errno: int = 0, hint: str = "", where: str | None = None) -> None:
        super().__init__(message, hint=hint, where=where)
        self.errno = errno


class AgentError(CprError):
    """The guest agent could not be used: no answer, nonsense, or it hung up. `address` says which one."""

    def __init__(self, address: str, reason: str, *, hint: str = "") -> None:
        super().__init__(f"guest agent {address}: {reason}", hint=hint)
        self.address = address
        self.reason = reason


class AgentTimeout(AgentError):
    """It did not answer in time: it is not running in the guest, or the guest does not run."""


class JournalError(CprError):
    """A journal is unreadable, of another format, or cannot be written."""

    code = Exit.FAILED


class ManifestError(NotFound):
    """A manifest is unreadable, of another format, damaged, or not to be trusted: as good as none."""

    where = "the guests' RAM and state files were not touched"


def words(error: BaseException) -> str:
    """What is to be said of whatever was raised."""
    return error.message if isinstance(error, CprError) else str(error) or type(error).__name__
