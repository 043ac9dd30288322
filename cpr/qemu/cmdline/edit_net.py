"""Edits of the network: taps by inherited descriptors or by name, null back ends, forwardings away and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cpr.qemu.cmdline.argv import CommandLine
from cpr.qemu.cmdline.facts import Hostfwd, Netdev
from cpr.qemu.cmdline.params import CommandLineError, Item, Params
from cpr.qemu.cmdline.queries import devices
from cpr.qemu.cmdline.query_io import netdevs

# with fd= or fds= QEMU refuses every one of these (net/tap.c net_init_tap)
_MADE_BY_QEMU = ("ifname", "script", "downscript", "helper", "br", "queues", "vnet_hdr")
_DESCRIPTORS = ("fd", "fds", "vhostfd", "vhostfds")
_OF_NIC = frozenset({"id", "model", "mac", "macaddr", "netdev", "addr", "vectors", "name"})
_FIRST_HUB = 7000  # hubs of a rehearsal, one for each netdev so that guests' ports do not meet


def find_netdev(cmdline: CommandLine, which: str | int) -> Netdev:
    """By id, or by the index of its option."""
    for found in netdevs(cmdline):
        if which in (found.id, found.index) and not isinstance(which, bool):
            return found
    raise CommandLineError(f"no network back end {which!r} in the command line")


def with_netdev_fds(
    cmdline: CommandLine, which: str | int, fds: Sequence[int], vhostfds: Sequence[int] = ()
) -> CommandLine:
    """A tap or bridge given its queues (and their /dev/vhost-net) by number; -netdev, -nic and -net alike.

    What was said of how to make and configure the tap goes, for it exists; `vhost=on` without `vhostfds` stays, and
    QEMU opens /dev/vhost-net anew.

    Of several queues QEMU detaches at its start all but the first (TUNSETQUEUE), and aborts ("could not disable
    queue", 7.2 to 11.1) where one is detached already, as it is when the guest does not use it: the caller attaches
    them before, and after a new QEMU that failed, for it has detached those of the old one.
    """
    found = find_netdev(cmdline, which)
    if found.type not in ("tap", "bridge"):
        raise CommandLineError(f"network back end {which!r} is no tap but {found.type}")
    if not fds or (vhostfds and len(vhostfds) != len(fds)):
        raise CommandLineError(f"network back end {which!r}: {len(fds)} queues, {len(vhostfds)} vhost descriptors")
    params = found.params.without(*_MADE_BY_QEMU, *_DESCRIPTORS).with_({"type": "tap"})
    params = _with_numbers(params, "fd", fds)
    if vhostfds:
        params = _with_numbers(params, "vhostfd", vhostfds)
    option = cmdline.options[found.index]
    return cmdline.replaced(found.index, option.with_params(params))


def with_netdev_name(
    cmdline: CommandLine, which: str | int, ifname: str, *, queues: int = 1, vhost: bool = False
) -> CommandLine:
    """A tap that is there already, opened by its name: no script is run, as somebody else has set it up."""
    found = find_netdev(cmdline, which)
    params = found.params.without(*_MADE_BY_QEMU, *_DESCRIPTORS, "vhost")
    params = params.with_({"type": "tap", "ifname": ifname, "script": "no", "downscript": "no"})
    if queues > 1:
        params = params.with_({"queues": str(queues)})
    if vhost:
        params = params.with_({"vhost": True})
    return cmdline.replaced(found.index, cmdline.options[found.index].with_params(params))


def with_netdev_null(cmdline: CommandLine, which: str | int, fds: Sequence[int] = ()) -> CommandLine:
    """Nothing outside behind the NIC: the port of a hub of its own, or throw-away taps where `fds` are given.

    A user network stays one, restricted and without forwardings: its state is part of the guest's (section `slirp`),
    and it does nothing while the guest does not run. A hub port is one queue without a virtio header. A NIC starts on
    it whatever its options, but QEMU refuses to load the state of one that used more queues, or offloads, over it: for
    that give taps made in a network namespace of their own, as many as there were queues.
    """
    found = find_netdev(cmdline, which)
    option = cmdline.options[found.index]
    if fds:
        tap = Params.of(("type", "tap"), **{key: found.params.get(key) for key in _kept(found)})
        return cmdline.replaced(found.index, option.with_params(_with_numbers(tap, "fd", fds)))
    if found.type == "user":
        user = found.params.without("hostfwd", "smb", "smbserver", "tftp", "bootfile").with_({"restrict": True})
        return cmdline.replaced(found.index, option.with_params(user))
    if found.option == "net":  # it hangs on hub 0 with the -net nic: nothing there is null enough
        return cmdline.replaced(found.index)
    pairs = {"hubid": str(_FIRST_HUB + found.index), **{key: found.params.get(key) for key in _kept(found)}}
    hub = Params.of(("type", "hubport"), **pairs)
    return cmdline.replaced(found.index, option.with_params(hub))


def without_hostfwd(cmdline: CommandLine) -> tuple[CommandLine, tuple[Hostfwd, ...]]:
    """No forwarded host ports: two QEMUs cannot listen on one. `Hostfwd.hmp()` hands each back later."""
    taken: list[Hostfwd] = []
    for found in netdevs(cmdline):
        if found.type != "user" or not found.hostfwd:
            continue
        taken += [Hostfwd(netdev=found.id, rule=rule, index=found.index) for rule in found.hostfwd]
        option = cmdline.options[found.index]
        cmdline = cmdline.replaced(found.index, option.with_params(found.params.without("hostfwd")))
    return cmdline, tuple(taken)


def with_hostfwd(cmdline: CommandLine, which: str | int, rules: Sequence[str]) -> CommandLine:
    """A user network that forwards these host ports, and no others."""
    found = find_netdev(cmdline, which)
    option, params = cmdline.options[found.index], found.params.without("hostfwd")
    if params.json is not None:
        params = replace(params, json={**params.json, "hostfwd": [{"str": rule} for rule in rules]})
    else:
        params = replace(params, items=(*params.items, *(Item("hostfwd", rule) for rule in rules)))
    return cmdline.replaced(found.index, option.with_params(params))


def queues_of(cmdline: CommandLine, which: str | int) -> int:
    """How many queues the back end has: its descriptors, else queues=, else one."""
    found = find_netdev(cmdline, which)
    return len(found.fds) or found.queues or 1


def multiqueue(cmdline: CommandLine, netdev_id: str) -> bool:
    """Whether the NIC on `netdev_id` has mq=on."""
    return any(d.params.get("netdev") == netdev_id and d.params.flag("mq") for d in devices(cmdline))


def _kept(found: Netdev) -> list[str]:
    keys = _OF_NIC if found.option == "nic" else {"id"}
    return [key for key in found.params.names() if key in keys]


def _with_numbers(params: Params, key: str, numbers: Sequence[int]) -> Params:
    """`fd=7`, or `fds=7:8`."""
    many = len(numbers) > 1
    return params.with_({key + "s" if many else key: ":".join(str(number) for number in numbers)})
