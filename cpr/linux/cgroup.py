"""Control groups of a process, v1, v2 and both at once: where they are mounted and how much room they leave.

Out of scope: making cgroups, and limits other than memory and pids.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpr.linux import procfile
from cpr.linux.mounts import parse_mountinfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

UNLIMITED = 1 << 62
"""memory.limit_in_bytes of v1 says "no limit" by a number just below 2**63, rounded down to a page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cgroup:
    """A line of /proc/PID/cgroup; hierarchy 0 without controllers is cgroup v2."""

    hierarchy: int
    controllers: tuple[str, ...]
    """E.g. ('cpu', 'cpuacct') or ('name=systemd',)."""
    path: str
    """Below the root of our cgroup namespace; begins with '/..' where it lies outside."""

    @property
    def unified(self) -> bool:
        """Whether it is cgroup v2."""
        return self.hierarchy == 0 and not self.controllers


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupMount:
    """Where a hierarchy is mounted: `root` of it is at `directory`. `options` of v1 name its controllers."""

    directory: str
    root: str
    unified: bool
    options: frozenset[str]


def parse_cgroup(text: str) -> list[Cgroup]:
    """Parse /proc/PID/cgroup. Raises ValueError for a line that is none."""
    entries = []
    for line in text.split("\n"):
        if not line:
            continue
        number, colon, rest = line.partition(":")
        controllers, second, path = rest.partition(":")
        if not (colon and second and number.isdecimal() and path.startswith("/")):
            raise ValueError(f"not a line of /proc/PID/cgroup: {line[:120]!r}")
        names = tuple(controllers.split(",")) if controllers else ()
        entries.append(Cgroup(hierarchy=int(number), controllers=names, path=path))
    return entries


def cgroups(pid: int) -> list[Cgroup]:
    """The cgroups of a process (of its main thread, where they are threaded), or of a thread by its tid.

    Raises:
        ProcessLookupError.
    """
    return parse_cgroup(procfile.read_text(pid, "cgroup"))


def own_mounts() -> list[CgroupMount]:
    """The cgroup hierarchies that are mounted where we are."""
    return parse_cgroup_mounts(procfile.mountinfo(os.getpid()))


def parse_cgroup_mounts(mountinfo: str) -> list[CgroupMount]:
    """The cgroup mounts in a text of /proc/PID/mountinfo; other mounts and damaged lines are passed over."""
    return [
        CgroupMount(directory=m.point, root=m.root, unified=m.type == "cgroup2", options=m.options)
        for m in parse_mountinfo(mountinfo)
        if m.type in ("cgroup", "cgroup2")
    ]


def locate(entry: Cgroup, mounts: list[CgroupMount]) -> str | None:
    """The directory of a cgroup, None where its hierarchy is not mounted or shows another part of it."""
    for mount in mounts:
        if mount.unified != entry.unified or not (entry.unified or set(entry.controllers) <= mount.options):
            continue
        if mount.root == "/":
            return mount.directory.rstrip("/") + entry.path.rstrip("/")
        if entry.path == mount.root or entry.path.startswith(mount.root + "/"):
            return mount.directory + entry.path[len(mount.root) :]
    return None


def cgroup_dir(entry: Cgroup) -> str:
    """The directory of a cgroup, as we see it (/proc/self/mountinfo).

    Raises:
        FileNotFoundError: the hierarchy is not mounted here.
    """
    directory = locate(entry, own_mounts())
    if directory is None:
        which = ",".join(entry.controllers) or "v2"
        raise FileNotFoundError(2, f"the cgroup hierarchy {which} is not mounted here", entry.path)
    return directory


def unit_in(path: str) -> str | None:
    """The innermost systemd unit in a cgroup path: foo.service, machine-qemu.scope; None where there is none."""
    for part in reversed(path.split("/")):
        if part.endswith((".service", ".scope")):
            return part
    return None


def unit_of(pid: int) -> str | None:
    """The systemd unit whose cgroup a process is in. Asks nobody: it is the name in the path.

    Raises:
        ProcessLookupError.
    """
    entries = cgroups(pid)
    telling = [e for e in entries if e.controllers == ("name=systemd",)] + [e for e in entries if e.unified]
    return next((unit for entry in telling if (unit := unit_in(entry.path))), None)


def _number(directory: str, name: str) -> int | None:
    """A number in a cgroup's file; None for `max`, and where there is no such file (the root of v2, no controller)."""
    try:
        with open(os.path.join(directory, name)) as file:
            text = file.read().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return None if text == "max" or int(text) >= UNLIMITED else int(text)


def _ancestors(entry: Cgroup, mounts: list[CgroupMount]) -> Iterator[str]:
    """The directory of a cgroup and those above it, as far as they are mounted: a limit holds for all below."""
    directory = locate(entry, mounts)
    tops = {mount.directory.rstrip("/") for mount in mounts}
    while directory is not None:
        yield directory
        directory = os.path.dirname(directory) if directory not in tops and directory != "/" else None


def _room(pid: int, controller: str, room: Callable[[str, bool], int | None]) -> int | None:
    mounts = own_mounts()
    rooms = [
        left
        for entry in cgroups(pid)
        if entry.unified or controller in entry.controllers
        for directory in _ancestors(entry, mounts)
        if (left := room(directory, entry.unified)) is not None
    ]
    return min(rooms, default=None)


def _inactive_file(directory: str) -> int:
    """Page cache that is reclaimed at once when room is wanted."""
    try:
        with open(os.path.join(directory, "memory.stat")) as file:
            values = dict(line.split() for line in file)
    except (OSError, ValueError):
        return 0
    return int(values.get("total_inactive_file", values.get("inactive_file", "0")))


def _memory_left(directory: str, unified: bool) -> int | None:
    limit_file, usage_file = (
        ("memory.max", "memory.current") if unified else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    limit, usage = _number(directory, limit_file), _number(directory, usage_file)
    if limit is None or usage is None:
        return None
    return max(0, limit - usage + _inactive_file(directory))


def _pids_left(directory: str, _unified: bool) -> int | None:
    limit, usage = _number(directory, "pids.max"), _number(directory, "pids.current")
    return None if limit is None or usage is None else max(0, limit - usage)


def memory_room(pid: int) -> int | None:
    """Bytes that the cgroups of a process, and those above them, still allow; None where nothing limits it.

    The smallest limit minus usage, inactive page cache not counted as used.

    Raises:
        ProcessLookupError.
    """
    return _room(pid, "memory", _memory_left)


def pids_room(pid: int) -> int | None:
    """Tasks (processes and threads) that the cgroups still allow; None where nothing limits them."""
    return _room(pid, "pids", _pids_left)
