"""What a process has from its start and an exec keeps, as a value; and in what two processes differ.

Not carried, because nobody can read it from outside: securebits, NUMA memory policy of the process, core scheduling
cookie, timer slack, keyrings, seccomp filters. Of the last, `differences` at least tells that they are missing.

Out of scope: starting a process (launch.py), threads (placement.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpr.linux import proc, procfile
from cpr.linux.capabilities import names
from cpr.linux.cgroup import Cgroup
from cpr.linux.sched import Scheduling

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """A process as it could be started again. Credentials and cgroups as our own namespaces show them."""

    pid: int
    start_time: int
    """Clock ticks since boot. While this process lives, its directories and namespaces are taken from it."""
    argv: tuple[str, ...]
    environ: tuple[tuple[str, str], ...]
    cwd: str
    cwd_identity: tuple[int, int]
    """(st_dev, st_ino)."""
    root: str
    root_identity: tuple[int, int]
    uids: tuple[int, int, int, int]
    """Real, effective, saved, file system."""
    gids: tuple[int, int, int, int]
    groups: tuple[int, ...]
    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int
    no_new_privs: bool
    seccomp: int
    """0 off, 1 strict, 2 filter."""
    seccomp_filters: int | None
    limits: Mapping[str, tuple[int, int]]
    """{RLIMIT_ name: (soft, hard)}."""
    oom_score_adj: int
    affinity: frozenset[int]
    scheduling: Scheduling
    umask: int
    ioprio: int
    cgroups: tuple[Cgroup, ...]
    namespaces: Mapping[str, tuple[int, int]]
    """{name: (st_dev, st_ino)}."""
    security_label: str | None
    session: int
    tty: int
    """Device number of the controlling terminal, 0 for none. A new process has its own session and none."""
    ignored: int = 0
    """Mask of ignored signals, bit n-1 for signal n: an exec keeps them."""
    securebits: int | None = None
    """None: not known, and what the caller has is inherited."""


def likeness_of(pid: int) -> Likeness:
    """Read it.

    Raises:
        ProcessLookupError: it is gone, or a zombie. PermissionError: another user's, and no CAP_SYS_PTRACE.
    """
    stat = proc.read_stat(pid)
    status = proc.read_status(pid)
    if status.umask is None:
        raise procfile.gone(pid)
    directory, root = procfile.stat(pid, "cwd"), procfile.stat(pid, "root")
    namespaces = proc.namespaces(pid)
    likeness = Likeness(
        pid=pid,
        start_time=stat.start_time,
        argv=proc.read_argv(pid),
        environ=proc.read_environ(pid),
        cwd=proc.cwd(pid),
        cwd_identity=(directory.st_dev, directory.st_ino),
        root=proc.root(pid),
        root_identity=(root.st_dev, root.st_ino),
        uids=status.uids,
        gids=status.gids,
        groups=status.groups,
        inheritable=status.inheritable,
        permitted=status.permitted,
        effective=status.effective,
        bounding=status.bounding,
        ambient=status.ambient,
        no_new_privs=status.no_new_privs,
        seccomp=status.seccomp,
        seccomp_filters=status.seccomp_filters,
        limits=proc.limits(pid),
        oom_score_adj=proc.oom_score_adj(pid),
        affinity=proc.affinity(pid),
        scheduling=proc.scheduling(pid),
        umask=status.umask,
        ioprio=proc.ioprio(pid),
        cgroups=tuple(proc.cgroups(pid)),
        namespaces={name: namespaces[name] for name in NAMESPACES if name in namespaces},
        security_label=proc.security_label(pid),
        session=stat.session,
        tty=stat.tty,
        ignored=status.ignored,
    )
    if proc.process_start_time(pid) != stat.start_time:
        raise procfile.gone(pid)
    return likeness


def differences(old: Likeness, new: Likeness, *, unmet: Collection[str] = ()) -> tuple[str, ...]:
    """In what the new process differs, one line each, besides pid, argv, environment, session and terminal.

    A line begins with the aspect and a colon, as the lines of `unmet` (of a launch) do: aspects that those name are
    left out. A soft limit that was raised to the hard one is no difference: every process may do that, and QEMU does
    for RLIMIT_NOFILE.
    """
    told = {line.partition(":")[0] for line in unmet}
    return tuple(f"{aspect}: {text}" for aspect, text in _differences(old, new) if aspect not in told)


_PLAIN = ("uids", "gids", "no_new_privs", "oom_score_adj", "scheduling", "ioprio", "security_label")
_CAPABILITIES = ("inheritable", "permitted", "effective", "bounding", "ambient")


def _differences(old: Likeness, new: Likeness) -> Iterator[tuple[str, str]]:
    for name in _PLAIN:
        before, now = getattr(old, name), getattr(new, name)
        if before != now:
            yield name.replace("security_label", "security label"), f"{before} before, {now} now"
    for name in _CAPABILITIES:
        before, now = getattr(old, name), getattr(new, name)
        if before & ~now:
            yield name, f"lacks {', '.join(names(before & ~now))}"
        if now & ~before:
            yield name, f"has {', '.join(names(now & ~before))} too"
    if set(old.groups) != set(new.groups):
        yield "groups", f"{sorted(old.groups)} before, {sorted(new.groups)} now"
    if old.umask != new.umask:
        yield "umask", f"{old.umask:04o} before, {new.umask:04o} now"
    if old.affinity != new.affinity:
        yield "affinity", f"CPUs {sorted(old.affinity)} before, {sorted(new.affinity)} now"
    for name, word in (("cwd", "directory"), ("root", "root")):
        if getattr(old, f"{name}_identity") != getattr(new, f"{name}_identity"):
            yield (
                name,
                f"{getattr(old, name)} before, {getattr(new, name)} now, or another {word} of that name",
            )
    if old.seccomp != new.seccomp:
        yield "seccomp", f"mode {old.seccomp} before, {new.seccomp} now"
    elif (new.seccomp_filters or 0) < (old.seccomp_filters or 0):
        yield "seccomp", f"{old.seccomp_filters} filters before, {new.seccomp_filters} now"
    yield from _limit_differences(old, new)
    yield from _cgroup_differences(old, new)
    for name in NAMESPACES:
        if old.namespaces.get(name) != new.namespaces.get(name):
            yield "namespaces", f"another {name} namespace"


def _limit_differences(old: Likeness, new: Likeness) -> Iterator[tuple[str, str]]:
    def reach(soft: int) -> float:
        return float("inf") if soft < 0 else soft

    for name in sorted(old.limits.keys() | new.limits.keys()):
        before, now = old.limits.get(name), new.limits.get(name)
        if before is None or now is None:
            yield name, f"{before} before, {now} now"
        elif before[1] != now[1] or reach(now[0]) < reach(before[0]):
            yield name, f"soft {before[0]}, hard {before[1]} before; soft {now[0]}, hard {now[1]} now"


def _cgroup_differences(old: Likeness, new: Likeness) -> Iterator[tuple[str, str]]:
    before = {(c.controllers, c.unified): c.path for c in old.cgroups}
    now = {(c.controllers, c.unified): c.path for c in new.cgroups}
    for controllers, unified in sorted(before.keys() | now.keys()):
        key = (controllers, unified)
        if before.get(key) != now.get(key):
            which = "v2" if unified else ",".join(controllers)
            yield "cgroup", f"{which} {before.get(key)} before, {now.get(key)} now"


def own_likeness() -> Likeness:
    """Our own, securebits included."""
    import dataclasses

    from cpr.linux import syscalls

    return dataclasses.replace(
        likeness_of(os.getpid()), securebits=syscalls.prctl(syscalls.PR_GET_SECUREBITS)
    )
