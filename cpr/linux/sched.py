"""Where and how a thread runs: CPUs, scheduling policy, niceness, I/O priority.

Everything here goes by thread: a pid stands for the main thread alone.

Out of scope: cgroups (cgroup.py), NUMA memory policies.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from cpr.linux import syscalls


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduling:
    """SCHED_* policy, real-time priority (1 to 99, else 0), nice value, reset-on-fork.

    runtime, deadline and period in nanoseconds, of SCHED_DEADLINE only (kernel 6.12 answers a time slice there for
    other policies, and takes one: 0 here leaves it alone).
    """

    policy: int
    priority: int
    nice: int
    reset_on_fork: bool
    runtime: int = 0
    deadline: int = 0
    period: int = 0


def affinity(tid: int) -> frozenset[int]:
    """The CPUs that a thread may run on. Raises ProcessLookupError."""
    return frozenset(os.sched_getaffinity(tid))


def scheduling(tid: int) -> Scheduling:
    """How a thread is scheduled. Raises ProcessLookupError, PermissionError."""
    policy, flags, nice, priority, *times = syscalls.sched_getattr(tid)
    if policy != syscalls.SCHED_DEADLINE:
        times = [0, 0, 0]
    return Scheduling(
        policy=policy,
        priority=priority,
        nice=nice,
        reset_on_fork=bool(flags & syscalls.SCHED_FLAG_RESET_ON_FORK),
        runtime=times[0],
        deadline=times[1],
        period=times[2],
    )


def set_scheduling(tid: int, wanted: Scheduling) -> None:
    """Raises ProcessLookupError; PermissionError: a better place in the queue, without CAP_SYS_NICE."""
    syscalls.sched_setattr(
        tid,
        wanted.policy,
        syscalls.SCHED_FLAG_RESET_ON_FORK if wanted.reset_on_fork else 0,
        wanted.nice,
        wanted.priority,
        wanted.runtime,
        wanted.deadline,
        wanted.period,
    )


def ioprio(tid: int) -> int:
    """I/O priority as ioprio_get(2) has it: class << 13 | data. Raises ProcessLookupError."""
    return syscalls.ioprio_get(syscalls.IOPRIO_WHO_PROCESS, tid)
