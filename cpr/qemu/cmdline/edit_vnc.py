"""Edits of displays: VNC servers that listen nowhere until they are given a listener, or where they are told to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from cpr.qemu.cmdline.argv import CommandLine, Option
from cpr.qemu.cmdline.facts import Vnc
from cpr.qemu.cmdline.params import CommandLineError, Form, Item
from cpr.qemu.cmdline.query_io import displays


def with_vnc_detached(cmdline: CommandLine, but: Collection[str] = ()) -> tuple[CommandLine, tuple[Vnc, ...]]:
    """Every VNC server started as `-vnc none` with its own id and parameters, and what they listened on; `but` are ids
    of those that are left as they are.

    The listener comes later by QMP `display-update` with an address of type fd. With `none` QEMU still checks the
    other parameters (tls-creds, password-secret, audiodev) and opens nothing, websocket included. `to` goes: it has
    no meaning beside a descriptor.
    """
    taken: list[Vnc] = []
    for display in displays(cmdline):
        if display.vnc is None or display.vnc.id in but:
            continue
        taken.append(display.vnc)
        params = display.params.without("vnc", "to")
        params = replace(params, items=(Item("vnc", "none", Form.IMPLIED), *params.items))
        spelling = cmdline.options[display.index].spelling if display.option == "vnc" else ""
        cmdline = cmdline.replaced(display.index, Option("vnc", params.render(), spelling))
    return cmdline, tuple(taken)


def with_spice_deaf(cmdline: CommandLine) -> CommandLine:
    """SPICE on, as its devices want it, and listening nowhere: without a port it waits to be given clients."""
    return cmdline.mapped(lambda o: Option("spice", "disable-ticketing=on", o.spelling) if o.name == "spice" else o)


def with_vnc_addresses(cmdline: CommandLine, vnc_id: str, addresses: Sequence[str]) -> CommandLine:
    """The VNC server `vnc_id` made to listen at `addresses` (`127.0.0.1:1`, `unix:/run/vnc`) and nowhere else.

    Raises `CommandLineError` where there is no such server.
    """
    for display in displays(cmdline):
        if display.vnc is None or display.vnc.id != vnc_id:
            continue
        kept = display.params.without("vnc", "to")
        first = Item("vnc", addresses[0], Form.IMPLIED)
        params = replace(kept, items=(first, *(Item("vnc", text) for text in addresses[1:]), *kept.items))
        spelling = cmdline.options[display.index].spelling if display.option == "vnc" else ""
        return cmdline.replaced(display.index, Option("vnc", params.render(), spelling))
    raise CommandLineError(f"no VNC server {vnc_id!r} in the command line")
