"""Re-exec: QEMU is replaced in its own process, which keeps its pid, parent, descriptors and connections.

The steps below, read from top to bottom, are the whole of it; docs/engines.md says why each is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpr.engines import after, arrive, borrow, dress, execute, fit, inplace, prepare, switch
from cpr.engines.handover import unknown_numbers, vnc_listeners
from cpr.engines.successor import SILENT, successor
from cpr.model import Finding, Severity, Target

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cpr.engines.base import Request
    from cpr.model import Guest, Host, Step


class Reexec:
    """The engine of that name."""

    name = "reexec"

    def findings(self, guest: Guest, host: Host, target: Target) -> Iterator[Finding]:
        yield from unknown_numbers(guest, self.name)
        yield from vnc_listeners(guest, target, self.name)
        if guest.monitor is None or not guest.monitor.path:
            yield Finding(
                check="monitor-tcp",
                severity=Severity.BLOCKER,
                subject=str(guest.monitor or "no monitor"),
                message="descriptors cannot be passed over the guest's only QMP socket, which is no UNIX socket",
                hint="start the guest with -qmp unix:PATH,server=on,wait=off",
                engines=(self.name,),
            )

    def preference(self, guest: Guest) -> str:
        return fit.pid_known_to(guest)

    def steps(self, guest: Guest, target: Target, request: Request) -> Sequence[Step]:
        new = successor(guest, target, request.run_id, in_place=True)
        back = successor(guest, itself(guest), request.run_id, alone=True)
        others, show = borrow.borrowed_monitors(guest), request.show_events
        held = bool(others or guest.monitor_held)
        prompts = borrow.borrowed_prompts(guest)
        plan: list[Step] = [
            borrow.BorrowControl(guest=guest, show=show) if guest.monitor_held else prepare.OpenMonitor(guest=guest),
            prepare.TakeDescriptors(guest=guest, inherited=new.inherited),
            prepare.OccupyMonitors(guest=guest, labels=new.monitors, control=new.control),
            inplace.PrepareExec(guest=guest, successor=new),
            *([borrow.BorrowMonitors(guest=guest, monitors=others, show=show)] if others else []),
            dress.RehearseState(guest=guest, target=target),
            inplace.PrepareSave(guest=guest),
            inplace.MakeRoom(guest=guest),
            switch.CompareChains(guest=guest, new=False),
            *([borrow.BorrowPrompts(monitors=prompts)] if prompts else []),
            *([borrow.QuietenMonitors(show=show)] if held else []),
            inplace.SaveState(guest=guest, blackout=True),
            switch.CompareChains(guest=guest, new=False, blackout=True),
            execute.ExecNew(
                guest=guest, target=target, successor=new, back=back, run_id=request.run_id, blackout=True
            ),
            arrive.LoadState(guest=guest, blackout=True),
            switch.CompareChains(guest=guest, old=False, new=True, blackout=True),
            arrive.KeepClients(
                guest=guest,
                silent=tuple(entry for entry in new.inherited if entry.name.startswith(SILENT)),
                blackout=True,
            ),
            switch.Continue(commit=True, blackout=True) if guest.running else switch.Decide(commit=True),
        ]
        if held or prompts:
            plan.append(borrow.GiveMonitorsBack(guest=guest, show=show))
        if new.vnc:
            plan.append(switch.PassVncListeners(vnc=new.vnc))
        if new.opened_again:
            plan.append(after.HandBack(commands=new.opened_again))
        plan += [arrive.LetClientsIn(guest=guest), after.Settle(guest=guest), after.Verify(guest=guest)]
        return plan


def itself(guest: Guest) -> Target:
    """The guest's own QEMU as a target: nothing has to be translated for it."""
    return Target(
        binary=guest.binary,
        machines=frozenset(),
        machine_aliases={},
        device_types=frozenset(),
        commands=frozenset(),
        migrate_modes=frozenset(),
        capabilities=frozenset(),
        options=None,
        extra_options=guest.added_options,
    )
