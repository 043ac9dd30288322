"""A Linux kernel command line as text: its words, and the memory that `memmap=` of it leaves to persistent memory.

Pure functions, from what the kernel itself does: lib/cmdline.c (next_arg, memparse), kernel/params.c (parse_args),
arch/x86/kernel/e820.c (parse_memmap_one), arch/x86/boot/compressed/kaslr.c.

Out of scope: reading /proc/cmdline, and choosing words (linux/kexec.py).
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

AVOIDED_BY_KASLR = 4
"""MAX_MEMMAP_REGIONS."""
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
            ranges += _persistent([part])
    return _joined(ranges)


def exposed_ranges(command_line: str) -> tuple[tuple[int, int], ...]:
    """(start, size) in bytes of what `persistent_ranges` has and the kernel may yet unpack itself over when it boots.

    Where it puts itself at random (KASLR) it avoids the first four regions of `memmap=` only. With a fifth one in the
    same list with commas it stays where it was loaded; one in a `memmap=` of its own is not even looked at
    (arch/x86/boot/compressed/kaslr.c: mem_avoid_memmap; seen with 6.12 and 7.2).
    """
    exposed: list[tuple[int, int]] = []
    avoided = 0
    for name, value in arguments(command_line):
        if name == "nokaslr":
            return ()
        if name != "memmap":
            continue
        parts, looked_at = value.split(","), avoided < AVOIDED_BY_KASLR
        while parts and avoided < AVOIDED_BY_KASLR and (start := _start(parts[0])) is not None:
            avoided += start != 0
            del parts[0]
        if looked_at and parts and avoided == AVOIDED_BY_KASLR:
            return ()
        exposed += _persistent(parts)
    return _joined(exposed)


def _start(part: str) -> int | None:
    """As parse_memmap of the same file: 0 for what is not avoided, None for what ends its looking at the list."""
    try:
        _, rest = memparse(part)
    except ValueError:
        return None
    with contextlib.suppress(ValueError):
        return memparse(rest[1:])[0] if rest[:1] in ("!", "#", "$") else 0
    return 0


def _persistent(parts: Iterable[str]) -> Iterator[tuple[int, int]]:
    for part in parts:
        with contextlib.suppress(ValueError):
            size, rest = memparse(part)
            if rest.startswith("!") and size:
                yield memparse(rest[1:])[0], size


def meeting(ranges: Iterable[tuple[int, int]], start: int, size: int) -> list[tuple[int, int]]:
    """Those that have a byte in common with this one."""
    return [(s, n) for s, n in ranges if s < start + size and start < s + n]


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
