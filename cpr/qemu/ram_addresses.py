"""Where QEMU has mapped the guest's RAM blocks, in its own words (HMP).

The one certain way to tell which of several mappings of the same size and name is which block.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cpr.qemu.answers import Answers

    Names = Mapping[str, tuple[str, ...]]
    """The names that QEMU may call a block by, by its id."""


def host_addresses(answers: Answers, wanted: Names) -> dict[str, int]:
    """Host virtual address by backend id, as far as QEMU tells: `info ramblock` has it from 8.1 on."""
    table = parse_ramblocks(answers.human("info ramblock"))
    return {id: table[name] for id, names in wanted.items() for name in names if name in table}


def parse_ramblocks(printed: str) -> dict[str, int]:
    """Host address by RAM block name, where the table has a column HVA."""
    lines = printed.splitlines()
    if not lines or "HVA" not in lines[0].split():
        return {}
    found = {}
    for line in lines[1:]:
        # name, page size and its unit, offset, used, total, HVA, [ro/rw]
        match = re.match(r"\s*(.+?)\s+\d+ \S+\s+0x\w+\s+0x\w+\s+0x\w+\s+0x(\w+)", line)
        if match:
            found[match[1]] = int(match[2], 16)
    return found


def addresses_by_probing(answers: Answers, wanted: Names) -> dict[str, int]:
    """Host virtual address of each backend's first byte, by asking for one that the guest sees (before QEMU 8.1)."""
    views = parse_flat_views(answers.human("info mtree -f"))
    found: dict[str, int] = {}
    for id, names in wanted.items():
        for name in names:
            if name in views and id not in found:
                guest_address, offset = views[name]
                printed = answers.human(f"gpa2hva 0x{guest_address:x}")
                match = re.search(r"Host virtual address for 0x\w+ \((.+)\) is 0x(\w+)", printed)
                if match and match[1] == name:
                    found[id] = int(match[2], 16) - offset
    return found


def parse_flat_views(printed: str) -> dict[str, tuple[int, int]]:
    """(guest physical address, offset in the block) of one range of each RAM region, in the address space `memory`."""
    found: dict[str, tuple[int, int]] = {}
    memory = False
    for line in printed.splitlines():
        if line.startswith("FlatView"):
            memory = False
        elif line.strip().startswith('AS "memory"'):
            memory = True
        match = re.match(r"\s+([0-9a-f]{16})-[0-9a-f]{16} \(prio -?\d+, (?:nv-)?ram\): (\S+)(?: @([0-9a-f]+))?", line)
        if memory and match:
            found.setdefault(match[2], (int(match[1], 16), int(match[3] or "0", 16)))
    return found
