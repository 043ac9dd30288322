"""The mappings of a process: /proc/PID/maps.

Out of scope: which of them are guest RAM.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cpr.linux import procfile

_LINE = re.compile(
    r"([0-9a-f]+)-([0-9a-f]+) ([r-][w-][x-][ps]) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) ([0-9]+)(?: +(.*))?"
)
_DELETED = " (deleted)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """One line of /proc/PID/maps; addresses and offset in bytes.

    `device` is (major, minor) of the super block, which on btrfs is not st_dev of the file.
    """

    start: int
    end: int
    perms: str
    """Four letters, e.g. 'rw-s'."""
    offset: int
    device: tuple[int, int]
    inode: int
    path: str
    """'' where anonymous; '[heap]' and the like; without the ' (deleted)' that `deleted` stands for."""
    deleted: bool

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def shared(self) -> bool:
        return self.perms[3] == "s"


def parse_maps(text: str) -> list[Mapping]:
    """Parse /proc/PID/maps.

    Raises:
        ValueError: a line that the kernel does not write.
    """
    mappings = []
    for line in text.split("\n"):
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"not a line of /proc/PID/maps: {line[:120]!r}")
        start, end, perms, offset, major, minor, inode, path = match.groups()
        path = (path or "").replace("\\012", "\n")  # of a name, only the newline is escaped here
        deleted = path.endswith(_DELETED)
        mappings.append(
            Mapping(
                start=int(start, 16),
                end=int(end, 16),
                perms=perms,
                offset=int(offset, 16),
                device=(int(major, 16), int(minor, 16)),
                inode=int(inode),
                path=path.removesuffix(_DELETED),
                deleted=deleted,
            )
        )
    return mappings


def read_maps(pid: int) -> list[Mapping]:
    """The mappings of a process; a kernel thread and a zombie have none.

    Raises:
        ProcessLookupError, PermissionError.
    """
    return parse_maps(procfile.read_text(pid, "maps"))
