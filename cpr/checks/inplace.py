"""Of the engines that replace the program and keep the process: whether that can be done, and what it cannot keep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpr.checks.registry import blocker, check, note, warning
from cpr.checks.words import some

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cpr.model import Finding, Guest

REEXEC = ("reexec",)


@check("ptrace", "A process in which no system call can be made", ignorable=False, engines=REEXEC)
def ptrace(guest: Guest) -> Iterator[Finding]:
    """The execve that replaces QEMU is made in its process: Yama, another user, a tracer, a seccomp filter, ..."""
    found = guest.untraceable
    if found is None:
        return
    lacking = f" ({found.ability} is missing)" if found.ability and found.ability not in found.why else ""
    ways = [found.way_out] if found.way_out else []
    if not guest.supervisors:
        ways.append("a handover does without it (--engine handover)")
    yield blocker(
        found.ability or f"pid {guest.process.pid}",
        f"{found.why}{lacking}: a re-exec makes system calls in QEMU's own process",
        "; ".join(ways) or "shut the guest down and start it on the new QEMU",
    )


@check("will-disconnect", "Sessions that end with the old program", engines=REEXEC)
def will_disconnect(guest: Guest) -> Iterator[Finding]:
    """A pty ends with the program that made it. `chardev-framing` and `vnc-client` say the rest, for all engines."""
    for chardev in guest.chardevs:
        if chardev.backend == "pty" and chardev.in_argv:
            yield warning(
                chardev.label,
                f"will disconnect: the pty of {chardev.label} ends with the old program; the new one makes another, "
                "whose name query-chardev tells",
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
    if count > 1:
        yield note(
            f"pid {guest.process.pid}",
            f"the process has {count} seccomp filters, and each re-exec adds the new QEMU's: system calls become a "
            "little slower each time; a handover starts with none of the old",
        )
