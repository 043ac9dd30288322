"""The descriptor map of a re-exec: which descriptor is what, told to the new program in its environment.

    CPR_RUN=20261120T101500-3f2a/4242
    CPR_FD_chardev__serial0__client=17,90321       chardev:serial0:client
    CPR_FD_ram__pc_2Eram=20,1032                   ram:pc.ram

exec keeps numbers; what it does not keep is what they mean. A name is written in the letters that a variable's name may
have, so that no two names share a variable. /proc/PID/environ never changes after an exec: the map outlives its run,
its numbers may be somebody else's by then, and anybody who starts a QEMU can plant one. So a map is only believed by
the run that wrote it, and a number is only used where its inode is the recorded one. Descriptors of anonymous files
(eventfd, KVM, VFIO) all have one inode, and for those that says little.

Out of scope: which descriptors are kept, and clearing their close-on-exec flag. Everything but `verify` is pure.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from cpr.linux import procfile

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PREFIX = "CPR_FD_"
RUN = "CPR_RUN"

STATE = "state"
"""The name of the descriptor that holds the device state."""

MOST = 4096
"""Descriptors in one map; a hostile environment may hold more."""
LARGEST_NUMBER = (1 << 31) - 1
LARGEST_INODE = (1 << 64) - 1

_ESCAPED = re.compile(r"(?:[A-Za-z0-9]|__|_[0-9A-F]{2})*")
_PART = re.compile(r"__|_([0-9A-F]{2})")
_VALUE = re.compile(r"(0|[1-9][0-9]{0,9}),(0|[1-9][0-9]{0,19})")
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One descriptor: its number in the process, and st_ino of what it led to when it was recorded."""

    number: int
    inode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FdMap:
    """Descriptors by name, and the run that recorded them."""

    run: str = ""
    """Empty: there is no map."""
    entries: Mapping[str, Entry] = field(default_factory=lambda: MappingProxyType({}))
    """Two names may share a descriptor: RAM blocks in one file do."""


# -- names


def chardev(label: str) -> str:
    """The listener, or the only connection, of a character device."""
    return f"chardev:{quote(label)}"


def client(label: str) -> str:
    """The accepted client of a character device that listens."""
    return f"chardev:{quote(label)}:client"


def vnc(index: int) -> str:
    """The n-th listener of VNC servers."""
    return f"vnc:{index}"


def pty(label: str) -> str:
    """The master of a character device's pty."""
    return f"pty:{quote(label)}"


def ram(id: str) -> str:
    """The memory behind a RAM block."""
    return f"ram:{quote(id)}"


def vfio(*parts: str) -> str:
    """A descriptor of VFIO: its container, a group, a device."""
    return ":".join(["vfio", *map(quote, parts)])


def quote(label: str) -> str:
    """A label as one part of a name: its colons are no separators."""
    return label.replace("%", "%25").replace(":", "%3A")


def unquote(part: str) -> str:
    """The label again."""
    return part.replace("%3A", ":").replace("%25", "%")


# -- variables


def escape(name: str) -> str:
    """Any name in letters, digits and underscores: `:` is `__`, other bytes are `_` and two hexadecimal digits.

    Raises:
        ValueError: it is no text that a system call could give (a lone surrogate).
    """
    return "".join(map(_escaped, os.fsencode(name)))


def _escaped(byte: int) -> str:
    letter = chr(byte)
    if letter.isascii() and letter.isalnum():
        return letter
    return "__" if letter == ":" else f"_{byte:02X}"


def unescape(word: str) -> str:
    """The name that `escape` made `word` of.

    Raises:
        ValueError: `escape` makes no such word.
    """
    if not _ESCAPED.fullmatch(word):
        raise ValueError(f"not an escaped name: {word[:80]!r}")
    plain = _PART.sub(lambda m: chr(int(m[1], 16)) if m[1] else ":", word)
    name = os.fsdecode(plain.encode("latin-1"))
    if escape(name) != word:  # an escape of what needs none: two variables would have one name
        raise ValueError(f"not an escaped name: {word[:80]!r}")
    return name


def encode(known: FdMap) -> tuple[tuple[str, str], ...]:
    """The variables, by name, CPR_RUN first.

    Raises:
        ValueError: it could not be read back: no run, a number or inode out of range, one number with two inodes.
    """
    pairs = [(RUN, known.run)]
    pairs += [(PREFIX + escape(name), f"{e.number},{e.inode}") for name, e in sorted(known.entries.items())]
    decode(pairs)
    return tuple(pairs)


def decode(environ: Iterable[tuple[str, str]]) -> FdMap:
    """The map in an environment, as pairs; an empty one where there is none. Nothing else in it matters.

    Raises:
        ValueError: what is there was not written by `encode`. Nothing of it may be used then.
    """
    runs: list[str] = []
    entries: dict[str, Entry] = {}
    for key, value in environ:
        if key == RUN:
            runs.append(value)
        elif key.startswith(PREFIX):
            name = unescape(key.removeprefix(PREFIX))
            if not name or name in entries:
                raise ValueError(f"{key[:80]} {'is there twice' if name else 'has no name'}")
            entries[name] = _entry(key, value)
            if len(entries) > MOST:
                raise ValueError(f"more than {MOST} descriptors")
    if entries and not runs:
        raise ValueError(f"{PREFIX}* without {RUN}")
    if len(runs) > 1 or (runs and not _RUN.fullmatch(runs[0])):
        raise ValueError(f"{RUN} is damaged")
    if len({entry.number for entry in entries.values()}) < len(set(entries.values())):
        raise ValueError("one descriptor has two inodes")
    return FdMap(run=runs[0] if runs else "", entries=MappingProxyType(entries))


def _entry(key: str, value: str) -> Entry:
    match = _VALUE.fullmatch(value)
    entry = Entry(int(match[1]), int(match[2])) if match else None
    if entry is None or entry.number > LARGEST_NUMBER or entry.inode > LARGEST_INODE:
        raise ValueError(f"{key[:80]}={value[:40]!r} is no number and inode")
    return entry


# -- what may be used


@dataclass(frozen=True, slots=True)
class Verified:
    """`good`: numbers by name, whose inode is the recorded one. `wrong`: why each of the others may not be used."""

    good: Mapping[str, int]
    wrong: Mapping[str, str]


def compare(known: FdMap, inodes: Mapping[int, int]) -> Verified:
    """The map against the inodes of what is open now, by number."""
    good, wrong = {}, {}
    for name, entry in known.entries.items():
        now = inodes.get(entry.number)
        if now == entry.inode:
            good[name] = entry.number
        else:
            there = "is not open" if now is None else f"is another file (inode {now}, not {entry.inode})"
            wrong[name] = f"descriptor {entry.number} {there}"
    return Verified(good, wrong)


def verify(pid: int, known: FdMap) -> Verified:
    """The map against what process `pid` has open now. The answer holds as long as the process stands still.

    Raises:
        ProcessLookupError: it is gone. PermissionError: its descriptors may not be read.
    """
    inodes = {}
    for entry in known.entries.values():
        try:
            inodes[entry.number] = procfile.stat(pid, f"fd/{entry.number}").st_ino
        except FileNotFoundError:
            continue
    return compare(known, inodes)
