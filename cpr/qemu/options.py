"""Options renamed or removed between QEMU versions, translated by asking the new binary.

In scope: what changed on the command line between 6.0 and 11.1, in both directions (the table is `cmdline.renamed`),
and what the binary will refuse of the rest. Out of scope: machine types, CPU models, device models and their properties
(asked over QMP).

Nothing is decided by a version number: a row acts when the binary says that it does not know the old word.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpr.qemu.cmdline.argv import CommandLine, Option
from cpr.qemu.cmdline.knowledge import OptionKnowledge, knowledge_from, unknown_to
from cpr.qemu.cmdline.renamed import ROWS

__all__ = ["OptionKnowledge", "Translation", "knowledge_from", "translate", "unknown_to"]


@dataclass(frozen=True, slots=True)
class Translation:
    """The command line as the new binary takes it, what was changed in words, and what it will refuse."""

    cmdline: CommandLine
    changes: tuple[str, ...]
    unknown: tuple[str, ...]


def translate(cmdline: CommandLine, knows: OptionKnowledge) -> Translation:
    """Every row of the table applied to every option, until none has more to say; then what is left unknown."""
    done: list[Option] = []
    changes: list[str] = []
    waiting = list(reversed(cmdline.options))
    while waiting:
        option = waiting.pop()
        if option.name == "audiodev" and option in done:
            continue  # several rows may ask for the same one
        for row in ROWS:
            change = row(option, cmdline, knows)
            if change is not None and change.options != (option,):
                changes.append(change.words)
                waiting.extend(reversed(change.options))
                break
        else:
            done.append(option)
    result = cmdline.with_options(done)
    return Translation(result, tuple(dict.fromkeys(changes)), tuple(unknown_to(result, knows)))
