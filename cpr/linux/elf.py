"""What an ELF program says of itself: for which machine, by which loader, which build.

Out of scope: symbols, sections and what the program does.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpr.linux.fds import Fd


class NotElf(ValueError):
    """The file is no ELF program, or cut short; the message says what it is instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ElfFacts:
    """`machine` is e_machine (EM_X86_64 = 62), `type` e_type (ET_EXEC 2, ET_DYN 3), `bits` 32 or 64."""

    bits: int
    little_endian: bool
    machine: int
    type: int
    interpreter: str | None
    build_id: str | None
    """NT_GNU_BUILD_ID as hex."""

    @property
    def machine_name(self) -> str:
        raise NotImplementedError


def elf_facts(file: str | int | Fd) -> ElfFacts:
    """Read them. Raises NotElf; OSError where it cannot be read."""
    raise NotImplementedError


def host_machine() -> int:
    """e_machine of this host's own programs."""
    raise NotImplementedError
