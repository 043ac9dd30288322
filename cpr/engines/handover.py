"""Handover: the new QEMU is started beside the old one, takes RAM, state and connections over, and the old one ends.

Needs shared RAM that the stream can skip, and nobody who knows the guest by its pid. Way back: full until the commit,
the old QEMU is alive. Blackout: a few milliseconds, whatever the size of RAM. The steps below, read from top to bottom,
are the whole of it; docs/engines.md says why each is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpr.engines import after, prepare, switch
from cpr.engines.successor import base_command, successor
from cpr.model import Finding, Severity
from cpr.qemu import cmdline as cl

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cpr.engines.base import Request
    from cpr.model import Guest, Host, Step, Target

KNOWN_NUMBERS = {"netdev", "nic", "net", "chardev", "add-fd", "object", "serial", "parallel", "qmp", "monitor", "mon"}
"""Options whose descriptor numbers are rewritten; `object` only for RAM."""


class Handover:
    """The engine of that name."""

    name = "handover"

    def findings(self, guest: Guest, host: Host, target: Target) -> Iterator[Finding]:
        yield from unknown_numbers(guest, self.name)
        yield from vnc_listeners(guest, target, self.name)

    def steps(self, guest: Guest, target: Target, request: Request) -> Sequence[Step]:
        new = successor(guest, target, request.run_id)
        discarding = tuple(b for b in guest.ram if b.discard_data)
        plan: list[Step] = [
            prepare.OpenMonitor(guest=guest),
            prepare.TakeDescriptors(guest=guest, inherited=new.inherited),
            prepare.OccupyMonitors(guest=guest, labels=new.monitors, control=new.control),
        ]
        if discarding:
            plan.append(prepare.KeepRamAtExit(blocks=discarding))
        plan.append(
            prepare.StartNew(guest=guest, target=target, successor=new, run_id=request.run_id),
        )
        if new.vnc:
            plan.append(switch.PassVncListeners(vnc=new.vnc))
        plan += [
            switch.PrepareStream(guest=guest),
            switch.CompareChains(guest=guest, new=True),
            switch.PassClients(guest=guest),
            switch.MoveState(guest=guest, blackout=True),
            switch.CompareChains(guest=guest, new=False, blackout=True),
            switch.MoveClients(guest=guest, blackout=True),
            switch.Continue(commit=True, blackout=True) if guest.running else switch.Decide(commit=True),
            after.EndOld(),
        ]
        if new.opened_again:
            plan.append(after.HandBack(commands=new.opened_again))
        plan += [after.Settle(guest=guest), after.Verify(guest=guest)]
        return plan


def unknown_numbers(guest: Guest, engine: str) -> Iterator[Finding]:
    """Descriptors that argv names where nobody knows how to pass them on."""
    line = base_command(guest)
    for number in cl.fd_numbers(line):
        option = line.options[number.index]
        if number.option in KNOWN_NUMBERS and (number.option != "object" or number.key == "mem-path"):
            continue
        yield Finding(
            check="fd-unknown",
            severity=Severity.BLOCKER,
            subject=f"fd {number.fd}",
            message=f"-{option.name} names descriptor {number.fd} ({number.key}): cpr does not know how to pass it on",
            hint="start the guest with a path instead of a number",
            engines=(engine,),
        )


def vnc_listeners(guest: Guest, target: Target, engine: str) -> Iterator[Finding]:
    """VNC servers whose listeners cannot be given to the new QEMU."""

    def blocker(check: str, message: str, hint: str) -> Finding:
        return Finding(
            check=check, severity=Severity.BLOCKER, subject="vnc", message=message, hint=hint, engines=(engine,)
        )

    if len([v for v in guest.vnc if any(w.number is not None for w in v.listeners)]) > 1:
        message = "several VNC servers listen, and QEMU can only be given the listener of the first"
        yield blocker("vnc-several", message, "start the guest with one VNC server")
    if any(v.listeners for v in guest.vnc) and "display-update" not in target.commands:
        message = "this new QEMU cannot be given a VNC listener (display-update came with 7.1)"
        yield blocker("vnc-listener", message, "go to QEMU 7.1 or newer")
