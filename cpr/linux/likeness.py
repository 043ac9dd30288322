"""Starting a process in the likeness of another, and saying in what two processes differ.

Out of scope: which program, with which arguments; those are the caller's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cpr.linux.fds import Fd
from cpr.linux.proc import Cgroup, Scheduling


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """What a process has from its start and what an exec would keep."""

    pid: int
    start_time: int
    argv: tuple[str, ...]
    environ: tuple[tuple[str, str], ...]
    cwd: str
    root: str
    uids: tuple[int, int, int, int]
    gids: tuple[int, int, int, int]
    groups: tuple[int, ...]
    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int
    no_new_privs: bool
    securebits: int | None
    seccomp: int
    limits: Mapping[str, tuple[int, int]]
    oom_score_adj: int
    affinity: frozenset[int]
    scheduling: Scheduling
    umask: int
    ioprio: int
    cgroups: tuple[Cgroup, ...]
    namespaces: Mapping[str, tuple[int, int]]
    security_label: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadPlacement:
    """Where one thread runs."""

    tid: int
    comm: str
    affinity: frozenset[int]
    scheduling: Scheduling
    cgroups: tuple[Cgroup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A program that was exec'ed. `unmet` says what of the likeness could not be had, e.g. "limits: ..."."""

    pid: int
    pidfd: Fd
    start_time: int
    unmet: tuple[str, ...]


class LaunchError(OSError):
    """Nothing was run: `step` says where it ended (cgroup, namespaces, credentials, cwd, executable, exec, ...)."""

    step: str


def likeness_of(pid: int) -> Likeness:
    """Read it. Raises ProcessLookupError, PermissionError."""
    raise NotImplementedError


def launch(
    likeness: Likeness,
    *,
    argv: Sequence[str],
    environ: Iterable[tuple[str, str]],
    executable: tuple[str, tuple[int, int] | None],
    descriptors: Mapping[int, int | Fd] | None = None,
    stdin: int | Fd | None = None,
    stdout: int | Fd | None = None,
    stderr: int | Fd | None = None,
    timeout: float = 30.0,
) -> Launched:
    """Start a program in a likeness, as our child.

    `executable` is its path, as seen in the likeness's mount namespace, and its (st_dev, st_ino);
    `descriptors` are {number there: our descriptor}; 0, 1 and 2 are /dev/null if nobody names them.

    Raises:
        LaunchError: nothing was run.
    """
    raise NotImplementedError


def differences(old: Likeness, new: Likeness, *, unmet: Collection[str] = ()) -> tuple[str, ...]:
    """In what they differ, besides argv, environment and pid; what `unmet` names already is left out."""
    raise NotImplementedError


def thread_placement(pid: int) -> tuple[ThreadPlacement, ...]:
    """Of every thread of a process. Raises ProcessLookupError."""
    raise NotImplementedError


def apply_placement(tid: int, placement: ThreadPlacement) -> None:
    """Put a thread where another one was. Raises ProcessLookupError, OSError."""
    raise NotImplementedError
