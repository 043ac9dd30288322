"""-readconfig FILE written out as ordinary options.

In scope: the file's grammar, its groups as options in the place of -readconfig, and the defaults QEMU would have kept
although the file names a netdev or a monitor. Out of scope: QEMU's own configuration in its data directory (upstream
has had none since 6.0; -no-user-config). Reading the file is the caller's: `inline_readconfig` is given a function.

Sources: util/qemu-config.c (qemu_config_foreach), system/vl.c (qemu_parse_config_group).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cpr.qemu.cmdline.argv import CommandLine, Option
from cpr.qemu.cmdline.params import CommandLineError, Form, Item, Params
from cpr.qemu.cmdline.table import SPECS

_WITH_ID = re.compile(r'\[([^\s"\]]{1,63}) "([^"]{1,63})"\]')
_WITHOUT_ID = re.compile(r"\[([^\]]{1,63})\]")
_PAIR = re.compile(r'\s*(\S{1,63})\s*=\s*"([^"]*)"')

_OPTIONS = {
    "acpi": "acpitable",
    "boot-opts": "boot",
    "memory": "m",
    "smp-opts": "smp",
}
"""Groups whose option has another name."""

_REMOVES_DEFAULT_NET = frozenset({"netdev", "nic", "net"})
_REMOVES_DEFAULT_MONITOR = frozenset({"monitor", "qmp", "qmp-pretty", "mon"})


@dataclass(frozen=True, slots=True)
class Group:
    """`[name "id"]` and the pairs below it."""

    name: str
    id: str | None
    pairs: tuple[tuple[str, str], ...]


def parse_config(text: str) -> list[Group]:
    """The groups of a configuration file in order. Raises CommandLineError naming the line."""
    groups: list[Group] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            if found := _WITH_ID.match(line):
                groups.append(Group(found[1], found[2], ()))
                continue
            if found := _WITHOUT_ID.match(line):
                groups.append(Group(found[1], None, ()))
                continue
        pair = _PAIR.match(line)
        if pair is None or not groups:
            raise CommandLineError(f"line {number} of a -readconfig file: {line!r}")
        last = groups[-1]
        # a dictionary: a key said twice keeps its place and has the later value
        groups[-1] = Group(last.name, last.id, tuple({**dict(last.pairs), pair[1]: pair[2]}.items()))
    return groups


def inline_readconfig(cmdline: CommandLine, read: Callable[[str], str]) -> CommandLine:
    """Every -readconfig replaced, where it stood, by the options its file amounts to. `read(path)` gives the text."""
    configured: list[Option] = []

    def inline(option: Option) -> Option | list[Option]:
        if option.name != "readconfig":
            return option
        options = [group_option(group) for group in parse_config(read(option.value or ""))]
        configured.extend(options)
        return options

    return cmdline.mapped(inline).appended(*_kept_defaults(cmdline, configured))


def group_option(group: Group) -> Option:
    """The option a group amounts to: `[chardev "con"]` -> `-chardev ...,id=con`."""
    if group.name == "global":
        pairs = dict(group.pairs)
        return Option("global", _items(("driver", "property", "value"), pairs))
    name = _OPTIONS.get(group.name, group.name)
    spec = SPECS.get(name)
    if spec is None or not spec.takes_argument:
        raise CommandLineError(f"a -readconfig file has a group [{group.name}] that is no option")
    pairs = dict(group.pairs)
    items: list[Item] = []
    implied = spec.implied
    first = pairs.pop(implied, None) if implied is not None else None
    if implied is not None and first is not None:
        # a bare first item must not look like a pair or a flag of its own
        items.append(Item(implied, first, Form.PAIR if not first or "=" in first else Form.IMPLIED))
    if group.id is not None:
        items.append(Item("id", group.id))
    items += [Item(key, value) for key, value in pairs.items()]
    return Option(name, Params(tuple(items)).render())


def _items(order: tuple[str, ...], pairs: dict[str, str]) -> str:
    return Params(tuple(Item(key, pairs[key]) for key in order if key in pairs)).render()


def _kept_defaults(cmdline: CommandLine, configured: list[Option]) -> Iterator[Option]:
    """-netdev and -mon on the command line take QEMU's default NIC and monitor away; in a file they do not."""
    names = {option.name for option in configured}
    if cmdline.has("nodefaults"):
        return
    if names & _REMOVES_DEFAULT_NET and not cmdline.has(*_REMOVES_DEFAULT_NET) and "net" not in names:
        yield Option("net", "nic")
        yield Option("net", "user")
    monitors = cmdline.has(*_REMOVES_DEFAULT_MONITOR)
    if "mon" in names and not monitors and not _monitor_on_port(cmdline):
        if cmdline.has("nographic") and not cmdline.has("serial"):
            yield Option("serial", "mon:stdio")
        else:
            yield Option("monitor", "stdio" if cmdline.has("nographic") else "vc:80Cx24C")


def _monitor_on_port(cmdline: CommandLine) -> bool:
    return any((option.value or "").startswith("mon:") for _, option in cmdline.find("serial", "parallel"))
