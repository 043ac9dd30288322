"""Options renamed or removed between QEMU versions, translated by asking the new binary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpr.qemu.cmdline.argv import CommandLine


@dataclass(frozen=True, slots=True)
class OptionKnowledge:
    """What one binary knows: its options, and the parameters of option groups (None: the group was not answered)."""

    options: frozenset[str]
    groups: Mapping[str, frozenset[str]]

    def option(self, name: str) -> bool:
        raise NotImplementedError

    def parameter(self, group: str, name: str) -> bool | None:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Translation:
    """The command line as the new binary takes it, what was changed in words, and what it will refuse."""

    cmdline: CommandLine
    changes: tuple[str, ...]
    unknown: tuple[str, ...]


def knowledge_from(help_text: str, query_command_line_options: list[dict[str, Any]]) -> OptionKnowledge:
    """From the output of `-help` and the answer of QMP `query-command-line-options`."""
    raise NotImplementedError


def translate(cmdline: CommandLine, knows: OptionKnowledge) -> Translation:
    raise NotImplementedError
