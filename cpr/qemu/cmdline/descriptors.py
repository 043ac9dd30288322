"""Bare descriptor numbers in argv: where they stand, and how to renumber them.

A number in argv stays valid over exec, and in a new process that inherited the descriptor under the same number. In
scope: every place where QEMU takes a number as an inherited descriptor. Out of scope: `/dev/fdset/N` (a set, not a
descriptor), names given by `getfd`, and what the present number of an -add-fd is (QEMU closed the one in argv).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from cpr.qemu.cmdline.argv import CommandLine, Option
from cpr.qemu.cmdline.facts import FdNumber
from cpr.qemu.cmdline.params import Item, Params, parse_json
from cpr.qemu.cmdline.table import Notation

_PATH = re.compile(r"(?P<head>(?:file:)?/(?:proc/self|dev)/fd/)(?P<fd>\d+)(?P<tail>(?:,.*)?)")
_INCOMING = re.compile(r"(?P<head>fd:)(?P<fd>\d+)(?P<tail>)")

_KEYS: dict[str, frozenset[str]] = {
    "add-fd": frozenset({"fd"}),
    "chardev": frozenset({"fd"}),
    "device": frozenset({"fd", "vhostfd", "vhostfds"}),  # vfio-pci, vhost-scsi, vhost-vsock
    "fsdev": frozenset({"sock_fd"}),
    "virtfs": frozenset({"sock_fd"}),
    "net": frozenset({"fd", "fds", "vhostfd", "vhostfds", "sock-fds"}),
    "netdev": frozenset({"fd", "fds", "vhostfd", "vhostfds", "sock-fds"}),
    "nic": frozenset({"fd", "fds", "vhostfd", "vhostfds", "sock-fds"}),
    "object": frozenset({"fd"}),  # iommufd
}
_SOCKET_ADDRESS_IN = frozenset({"netdev", "blockdev", "drive", "object", "incoming"})  # {"type": "fd", "str": "7"}

Renumber = Callable[[int, str], int]


def fd_numbers(cmdline: CommandLine) -> tuple[FdNumber, ...]:
    """Every place in argv where a bare descriptor number stands."""
    found: list[FdNumber] = []
    for index, option in enumerate(cmdline.options):

        def note(fd: int, key: str, index: int = index, option: Option = option) -> int:
            found.append(FdNumber(fd=fd, index=index, option=option.name, key=key))
            return fd

        _renumbered(option, note)
    return tuple(found)


def with_fd_number(cmdline: CommandLine, old: int, new: int) -> CommandLine:
    """Every mention of descriptor `old` made `new`."""
    return with_fd_numbers(cmdline, {old: new})


def with_fd_numbers(cmdline: CommandLine, numbers: Mapping[int, int]) -> CommandLine:
    """All at once, so that two descriptors may change places."""
    return cmdline.mapped(lambda option: _renumbered(option, lambda fd, _key: numbers.get(fd, fd)))


def _renumbered(option: Option, change: Renumber) -> Option:
    if option.value is None:
        return option
    text = option.value
    if option.name == "incoming" and (found := _INCOMING.fullmatch(text)):
        return replace(option, value=_exchange(found, change))
    if found := _PATH.fullmatch(text):
        return replace(option, value=_exchange(found, change))
    if option.name == "incoming" and text.startswith("{"):
        return _changed(option, parse_json(text), change)
    if option.name == "" or option.spec.notation in (Notation.NONE, Notation.TEXT):
        return option
    return _changed(option, option.params, change)


def _changed(option: Option, before: Params, change: Renumber) -> Option:
    keys = _KEYS.get(option.name, frozenset())
    addresses = option.name in _SOCKET_ADDRESS_IN
    if before.json is not None:
        after = replace(before, json=_walk(before.json, "", keys, addresses, change))
    else:
        after = replace(before, items=tuple(_item(i, before, keys, addresses, change) for i in before.items))
    return option if after == before else option.with_params(after)


def _item(item: Item, params: Params, keys: frozenset[str], addresses: bool, change: Renumber) -> Item:
    head, _, last = item.key.rpartition(".")
    of_socket = addresses and last == "str" and params.get(f"{head}.type" if head else "type") == "fd"
    return replace(item, value=_value(item.value, item.key, item.key in keys or of_socket, change))


def _walk(node: Any, key: str, keys: frozenset[str], addresses: bool, change: Renumber) -> Any:
    if isinstance(node, dict):
        of_socket = addresses and node.get("type") == "fd"
        deeper = keys | {"str"} if of_socket else keys
        return {name: _walk(value, name, deeper, addresses, change) for name, value in node.items()}
    if isinstance(node, list):
        return [_walk(value, key, keys, addresses, change) for value in node]
    if isinstance(node, bool) or not isinstance(node, (str, int)):
        return node
    changed = _value(str(node), key, key in keys, change)
    return int(changed) if isinstance(node, int) else changed


def _value(text: str, key: str, is_fd: bool, change: Renumber) -> str:
    if found := _PATH.fullmatch(text):
        return _exchange(found, change, key)
    if not is_fd:
        return text
    return ":".join(str(change(int(part), key)) if part.isdigit() else part for part in text.split(":"))


def _exchange(found: re.Match[str], change: Renumber, key: str = "") -> str:
    return f"{found['head']}{change(int(found['fd']), key)}{found['tail']}"
