"""Where each thread of a process runs: CPUs, scheduling, I/O priority, and its own cgroup.

libvirt puts vCPU and I/O threads into cgroups of their own (v1: any controller; v2: threaded ones), and pins them.

Out of scope: which thread is which vCPU.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from cpr.linux import cgroup, procfile, sched, syscalls
from cpr.linux.cgroup import Cgroup
from cpr.linux.proc import threads
from cpr.linux.sched import Scheduling

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadPlacement:
    """Where one thread runs."""

    tid: int
    comm: str
    affinity: frozenset[int]
    scheduling: Scheduling
    ioprio: int
    cgroups: tuple[Cgroup, ...]

    def json(self) -> dict[str, Any]:
        return {
            "tid": self.tid,
            "comm": self.comm,
            "affinity": sorted(self.affinity),
            "scheduling": asdict(self.scheduling),
            "ioprio": self.ioprio,
            "cgroups": [[c.hierarchy, list(c.controllers), c.path] for c in self.cgroups],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError, ValueError where it is none."""
        return cls(
            tid=int(value["tid"]),
            comm=str(value["comm"]),
            affinity=frozenset(map(int, value["affinity"])),
            scheduling=Scheduling(**value["scheduling"]),
            ioprio=int(value["ioprio"]),
            cgroups=tuple(
                Cgroup(hierarchy=int(h), controllers=tuple(map(str, names)), path=str(path))
                for h, names, path in value["cgroups"]
            ),
        )


def thread_placement(pid: int) -> tuple[ThreadPlacement, ...]:
    """Of every thread of a process, by tid; those that end meanwhile are left out.

    Raises:
        ProcessLookupError.
    """
    found = []
    for thread in threads(pid):
        with contextlib.suppress(ProcessLookupError):
            found.append(
                ThreadPlacement(
                    tid=thread.tid,
                    comm=thread.comm,
                    affinity=sched.affinity(thread.tid),
                    scheduling=sched.scheduling(thread.tid),
                    ioprio=sched.ioprio(thread.tid),
                    cgroups=tuple(cgroup.cgroups(thread.tid)),
                )
            )
    if not found:
        raise procfile.gone(pid)
    return tuple(found)


def apply_placement(tid: int, placement: ThreadPlacement) -> None:
    """Put a thread where another one was: the cgroup first, as a cpuset resets the affinity.

    Raises:
        ProcessLookupError; OSError: what could not be done, all else is done before it is raised.
    """
    failed: list[OSError] = []
    mounts = cgroup.own_mounts()
    now = set(cgroup.cgroups(tid))
    for entry in placement.cgroups:
        directory = cgroup.locate(entry, mounts)
        if entry in now or directory is None:
            continue
        try:
            path = os.path.join(directory, "cgroup.threads" if entry.unified else "tasks")
            with open(path, "wb", buffering=0) as file:
                file.write(str(tid).encode())
        except ProcessLookupError:
            raise
        except OSError as error:
            failed.append(error)
    try:
        if sched.affinity(tid) != placement.affinity:
            os.sched_setaffinity(tid, placement.affinity)
    except ProcessLookupError:
        raise
    except OSError as error:
        failed.append(error)
    try:
        if sched.scheduling(tid) != placement.scheduling:
            sched.set_scheduling(tid, placement.scheduling)
        if sched.ioprio(tid) != placement.ioprio:
            syscalls.ioprio_set(syscalls.IOPRIO_WHO_PROCESS, tid, placement.ioprio)
    except ProcessLookupError:
        raise
    except OSError as error:
        failed.append(error)
    if failed:
        raise failed[0]
