"""The mounts that a process sees: /proc/PID/mountinfo.

Out of scope: mounting; which hierarchy of cgroups is mounted where (cgroup.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from cpr.linux.procfile import unescape


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A line of /proc/PID/mountinfo: what stands behind a device number."""

    device: tuple[int, int]
    type: str
    options: frozenset[str]
    """Of the file system itself (the last column)."""
    id: int = 0
    """As in fdinfo and statx(2)."""
    root: str = "/"
    """What of the file system is mounted there."""
    point: str = ""
    source: str = ""
    """The block device, mostly; whatever was given to mount(2)."""


def parse_mountinfo(printed: str) -> tuple[Mount, ...]:
    """/proc/PID/mountinfo (proc(5)): id, parent, device, root, mount point, options, ..., -, type, source, options.

    Damaged lines are passed over.
    """
    found = []
    for line in printed.split("\n"):  # only blank, tab, newline and backslash are escaped in paths
        before, dash, after = line.partition(" - ")
        words, rest = before.split(" "), after.split(" ")
        major, colon, minor = words[2].partition(":") if len(words) > 4 else ("", "", "")
        if dash and colon and rest[0] and major.isdigit() and minor.isdigit():
            options = rest[2] if len(rest) > 2 else ""
            found.append(
                Mount(
                    device=(int(major), int(minor)),
                    type=rest[0],
                    options=frozenset(options.split(",")),
                    id=int(words[0]) if words[0].isdigit() else 0,
                    root=unescape(words[3]),
                    point=unescape(words[4]),
                    source=unescape(rest[1]) if len(rest) > 1 else "",
                )
            )
    return tuple(found)
