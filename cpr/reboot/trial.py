"""Whether the new QEMU takes the guest's own state, found out before the bridge is burnt: the rehearsal of a re-exec
(engines/dress.py) for a guest that is going to be saved. It pauses a running guest for some milliseconds.

Out of scope: what cannot be rehearsed (qemu/state_rehearsal.py), which is told in words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from cpr.engines.dress import RehearseState
from cpr.errors import Blocked, CprError, DeadlinePassed, NewQemuDied, StepFailed
from cpr.model import Plan
from cpr.reboot import ramcopy
from cpr.run import Bounds, Run

if TYPE_CHECKING:
    from cpr.journal import Journal
    from cpr.model import Guest, Target
    from cpr.reboot.saving import Saver

TRIAL_SECONDS = 120.0
MAX_PAUSE_SECONDS = 10.0


class StateNotAccepted(Blocked):
    """The state is refused; `words` are QEMU's own."""

    def __init__(self, guest: Guest, target: Target, words: str) -> None:
        super().__init__(
            f"{guest.label}: {target.binary} does not take its state: {words} [state-not-accepted]",
            hint="stay with the QEMU that it runs in (--qemu PATH names it), or choose another",
            where="it runs as before",
        )
        self.words = words


class _NoJournal:
    """What a rehearsal writes down is for processes that outlive us, and its own do not."""

    def fact(self, name: str, **values: Any) -> None:
        """Nothing."""


def try_state(saver: Saver, target: Target) -> tuple[str, ...]:
    """Have the new QEMU load the guest's state over a private mapping of its RAM; what there is to say of it.

    The guest goes on, or stands, as before, whatever comes of it.

    Raises:
        StateNotAccepted: it is refused. StepFailed, CprError: it could not be tried, and why.
    """
    guest = saver.guest
    if copied := ramcopy.copied_by_a_trial(guest):
        words = f"its RAM ({', '.join(copied)}) would be copied for that, twice"
        return (f"whether {target.binary} takes its state was not tried: {words}",)
    run = Run(
        plan=Plan(guest=guest, target=target, engine="reboot", reason="", steps=(), findings=()),
        journal=cast("Journal", _NoJournal()),
        report=lambda message: None,
        bounds=Bounds(timeout=TRIAL_SECONDS, max_downtime=MAX_PAUSE_SECONDS),
        old=saver.process,
        old_monitor=saver.monitor,
    )
    step = RehearseState(guest=guest, target=target)
    try:
        step.do(run)
    except NewQemuDied as error:
        raise StateNotAccepted(guest, target, error.words or error.reason) from None
    except DeadlinePassed as error:
        raise StepFailed(step.describe(), error.reason, hint="try again when the host is less busy") from None
    except ProcessLookupError:
        raise StepFailed(step.describe(), "its process has ended") from None
    finally:
        saver.touched()
        run.undoing = True
        _put_right(step, run)
    return tuple(run.notes)


def _put_right(step: RehearseState, run: Run) -> None:
    """Where it was broken off: the guest goes on."""
    try:
        step.undo(run)
    except CprError as error:
        run.notes.append(error.message)
