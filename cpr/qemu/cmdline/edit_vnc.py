"""Edits of displays: VNC servers that listen nowhere until they are given a listener."""

from __future__ import annotations

from dataclasses import replace

from cpr.qemu.cmdline.argv import CommandLine, Option
from cpr.qemu.cmdline.facts import Vnc
from cpr.qemu.cmdline.params import Form, Item
from cpr.qemu.cmdline.query_io import displays


def with_vnc_detached(cmdline: CommandLine) -> tuple[CommandLine, tuple[Vnc, ...]]:
    """Every VNC server started as `-vnc none` with its own id and parameters, and what they listened on.

    The listener comes later by QMP `display-update` with an address of type fd. With `none` QEMU still checks the
    other parameters (tls-creds, password-secret, audiodev) and opens nothing, websocket included. `to` goes: it has
    no meaning beside a descriptor.
    """
    taken: list[Vnc] = []
    for display in displays(cmdline):
        if display.vnc is None:
            continue
        taken.append(display.vnc)
        params = display.params.without("vnc", "to")
        params = replace(params, items=(Item("vnc", "none", Form.IMPLIED), *params.items))
        spelling = cmdline.options[display.index].spelling if display.option == "vnc" else ""
        cmdline = cmdline.replaced(display.index, Option("vnc", params.render(), spelling))
    return cmdline, tuple(taken)
