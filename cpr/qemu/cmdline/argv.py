"""A QEMU argv as a value: `CommandLine.parse(argv)` and back.

In scope: cutting argv into options and putting it together again, exactly. Out of scope: what the options mean
(`queries`), changing them (`edit`), and which of them a given QEMU knows (`cpr.qemu.options`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from cpr.qemu.cmdline.params import CommandLineError, Params, parse_params
from cpr.qemu.cmdline.table import ALIASES, SPECS, Notation, Spec

POSITIONAL = ""
"""The name of an argument without a dash: the image of the first hard disk."""


class UnknownOption(CommandLineError):
    """No QEMU from 6.0 on has the option `name`, so nobody can say whether an argument follows it."""

    def __init__(self, name: str) -> None:
        super().__init__(f"unknown QEMU option {name!r}")
        self.name = name


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its canonical name without dashes (`POSITIONAL` for a bare disk image) and its argument."""

    name: str
    value: str | None = None
    spelling: str = field(default="", compare=False)  # as it stood in argv: "--machine", "-M"

    def argv(self) -> tuple[str, ...]:
        """The words of argv this option stands for."""
        if self.name == POSITIONAL:
            return (self.value or "",)
        word = self.spelling or f"-{self.name}"
        return (word,) if self.value is None else (word, self.value)

    @property
    def spec(self) -> Spec:
        return SPECS[self.name]

    @property
    def params(self) -> Params:
        """The argument as parameters. A text argument (-kernel) or none at all gives empty ones."""
        if self.name == POSITIONAL or self.value is None or self.spec.notation in (Notation.NONE, Notation.TEXT):
            return Params()
        # KEYVAL, too, is read with flags: `-M q35,usb` was accepted before 6.1
        return parse_params(self.value, self.spec.implied)

    def with_params(self, params: Params) -> Option:
        return replace(self, value=params.render())


@dataclass(frozen=True, slots=True)
class CommandLine:
    """argv[0] and the options after it."""

    program: str
    options: tuple[Option, ...] = ()

    @classmethod
    def parse(cls, argv: Sequence[str]) -> CommandLine:
        """Raises UnknownOption, or CommandLineError where an argument is missing. `parse(a).argv() == a`."""
        if not argv:
            raise CommandLineError("an empty argv")
        return cls(argv[0], tuple(parse_options(argv[1:])))

    def argv(self) -> list[str]:
        return [self.program, *(word for option in self.options for word in option.argv())]

    def find(self, *names: str) -> Iterator[tuple[int, Option]]:
        """Every option of one of `names` with its index."""
        return ((index, option) for index, option in enumerate(self.options) if option.name in names)

    def last(self, *names: str) -> tuple[int, Option] | None:
        """The one that counts where QEMU lets the last win."""
        found = list(self.find(*names))
        return found[-1] if found else None

    def has(self, *names: str) -> bool:
        return any(True for _ in self.find(*names))

    # -- building blocks of edits

    def with_options(self, options: Iterable[Option]) -> CommandLine:
        return replace(self, options=tuple(options))

    def replaced(self, index: int, *options: Option) -> CommandLine:
        """The option at `index` replaced by `options` (none: removed)."""
        return replace(self, options=(*self.options[:index], *options, *self.options[index + 1 :]))

    def appended(self, *options: Option) -> CommandLine:
        return replace(self, options=(*self.options, *options))

    def mapped(self, change: Callable[[Option], Option | Iterable[Option]]) -> CommandLine:
        """Every option put through `change`, which gives one option or several or none."""
        result: list[Option] = []
        for option in self.options:
            changed = change(option)
            result.extend([changed] if isinstance(changed, Option) else changed)
        return self.with_options(result)


def canonical_name(word: str) -> str:
    """`-M`, `--machine` -> `machine`. One or two dashes are the same to QEMU (system/vl.c lookup_opt)."""
    name = word.removeprefix("-").removeprefix("-")
    return ALIASES.get(name, name)


def parse_options(words: Iterable[str]) -> Iterator[Option]:
    """The options of an argv without its argv[0]."""
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            yield Option(POSITIONAL, word)
            continue
        name = canonical_name(word)
        spec = SPECS.get(name)
        if spec is None:
            raise UnknownOption(word)
        if not spec.takes_argument:
            yield Option(name, None, word)
            continue
        try:
            yield Option(name, next(rest), word)
        except StopIteration:
            raise CommandLineError(f"{word} needs an argument") from None
