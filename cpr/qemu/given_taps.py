"""Taps as the guest was given them: how each was made (name, script, helper) before an update put descriptors there.

In argv an update leaves numbers, which say nothing after a boot. So it notes the -netdev as it was in the environment
of the new QEMU, and every later one passes the note on. Pure.

Out of scope: -nic and -net, which have no id to be known by.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from cpr.qemu import cmdline as cl

if TYPE_CHECKING:
    from collections.abc import Iterable

NOTE = "CPR_NETDEVS"
"""Variable: a JSON object of the -netdev options by id."""
KINDS = ("tap", "bridge")


def taps_as_given(line: cl.CommandLine, environ: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The -netdev of every tap that was not given by number, by id: from the command line, or as noted.

    A note is believed only of a tap that is there by number, and only if it could have stood in its place.
    """
    noted = _noted(dict(environ).get(NOTE, ""))
    found = {}
    for netdev in cl.netdevs(line):
        if netdev.option != "netdev" or netdev.type not in KINDS or not netdev.id:
            continue
        if not netdev.fds:
            found[netdev.id] = line.options[netdev.index].value or ""
        elif netdev.id in noted and _could_stand_for(netdev.id, noted[netdev.id]):
            found[netdev.id] = noted[netdev.id]
    return found


def note(given: dict[str, str]) -> str:
    """The value of `NOTE`; "" where there is nothing to note."""
    return json.dumps(given) if given else ""


def _noted(text: str) -> dict[str, str]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    if not isinstance(value, dict):
        return {}
    return {id: option for id, option in value.items() if isinstance(option, str)}


def _could_stand_for(id: str, option: str) -> bool:
    try:
        (netdev,) = cl.netdevs(cl.CommandLine("qemu", (cl.Option("netdev", option),)))
    except (cl.CommandLineError, ValueError):
        return False
    return netdev.id == id and netdev.type in KINDS and not netdev.fds and not netdev.vhostfds
