"""Room: a second QEMU stands beside the first for a moment, and needs memory, tasks, descriptors and a journal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpr.checks.registry import blocker, check
from cpr.checks.words import size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cpr.model import Finding, Guest, Host

LEAST_MEMORY = 256 << 20
"""What a QEMU of today takes besides the guest's RAM, generously."""
JOURNAL_BYTES = 1 << 20
JOURNAL_INODES = 16
SPARE_TASKS = 4
SPARE_DESCRIPTORS = 32
"""What the keeper opens besides: monitors, pidfds, the journal, /proc."""
UNLIMITED = -1


def second_qemu(guest: Guest) -> int:
    """Bytes that a second QEMU needs of its own: what the first has besides shared RAM."""
    shared = sum(block.size for block in guest.ram if block.shared)
    return max(guest.resident - shared, LEAST_MEMORY)


@check("room-memory", "Memory for a second QEMU")
def room_memory(guest: Guest, host: Host) -> Iterator[Finding]:
    """Otherwise the OOM killer takes the guest."""
    needed = second_qemu(guest)
    if guest.memory_room is not None and guest.memory_room < needed:
        yield blocker(
            "memory.max",
            f"a second QEMU needs about {size(needed)} for a moment, and the cgroup has {size(guest.memory_room)} "
            "left: the OOM killer would take the guest",
            "raise memory.max of its cgroup for the time of the update",
        )
    if host.memory_available < needed:
        yield blocker(
            "host memory",
            f"a second QEMU needs about {size(needed)} for a moment, and the host has "
            f"{size(host.memory_available)} available",
            "free memory, or update fewer guests at a time (--jobs)",
        )


@check("room-pids", "Tasks for a second QEMU")
def room_pids(guest: Guest) -> Iterator[Finding]:
    """pids.max of the cgroup counts threads."""
    needed = guest.threads + SPARE_TASKS
    if guest.pids_room is not None and guest.pids_room < needed:
        yield blocker(
            "pids.max",
            f"a second QEMU needs about {needed} tasks (the first has {guest.threads} threads), and the cgroup has "
            f"room for {guest.pids_room}",
            "raise pids.max of its cgroup (systemd: TasksMax=) for the time of the update",
        )


@check("room-disk", "Room for the journal", ignorable=False)
def room_disk(host: Host) -> Iterator[Finding]:
    """The journal is what a recovery goes by."""
    if host.run_directory_free < JOURNAL_BYTES or host.run_directory_inodes < JOURNAL_INODES:
        yield blocker(
            host.run_directory,
            f"{size(host.run_directory_free)} and {host.run_directory_inodes} inodes are left for the journal in "
            f"{host.run_directory}",
            "make room there, or name another directory in CPR_RUN_DIR",
        )


@check("room-fds", "Descriptors for the keeper and the new QEMU")
def room_fds(guest: Guest, host: Host) -> Iterator[Finding]:
    """What is handed on is open twice for a moment; what the new QEMU opens by itself comes on top."""
    passed = sum(1 for f in guest.open_files if f.kind in ("listener", "socket", "tap", "vhost", "memfd"))
    own = len(guest.open_files)
    wants = (
        ("the new QEMU", guest.limits.get("RLIMIT_NOFILE"), own + passed),
        ("cpr", host.limits.get("RLIMIT_NOFILE"), passed + SPARE_DESCRIPTORS),
    )
    for who, limit, needed in wants:
        if limit is not None and limit[0] != UNLIMITED and limit[0] < needed:
            yield blocker(
                "RLIMIT_NOFILE",
                f"{who} needs about {needed} descriptors and may have {limit[0]}",
                "raise the limit (ulimit -n, LimitNOFILE=; prlimit --nofile for a process that runs)",
            )
