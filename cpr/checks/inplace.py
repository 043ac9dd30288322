"""Of the engines that replace the program and keep the process: whether that can be done, and what it cannot keep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpr.checks.registry import blocker, check, note
from cpr.checks.words import some

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cpr.model import Finding, Guest, Host

REEXEC = ("reexec",)
MOST_FILTERS = 200
"""The kernel takes filters of 32768 instructions together on a process (MAX_INSNS_PER_PATH, kernel/seccomp.c).
Measured: with everything denied that -sandbox can deny, QEMU 7.2 cannot add the 228th, 11.1 the 227th."""


@check("ptrace", "A process in which no system call can be made", ignorable=False, engines=REEXEC)
def ptrace(guest: Guest) -> Iterator[Finding]:
    """The execve that replaces QEMU is made in its process: Yama, another user, a tracer, a seccomp filter, ..."""
    found = guest.untraceable
    if found is None:
        return
    lacking = f" ({found.ability} is missing)" if found.ability and found.ability not in found.why else ""
    ways = [found.way_out] if found.way_out else []
    if not guest.supervisors and found.ability != "CAP_SYS_PTRACE":  # descriptors are taken by the same right
        ways.append("a handover does without it (--engine handover)")
    yield blocker(
        found.ability or f"pid {guest.process.pid}",
        f"{found.why}{lacking}: a re-exec makes system calls in QEMU's own process",
        "; ".join(ways) or "shut the guest down and start it on the new QEMU",
    )


@check("pty-unknown", "Ptys that cannot be told apart", engines=REEXEC)
def pty_unknown(guest: Guest) -> Iterator[Finding]:
    """After an update in place QEMU names a pty by that one's number which it had made itself; one alone is found."""
    owned = {file.owner for file in guest.open_files if file.kind == "pty"}
    given = [c.label for c in guest.chardevs if c.backend == "pty" and c.in_argv]
    nameless = [label for label in given if f"chardev:{label}" not in owned]
    if len(nameless) > 1:
        yield blocker(
            some(nameless, 3),
            f"which of the process's ptys are those of {some(nameless, 3)} cannot be told: QEMU names them by numbers "
            "that are no more, as it was updated in place before",
            "use UNIX sockets at the next start, whose clients stay connected with every engine",
        )


@check("async-teardown", "Helper processes that keep an old address space", engines=REEXEC)
def async_teardown(guest: Guest) -> Iterator[Finding]:
    """Each shares the address space of the program that made it, which an exec does not end."""
    if guest.teardown_helpers:
        pids = some((str(pid) for pid in guest.teardown_helpers), 3)
        yield note(
            f"pid {pids}",
            f"{len(guest.teardown_helpers)} helper process(es) of async teardown would keep what the old program had "
            "in memory: they are ended after the commit",
        )


@check("seccomp-filters", "Seccomp filters that pile up", engines=REEXEC)
def seccomp_filters(guest: Guest) -> Iterator[Finding]:
    """A filter stays over an exec, and the new QEMU adds its own (-sandbox on)."""
    count = guest.seccomp_filters or 0
    if count > MOST_FILTERS:
        yield blocker(
            f"pid {guest.process.pid}",
            f"the process has {count} seccomp filters, as each re-exec adds the new QEMU's: the kernel may refuse one "
            "more, and a QEMU that cannot add its own ends at its start",
            "a handover starts with none of the old (--engine handover), as does a restart of the guest; "
            "--ignore seccomp-filters if QEMU's are known to be short (-sandbox on alone)",
        )
    elif count > 1:
        yield note(
            f"pid {guest.process.pid}",
            f"the process has {count} seccomp filters, and each re-exec adds the new QEMU's: system calls become a "
            "little slower each time; a handover starts with none of the old",
        )


@check("thread-ids", "Thread ids that somebody remembers, and that change", engines=REEXEC)
def thread_ids(guest: Guest, host: Host) -> Iterator[Finding]:
    """libvirt pins vCPUs and I/O threads by the ids that it asked for once; an exec ends these threads."""
    libvirt = any(supervisor.kind == "libvirt" for supervisor in guest.supervisors)
    if libvirt and not {"CAP_CHECKPOINT_RESTORE", "CAP_SYS_ADMIN"} & set(host.capabilities):
        yield note(
            "CAP_CHECKPOINT_RESTORE",
            "threads of vCPUs get new ids, which libvirt learns of when it is restarted only "
            "(CAP_CHECKPOINT_RESTORE is missing: with it they mostly keep theirs)",
            "restart libvirtd afterwards, or run cpr as root",
        )
