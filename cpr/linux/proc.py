"""Facts about processes from /proc. A process that vanishes meanwhile is always ProcessLookupError.

Out of scope: judging the facts, and changing anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessEntry:
    """One process of the list; what could not be read for want of privileges is None or empty."""

    pid: int
    start_time: int
    ppid: int
    exe: str | None
    argv: tuple[str, ...]
    comm: str
    uid: int
    zombie: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ExeFacts:
    """The program a process runs. `path` has no ' (deleted)', which is `deleted`; identity by stat of /proc/PID/exe."""

    path: str
    deleted: bool
    device: int
    inode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """One line of /proc/PID/maps; addresses and offset in bytes, `device` = (major, minor)."""

    start: int
    end: int
    perms: str
    offset: int
    device: tuple[int, int]
    inode: int
    path: str
    deleted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """/proc/PID/status. uids and gids: real, effective, saved, file system. Capabilities as bit masks."""

    name: str
    state: str
    ppid: int
    umask: int
    uids: tuple[int, int, int, int]
    gids: tuple[int, int, int, int]
    groups: tuple[int, ...]
    threads: int
    ns_pids: tuple[int, ...]
    rss: int
    """Bytes."""
    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int
    no_new_privs: bool
    seccomp: int
    """0 off, 1 strict, 2 filter."""
    seccomp_filters: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cgroup:
    """A line of /proc/PID/cgroup; hierarchy 0 without controllers is cgroup v2."""

    hierarchy: int
    controllers: tuple[str, ...]
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduling:
    """SCHED_* policy, real-time priority, nice value, reset-on-fork; runtime, deadline, period (ns) of SCHED_DEADLINE."""

    policy: int
    priority: int
    nice: int
    reset_on_fork: bool
    runtime: int = 0
    deadline: int = 0
    period: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Thread:
    tid: int
    comm: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixSocket:
    """A line of /proc/net/unix. `path` begins with '@' where abstract; accepted sockets carry their listener's path."""

    inode: int
    path: str
    type: str
    """stream, dgram, seqpacket"""
    listening: bool
    connected: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpSocket:
    """A line of /proc/net/tcp or tcp6; addresses as text."""

    inode: int
    family: int
    local: tuple[str, int]
    remote: tuple[str, int]
    state: str
    """LISTEN, ESTABLISHED, ..."""
    backlog: int
    """Clients that wait, where LISTEN."""
    uid: int


def boot_id() -> str: raise NotImplementedError
def process_start_time(pid: int) -> int: raise NotImplementedError
def parse_maps(text: str) -> list[Mapping]: raise NotImplementedError
def read_maps(pid: int) -> list[Mapping]: raise NotImplementedError
def parse_status(text: str) -> Status: raise NotImplementedError
def read_status(pid: int) -> Status: raise NotImplementedError
def read_argv(pid: int) -> tuple[str, ...]: raise NotImplementedError
def read_environ(pid: int) -> tuple[tuple[str, str], ...]: raise NotImplementedError
def cwd(pid: int) -> str: raise NotImplementedError
def root(pid: int) -> str: raise NotImplementedError
def exe(pid: int) -> ExeFacts: raise NotImplementedError
def namespaces(pid: int) -> dict[str, tuple[int, int]]: raise NotImplementedError
def parse_cgroup(text: str) -> list[Cgroup]: raise NotImplementedError
def cgroups(pid: int) -> list[Cgroup]: raise NotImplementedError
def cgroup_dir(entry: Cgroup) -> str: raise NotImplementedError
def unit_of(pid: int) -> str | None: raise NotImplementedError
def memory_room(pid: int) -> int | None: raise NotImplementedError
def pids_room(pid: int) -> int | None: raise NotImplementedError
def limits(pid: int) -> dict[str, tuple[int, int]]: raise NotImplementedError
def oom_score_adj(pid: int) -> int: raise NotImplementedError
def affinity(tid: int) -> frozenset[int]: raise NotImplementedError
def scheduling(tid: int) -> Scheduling: raise NotImplementedError
def threads(pid: int) -> tuple[Thread, ...]: raise NotImplementedError
def security_label(pid: int) -> str | None: raise NotImplementedError
def parse_net_unix(text: str) -> list[UnixSocket]: raise NotImplementedError
def read_net_unix(pid: int) -> list[UnixSocket]: raise NotImplementedError
def parse_net_tcp(text: str, family: int) -> list[TcpSocket]: raise NotImplementedError
def read_net_tcp(pid: int) -> list[TcpSocket]: raise NotImplementedError
def unix_backlog(inode: int, pid: int | None = None) -> int: raise NotImplementedError
def parent_of(pid: int) -> int: raise NotImplementedError
def children(pid: int) -> tuple[int, ...]: raise NotImplementedError
def is_zombie(pid: int) -> bool: raise NotImplementedError
def processes() -> Iterator[ProcessEntry]: raise NotImplementedError
