"""Threads that somebody outside may remember by id: libvirt pins vCPUs and I/O threads by it. A re-exec ends them all.

Where it can be had, those of the new program get the ids of those they replace (linux/births.py); who is born after
whom is learned from the rehearsal, which is the same program with the same threads. Whoever got another id is told of.

Out of scope: where they run (settings.py).
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from cpr.errors import CprError
from cpr.linux import births, proc

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from cpr.model import Guest
    from cpr.qemu.qmp import Monitor
    from cpr.qemu.rehearsal import Started
    from cpr.run import Run

AFTER = "threads:after"
"""In `Run.extra`: {name of a thread: the births.Birth that is next}."""


def of_guest(guest: Guest) -> dict[str, int]:
    """Thread ids as this host counts them, by what they are for: `vCPU 0`, `iothread io0`."""
    return _named(((v.index, v.thread_id) for v in guest.vcpus), guest.iothreads)


def now(monitor: Monitor, pid: int) -> dict[str, int]:
    """The same of a QEMU that can be asked. Raises CprError, ProcessLookupError."""
    vcpus = [(int(c["cpu-index"]), int(c["thread-id"])) for c in monitor.execute("query-cpus-fast")]
    iothreads = [(str(t["id"]), int(t["thread-id"])) for t in monitor.execute("query-iothreads")]
    ours = proc.thread_ids(pid)
    return {name: ours[tid] for name, tid in _named(vcpus, iothreads).items() if tid in ours}


def _named(vcpus: Iterable[tuple[int, int]], iothreads: Iterable[tuple[str, int]]) -> dict[str, int]:
    return {f"vCPU {n}": tid for n, tid in vcpus} | {f"iothread {name}": tid for name, tid in iothreads}


def learn(run: Run, guest: Guest, it: Started) -> None:
    """After which threads of a rehearsing QEMU those are born that should get an id."""
    pid, was = it.process.pid, of_guest(guest)
    with contextlib.suppress(CprError, OSError):
        if proc.namespaces(guest.process.pid).get("pid") != proc.namespaces(os.getpid()).get("pid"):
            return
        wanted = {tid: was[name] for name, tid in now(it.monitor, pid).items() if name in was}
        run.extra[AFTER] = births.predecessors(pid, proc.threads(pid), wanted)


def changed(was: Mapping[str, int], are: Mapping[str, int]) -> Iterator[str]:
    """What whoever remembers the threads has to know; nothing where all have the ids that they had."""
    words = [f"{name}: thread {tid} is now {are[name]}" for name, tid in was.items() if are.get(name, tid) != tid]
    if words:
        yield f"{', '.join(words)}; libvirt must be restarted to see it"
