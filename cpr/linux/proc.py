"""Facts about processes from /proc. A process that vanishes meanwhile is always ProcessLookupError.

    proc ── everything about a process, by pid; the list of all
     ├── status    ids, credentials, capabilities, state, start time
     ├── maps      mappings
     ├── cgroup    control groups, the room they leave, the systemd unit
     ├── sched     CPUs, policy, niceness
     ├── net       UNIX and TCP sockets of its network namespace
     └── sockdiag  the queue of a UNIX listener

Facts of a zombie: argv, environ and maps are empty, cwd, root, exe and the descriptors cannot be read
(ProcessLookupError or FileNotFoundError).

Out of scope: judging the facts, and changing anything.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from cpr.linux import procfile
from cpr.linux.cgroup import Cgroup, cgroup_dir, cgroups, memory_room, parse_cgroup, pids_room, unit_of
from cpr.linux.maps import Mapping, parse_maps, read_maps
from cpr.linux.net import TcpSocket, UnixSocket, parse_net_tcp, parse_net_unix, read_net_tcp, read_net_unix
from cpr.linux.sched import Scheduling, affinity, ioprio, scheduling
from cpr.linux.sockdiag import unix_backlog
from cpr.linux.status import (
    Stat,
    Status,
    is_stopped,
    is_zombie,
    parent_of,
    parse_stat,
    parse_status,
    process_start_time,
    read_stat,
    read_status,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Cgroup", "ExeFacts", "Mapping", "ProcessEntry", "Scheduling", "Stat", "Status", "TcpSocket", "Thread",
    "UnixSocket", "affinity", "boot_id", "cgroup_dir", "cgroups", "children", "cwd", "exe", "ioprio", "is_stopped",
    "is_zombie", "limits", "memory_room", "namespaces", "oom_score_adj", "parent_of", "parse_cgroup", "parse_environ",
    "parse_limits", "parse_maps", "parse_net_tcp", "parse_net_unix", "parse_stat", "parse_status", "pids_room",
    "process_start_time", "processes", "read_argv", "read_environ", "read_maps", "read_net_tcp", "read_net_unix",
    "read_stat", "read_status", "root", "scheduling", "security_label", "split_argv", "thread_ids", "threads",
    "unit_of", "unix_backlog",
]  # fmt: skip

_DELETED = " (deleted)"


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
    """Effective uid."""
    zombie: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ExeFacts:
    """The program a process runs: identity by stat of /proc/PID/exe, whatever stands at `path` today."""

    path: str
    """In the process's own mount namespace; without the ' (deleted)' that `deleted` stands for."""
    deleted: bool
    device: int
    inode: int

    @property
    def identity(self) -> tuple[int, int]:
        return self.device, self.inode


@dataclass(frozen=True, slots=True, kw_only=True)
class Thread:
    tid: int
    comm: str


def boot_id() -> str:
    """The random id of this boot (/proc/sys/kernel/random/boot_id)."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def split_argv(data: bytes) -> tuple[str, ...]:
    """The arguments in a text of /proc/PID/cmdline; odd bytes become surrogates (os.fsdecode)."""
    return tuple(os.fsdecode(word) for word in data.removesuffix(b"\0").split(b"\0")) if data else ()


def read_argv(pid: int) -> tuple[str, ...]:
    """Its arguments as they stand in its memory today; empty of a kernel thread and a zombie."""
    return split_argv(procfile.read_bytes(pid, "cmdline"))


def parse_environ(data: bytes) -> tuple[tuple[str, str], ...]:
    """(name, value) pairs, in order, repeated names too; entries without '=' mean nothing and are left out."""
    pairs = (os.fsdecode(entry).partition("=") for entry in data.split(b"\0") if entry)
    return tuple((name, value) for name, equals, value in pairs if name and equals)


def read_environ(pid: int) -> tuple[tuple[str, str], ...]:
    """The environment it was started with; changes made since do not show. PermissionError for other users."""
    return parse_environ(procfile.read_bytes(pid, "environ"))


def cwd(pid: int) -> str:
    """Its working directory, ' (deleted)' included where it is gone."""
    return procfile.read_link(pid, "cwd")


def root(pid: int) -> str:
    """Its root directory as a path of ours, where it can be seen."""
    return procfile.read_link(pid, "root")


def exe(pid: int) -> ExeFacts:
    """The program it runs. FileNotFoundError: a kernel thread or a zombie."""
    text = procfile.read_link(pid, "exe")
    status = procfile.stat(pid, "exe")
    deleted = text.endswith(_DELETED)
    if deleted:
        with contextlib.suppress(OSError):  # a file may really bear such a name
            there = os.stat(f"/proc/{pid}/root{text}")
            deleted = (there.st_dev, there.st_ino) != (status.st_dev, status.st_ino)
    path = text.removesuffix(_DELETED) if deleted else text
    return ExeFacts(path=path, deleted=deleted, device=status.st_dev, inode=status.st_ino)


def namespaces(pid: int) -> dict[str, tuple[int, int]]:
    """{name of /proc/PID/ns: (st_dev, st_ino)}: equal numbers are one namespace."""
    with procfile.vanishing(pid):
        names = os.listdir(f"/proc/{pid}/ns")
    found = {}
    for name in sorted(names):
        with contextlib.suppress(FileNotFoundError):
            status = procfile.stat(pid, f"ns/{name}")
            found[name] = (status.st_dev, status.st_ino)
    return found


_LIMIT_NAMES = {
    "Max cpu time": "RLIMIT_CPU",
    "Max file size": "RLIMIT_FSIZE",
    "Max data size": "RLIMIT_DATA",
    "Max stack size": "RLIMIT_STACK",
    "Max core file size": "RLIMIT_CORE",
    "Max resident set": "RLIMIT_RSS",
    "Max processes": "RLIMIT_NPROC",
    "Max open files": "RLIMIT_NOFILE",
    "Max locked memory": "RLIMIT_MEMLOCK",
    "Max address space": "RLIMIT_AS",
    "Max file locks": "RLIMIT_LOCKS",
    "Max pending signals": "RLIMIT_SIGPENDING",
    "Max msgqueue size": "RLIMIT_MSGQUEUE",
    "Max nice priority": "RLIMIT_NICE",
    "Max realtime priority": "RLIMIT_RTPRIO",
    "Max realtime timeout": "RLIMIT_RTTIME",
}
_LIMIT_LINE = re.compile(r"(Max [a-z ]+?) +(unlimited|[0-9]+) +(unlimited|[0-9]+)")


def parse_limits(text: str) -> dict[str, tuple[int, int]]:
    """{RLIMIT_ name: (soft, hard)} of /proc/PID/limits, in setrlimit's units; resource.RLIM_INFINITY: unlimited."""

    def value(word: str) -> int:
        return resource.RLIM_INFINITY if word == "unlimited" else int(word)

    matches = (_LIMIT_LINE.match(line) for line in text.split("\n"))
    return {_LIMIT_NAMES[m[1]]: (value(m[2]), value(m[3])) for m in matches if m and m[1] in _LIMIT_NAMES}


def limits(pid: int) -> dict[str, tuple[int, int]]:
    """Its limits, by RLIMIT_ name: (soft, hard).

    From /proc/PID/limits, which everybody may read: prlimit(2) wants CAP_SYS_RESOURCE for another user's process.
    """
    return parse_limits(procfile.read_text(pid, "limits"))


def oom_score_adj(pid: int) -> int:
    """-1000 (never killed) to 1000."""
    return int(procfile.read_text(pid, "oom_score_adj"))


def threads(pid: int) -> tuple[Thread, ...]:
    """Its threads, by tid; those that end while we read are left out."""
    with procfile.vanishing(pid):
        tids = sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    found = []
    for tid in tids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            comm = procfile.read_text(pid, f"task/{tid}/comm").removesuffix("\n")
            found.append(Thread(tid=tid, comm=comm))
    if not found:
        raise procfile.gone(pid)
    return tuple(found)


def thread_ids(pid: int) -> dict[int, int]:
    """Thread id as the process itself counts (gettid) -> as this host counts.

    They differ in a pid namespace; QEMU tells the inner ones.

    Raises:
        ProcessLookupError: the process is gone.
    """
    tids = [thread.tid for thread in threads(pid)]
    if len(read_status(pid).ns_pids) < 2:
        return {tid: tid for tid in tids}
    found = {}
    for tid in tids:
        try:
            found[read_status(tid).ns_pids[-1]] = tid
        except ProcessLookupError:
            continue  # a worker that ended
    return found


def security_label(pid: int) -> str | None:
    """What a security module calls it (attr/current): 'libvirt-<uuid> (enforce)', 'system_u:...:svirt_t:s0:c1,c2'.

    None where there is no such module, or it leaves the process unconfined.
    """
    try:
        text = procfile.read_text(pid, "attr/current").rstrip("\0\n")
    except ProcessLookupError:
        raise
    except OSError:  # EINVAL: no module answers; ENOENT: none is built in
        return None
    return None if text in ("", "unconfined", "kernel") else text


def children(pid: int) -> tuple[int, ...]:
    """Its children, by pid. A momentary list: children may come and go meanwhile."""
    with procfile.vanishing(pid):
        tids = os.listdir(f"/proc/{pid}/task")
    found: set[int] = set()
    try:
        for tid in tids:
            with contextlib.suppress(ProcessLookupError):
                found.update(int(word) for word in procfile.read_text(pid, f"task/{tid}/children").split())
    except FileNotFoundError:  # CONFIG_PROC_CHILDREN is off
        for other in psutil.pids():
            with contextlib.suppress(ProcessLookupError):
                if parent_of(other) == pid:
                    found.add(other)
    return tuple(sorted(found))


def processes() -> Iterator[ProcessEntry]:
    """Every process that we can see, by pid; kernel threads have no exe and no argv.

    Never raises for one that vanishes or hides: it is left out, or told of as far as it can be read.
    """
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            yield _entry(pid)


def _entry(pid: int) -> ProcessEntry:
    first = read_stat(pid)
    status = read_status(pid)
    argv: tuple[str, ...] = ()
    path = None
    with contextlib.suppress(PermissionError):
        argv = read_argv(pid)
    with contextlib.suppress(PermissionError, FileNotFoundError):
        path = exe(pid).path
    if read_stat(pid).start_time != first.start_time:
        raise procfile.gone(pid)
    return ProcessEntry(
        pid=pid,
        start_time=first.start_time,
        ppid=first.ppid,
        exe=path,
        argv=argv,
        comm=first.comm,
        uid=status.uids[1],
        zombie=first.state in ("Z", "X", "x"),
    )
