"""The process: who knows it by its pid, what it may, and whether another one can be made like it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpr.checks.command import parse
from cpr.checks.registry import BOTH, blocker, check, note
from cpr.checks.words import some
from cpr.qemu.cmdline import CommandLineError, settings
from cpr.qemu.variables import foreign

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cpr.model import Finding, Guest, Host
    from cpr.qemu.cmdline import CommandLine

UNLIMITED = -1
"""RLIM_INFINITY as the resource module has it."""

_SUPERVISORS = {
    "systemd": "systemd would take the end of its main process for the end of the service and kill the whole cgroup",
    "libvirt": "libvirt would take its end for the end of the domain",
    "container": "the container ends with its first process, and everything in it",
    "parent": "its parent waits for it and would take its end for the end of the guest",
}


@check("supervised", "Somebody knows the guest by its pid", ignorable=False, engines=("handover",))
def supervised(guest: Guest) -> Iterator[Finding]:
    """A handover ends the process: nobody may mistake that for the end of the guest."""
    for supervisor in guest.supervisors:
        why = _SUPERVISORS.get(supervisor.kind, "it would take the end of the process for the end of the guest")
        yield blocker(
            f"{supervisor.kind} {supervisor.who}".strip(),
            f"pid {guest.process.pid} is watched by {supervisor.who or supervisor.kind}, and a handover changes the "
            f"pid: {why}",
            "re-exec keeps the pid: --engine reexec, which auto takes for this guest where nothing blocks it; "
            "`cpr run` starts guests that nobody watches",
        )


@check("privileges", "An ability that is missing", ignorable=False, modes=BOTH)
def privileges(guest: Guest, host: Host) -> Iterator[Finding]:
    """Descriptors can be taken from the process, and a process of its user can be made."""
    capable = frozenset(host.capabilities)
    if "CAP_SYS_PTRACE" not in capable and host.uid not in (0, guest.uid):
        yield blocker(
            f"uid {host.uid}",
            f"CAP_SYS_PTRACE is missing to take descriptors from pid {guest.process.pid}, which belongs to uid "
            f"{guest.uid}",
            "run cpr as root, or as the guest's user",
        )
    if guest.uid != host.uid and not {"CAP_SETUID", "CAP_SETGID"} <= capable and host.uid != 0:
        yield blocker(
            f"uid {host.uid}",
            f"CAP_SETUID and CAP_SETGID are missing to start the new QEMU as uid {guest.uid}",
            "run cpr as root, or as the guest's user",
        )
    for what in guest.unreadable:
        yield blocker(what, f"{what} could not be read, and nothing is updated on a guess", "run cpr as root")


@check("take-descriptors", "A process that descriptors cannot be taken from", ignorable=False, engines=("handover",))
def take_descriptors(guest: Guest, host: Host) -> Iterator[Finding]:
    """pidfd_getfd(2) asks for the right to trace, Yama and capabilities included; root of the host has it."""
    found = guest.untraceable
    if found is not None and found.ability == "CAP_SYS_PTRACE" and "CAP_SYS_PTRACE" not in host.capabilities:
        yield blocker(
            found.ability,
            f"{found.why} ({found.ability} is missing): descriptors are taken from QEMU's process by the same right",
            "run cpr as root",
        )


@check("limits", "Limits that cannot be given to the new QEMU", ignorable=False, modes=BOTH)
def limits(guest: Guest, host: Host) -> Iterator[Finding]:
    """A hard limit above our own can only be set with CAP_SYS_RESOURCE."""
    if "CAP_SYS_RESOURCE" in host.capabilities:
        return
    for name, (_, hard) in sorted(guest.limits.items()):
        ours = host.limits.get(name, (UNLIMITED, UNLIMITED))[1]
        if ours != UNLIMITED and (hard == UNLIMITED or hard > ours):
            theirs = "unlimited" if hard == UNLIMITED else str(hard)
            yield blocker(
                name,
                f"the guest's hard limit {name} is {theirs}, ours is {ours}, and CAP_SYS_RESOURCE is missing to raise "
                "it: the new QEMU would run with less",
                "run cpr as root",
            )


@check("command-line", "A command line that cannot be understood", ignorable=False, modes=BOTH)
def command_line(guest: Guest) -> Iterator[Finding]:
    """Every option is known, so that it can be edited for the new QEMU."""
    try:
        parse(guest)
    except CommandLineError as error:
        yield blocker(
            "command line",
            f"{error}: the new QEMU's command line is made from the old one's, which therefore has to be understood",
            "report it, with the option's meaning; the guest has to be restarted without it meanwhile",
        )


@check("chroot", "The guest runs in a chroot of its own", ignorable=False, modes=BOTH)
def chroot(command: CommandLine) -> Iterator[Finding]:
    """-chroot is done after the files are opened: a new QEMU in that root would not find them."""
    directory = settings(command).chroot
    if directory:
        yield blocker(
            directory,
            "-chroot was done after its files were opened; a new QEMU inside would not find them under their names",
            "start the guest the next time without -chroot (a mount namespace does the same better)",
        )


@check("runas", "The guest gave root away at its start", ignorable=False, modes=BOTH)
def runas(command: CommandLine) -> Iterator[Finding]:
    """-runas is done after the files are opened: a QEMU that starts as that user may not open them."""
    user = settings(command).runas
    if user:
        yield blocker(
            user,
            f"it became {user} (-runas, -run-with user=) after its files were opened as root; a new QEMU is started as "
            f"{user}, who may not be able to open them",
            f"start the guest the next time as {user} from the beginning (systemd: User=), with files that are its own",
        )


@check("file-gone", "Files of the command line that are not there any more", modes=BOTH)
def file_gone(guest: Guest) -> Iterator[Finding]:
    """Firmware, secrets and images are read again by the new QEMU."""
    for path in guest.gone_files:
        relative = "" if path.startswith("/") else f" (relative to {guest.cwd}, where the process is now)"
        yield blocker(
            path,
            f"{path}{relative} is named on the command line and is not there: the new QEMU cannot open it",
            "put the file back (a copy of the same content)",
        )


@check("config-changed", "Configuration files that were changed since the start", modes=BOTH)
def config_changed(guest: Guest) -> Iterator[Finding]:
    """A -readconfig file is read again; what it says now is not what the guest was started with."""
    for path in guest.changed_files:
        yield blocker(
            path,
            f"{path} was changed after the guest was started: the new QEMU would be made from what it says now",
            "put the old content back (and its time: touch -d), or --ignore config-changed if the change is harmless",
        )


@check("loadvm", "-loadvm is left out", modes=BOTH)
def loadvm(command: CommandLine) -> Iterator[Finding]:
    """The guest began from a snapshot; the new QEMU goes on from its present state."""
    name = settings(command).loadvm
    if name:
        yield note(name, "-loadvm is left out of the new command line: the guest goes on from its present state")


@check("added-options", "Options that an earlier update added", modes=BOTH)
def added_options(guest: Guest) -> Iterator[Finding]:
    """--qemu-option of the last update does not stay by itself: each update says anew what to add."""
    if guest.added_options:
        yield note(
            some(guest.added_options),
            "an earlier update's --qemu-option added this; it is left out unless this update adds it again",
        )


@check("foreign-variables", "Variables that are not passed on")
def foreign_variables(guest: Guest) -> Iterator[Finding]:
    """Some QEMU, or an update, would act on them; somebody has planted them, or an earlier update has left them."""
    names = foreign(guest.environ)
    if names:
        yield note(
            some(names),
            "variables of the guest's environment that some QEMU would take for descriptors or orders: they are not "
            "acted on, and the new QEMU does not get them",
        )
