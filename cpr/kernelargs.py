"""A Linux kernel command line as text: its words, and the memory that `memmap=` of it leaves to persistent memory.

Pure functions, from what the kernel itself does: lib/cmdline.c (next_arg, memparse), kernel/params.c (parse_args),
arch/x86/kernel/e820.c (parse_memmap_one).

Out of scope: reading /proc/cmdline, and choosing words (linux/kexec.py).
"""

from __future__ import annotations

import re

_MEMPARSE = re.compile(r"(0[xX][0-9a-fA-F]+|[0-9]+)([kKmMgGtTpPeE]?)")
_SHIFT = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_NUMBERS = 1 << 64


def words(command_line: str) -> tuple[str, ...]:
    """Its words as they stand. White space within double quotes separates none (next_arg)."""
    found, current, quoted = [], "", False
    for letter in command_line:
        if letter == '"':
            quoted = not quoted
        if letter.isspace() and not quoted:
            if current:
                found.append(current)
            current = ""
        else:
            current += letter
    return (*found, current) if current else tuple(found)


def arguments(command_line: str) -> tuple[tuple[str, str], ...]:
    """(name, value) of the words that are the kernel's own, which are those before a lone `--`; quotes are removed."""
    found = []
    for word in words(command_line):
        if word == "--":
            break
        bare = word[1:-1] if word.startswith('"') and word.endswith('"') and len(word) > 1 else word
        name, _, value = bare.partition("=")
        if value.startswith('"'):
            value = value[1:].removesuffix('"')
        found.append((name, value))
    return tuple(found)


def memparse(text: str) -> tuple[int, str]:
    """(number, rest) of `768M!1G`: decimal, 0x hexadecimal or 0 octal, with a suffix K to E.

    Raises:
        ValueError: it does not begin with a number.
    """
    match = _MEMPARSE.match(text)
    if match is None:
        raise ValueError(f"not a number: {text[:40]!r}")
    digits, suffix = match.groups()
    rest = text[match.end() :]
    if digits[0] == "0" and digits[1:2] not in ("x", "X"):
        octal = re.match("[0-7]*", digits)
        used = octal[0] if octal else ""
        if used != digits:
            return int(used, 8), digits[len(used) :] + suffix + rest
        value = int(digits, 8)
    else:
        value = int(digits, 0)
    return (value << _SHIFT[suffix.lower()]) % _NUMBERS, rest


def persistent_ranges(command_line: str) -> tuple[tuple[int, int], ...]:
    """(start, size) in bytes of the physical memory that `memmap=nn!ss` makes persistent memory, as the kernel sees it.

    Every `memmap=` counts, and every part of a list with commas; ranges that touch are one (e820__update_table);
    `memmap=exactmap` forgets those before it. Parts that the kernel would not understand are left out.
    """
    ranges: list[tuple[int, int]] = []
    for name, value in arguments(command_line):
        if name != "memmap":
            continue
        for part in value.split(","):
            if part.startswith("exactmap"):
                ranges.clear()
                continue
            try:
                size, rest = memparse(part)
                if rest.startswith("!") and size:
                    ranges.append((memparse(rest[1:])[0], size))
            except ValueError:
                continue
    return _joined(ranges)


def _joined(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    joined: list[tuple[int, int]] = []
    for start, size in sorted(ranges):
        if joined and start <= joined[-1][0] + joined[-1][1]:
            first, length = joined[-1]
            joined[-1] = (first, max(length, start + size - first))
        else:
            joined.append((start, size))
    return tuple(joined)


def memmap_word(start: int, size: int) -> str:
    """The word that makes this range persistent memory: `memmap=768M!1G`."""
    return f"memmap={_short(size)}!{_short(start)}"


def _short(number: int) -> str:
    for suffix in "GMK":
        unit = 1 << _SHIFT[suffix.lower()]
        if number and number % unit == 0:
            return f"{number // unit}{suffix}"
    return hex(number)
