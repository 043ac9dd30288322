"""What one binary knows of options and their parameters, as far as it was asked. No version numbers.

In scope: reading its answers, and finding what it will refuse. Out of scope: asking it (`-help`, and QMP
`query-command-line-options`), and what to say instead (`renamed`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cpr.qemu.cmdline.argv import POSITIONAL, CommandLine, Option

_HELP_LINE = re.compile(r"^-(?P<first>-?[A-Za-z][\w-]*)(?:(?: or |/)-(?P<second>[\w-]+))?")
_NEVER_IN_HELP = frozenset({"M", "machine", "g", "help", "prom-env", "qtest", "qtest-log", "semihosting"})
"""Options without a help text (qemu-options.hx of 7.2 and 10.0), or only told of for some targets."""

_GROUPS = {
    "action": "action",
    "add-fd": "add-fd",
    "boot": "boot-opts",
    "chardev": "chardev",
    "m": "memory",
    "mon": "mon",
    "msg": "msg",
    "name": "name",
    "overcommit": "overcommit",
    "rtc": "rtc",
    "run-with": "run-with",
    "sandbox": "sandbox",
    "smp": "smp-opts",
    "spice": "spice",
    "vnc": "vnc",
}
"""Options whose parameters `query-command-line-options` lists in full. -drive's and -machine's it does not."""


@dataclass(frozen=True, slots=True)
class OptionKnowledge:
    """What one binary knows: its options, and the parameters of its option groups.

    As far as somebody asked: `types` has its QOM types (QMP `qom-list-types`), and `devices` the property names of
    device models (QMP `device-list-properties`).
    """

    options: frozenset[str]
    groups: Mapping[str, frozenset[str]]
    types: frozenset[str] = frozenset()
    devices: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def option(self, name: str) -> bool:
        """Whether it has the option, named without dashes."""
        return name in self.options or name in _NEVER_IN_HELP or name == POSITIONAL

    def parameter(self, group: str, name: str) -> bool | None:
        """Whether group (`chardev`, `run-with`) has the parameter; None if the binary did not say."""
        known = self.groups.get(group)
        return name in known if known else None

    def type(self, name: str) -> bool | None:
        """Whether it has the QOM type; None if it was not asked."""
        return name in self.types if self.types else None

    def device_property(self, driver: str, name: str) -> bool | None:
        known = self.devices.get(driver)
        return name in known if known else None


def knowledge_from(
    help_text: str,
    query_command_line_options: Sequence[Mapping[str, Any]],
    *,
    types: Iterable[str] = (),
    devices: Mapping[str, frozenset[str]] | None = None,
) -> OptionKnowledge:
    """From the output of `-help` and what QMP `query-command-line-options` returned, and more if it was asked for."""
    options: set[str] = set()
    for line in help_text.splitlines():
        if found := _HELP_LINE.match(line):
            options |= {name.removeprefix("-") for name in found.groups() if name}
    groups = {
        entry["option"]: frozenset(parameter["name"] for parameter in entry["parameters"])
        for entry in query_command_line_options
    }
    return OptionKnowledge(frozenset(options), groups, frozenset(types), devices or {})


@dataclass(frozen=True, slots=True)
class Change:
    """What a row makes of one option: other options in its place (none: it is dropped), and why, in words."""

    options: tuple[Option, ...]
    words: str


Row = Callable[[Option, CommandLine, OptionKnowledge], Change | None]
"""A row of the table: None where it has nothing to say about this option and this binary."""


def unknown_to(cmdline: CommandLine, knows: OptionKnowledge) -> list[str]:
    """What the binary will refuse: `-option`, or `-option parameter` of a group it listed in full."""
    refused: list[str] = []
    for option in cmdline.options:
        if not knows.option(option.name):
            refused.append(f"-{option.name}")
            continue
        if option.name == "object" and knows.type(option.params.get("qom-type") or "") is False:
            refused.append(f"-object {option.params.get('qom-type')}")
        group = _GROUPS.get(option.name)
        if group is not None:
            refused += [
                f"-{option.name} {name}"
                for name in option.params.names()
                if name != "id" and knows.parameter(group, name) is False
            ]
    return list(dict.fromkeys(refused))
