"""After the boot: what a guest has of its process, namespaces and supervisor that no start can give it again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpr.checks.reboot import MODES, kept
from cpr.checks.registry import blocker, check, note
from cpr.checks.words import some

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cpr.model import Finding, Guest, NextKernel

STANDARD = (0, 1, 2)
QUIET = "/dev/null"

_NEEDED = {
    "interface": "the tap interface {} has to be there, up, and in its bridge",
    "bridge": "the bridge {} has to be there",
    "socket": "somebody has to listen at {}",
    "address": "somebody has to listen at {}",
}

_LOST = {
    "libvirt": (
        "libvirt would not know the restored guest: it takes the end of the process for the end of the domain, and "
        "may start it afresh over the same disks",
        "shut it down or let libvirt save it to a disk (virsh managedsave) for the reboot, and name it with --abandon",
    ),
    "container": (
        "its container ends at the jump, with everything that the guest has of it",
        "shut it down for the reboot and name it with --abandon; a guest that `cpr run` starts is in no container",
    ),
}


@check("descriptor-not-recreated", "What was passed in by number and cannot be had again", ignorable=False, modes=MODES)
def descriptor_not_recreated(guest: Guest, kexec: NextKernel) -> Iterator[Finding]:
    """Every descriptor of the process is gone after the boot: the guest is started with paths and names."""
    lost = {block.id for block in guest.ram if not kept(block, kexec).kept}  # `ram-volatile-over-kexec` says why
    for missing in guest.not_had_again:
        if missing.subject not in lost:
            yield blocker(missing.subject, missing.why, missing.hint)


@check("needed-after-boot", "What has to be there before a guest is restored", modes=MODES)
def needed_after_boot(guest: Guest) -> Iterator[Finding]:
    """Made by somebody else: the host's network configuration, another service."""
    for kind, name in guest.needed_after_boot:
        yield note(name, f"{_NEEDED[kind].format(name)} before the guest is restored after the boot")


@check("namespace-own", "Namespaces that end at the jump", ignorable=False, modes=MODES)
def namespace_own(guest: Guest) -> Iterator[Finding]:
    """They were made by whoever started the guest, and nobody makes them again."""
    if guest.own_namespaces:
        names = some(guest.own_namespaces)
        yield blocker(
            names,
            f"the guest runs in namespaces of its own ({names}), which are gone after the boot with the mounts, "
            "interfaces and users in them",
            "shut it down for the reboot and name it with --abandon; start it the next time in the host's namespaces",
        )


@check("stdio-after-boot", "Standard output that goes to a log", modes=MODES)
def stdio_after_boot(guest: Guest) -> Iterator[Finding]:
    """Terminals, pipes and files that a shell had opened are not opened again."""
    targets = {f.number: f.target for f in guest.open_files if f.number in STANDARD and f.target != QUIET}
    consoles = [c.label for c in guest.chardevs if c.backend == "stdio"]
    if targets or consoles:
        where = some(dict.fromkeys(targets.values())) or "what it has now"
        also = f"; nobody is connected to {some(consoles)}" if consoles else ""
        yield note(
            "stdio",
            f"after the boot its standard output and error go to a log in the run directory, not to {where}{also}",
        )


@check("supervised-after-boot", "Who knows the guest, and would not after the boot", modes=MODES)
def supervised_after_boot(guest: Guest) -> Iterator[Finding]:
    """It comes back as a process that nobody started but cpr."""
    for supervisor in guest.supervisors:
        subject = f"{supervisor.kind} {supervisor.who}".strip()
        if supervisor.kind in _LOST:
            why, hint = _LOST[supervisor.kind]
            yield blocker(subject, why, hint, ignorable=False)
        elif supervisor.who and supervisor.who == guest.unguarded_unit:
            yield blocker(
                subject,
                f"systemd would start {supervisor.who} afresh in the next boot, a second QEMU over the memory and "
                "disks of the saved guest",
                "give the service the drop-in cpr-guest.conf (docs/systemd.md), or disable it for this boot",
            )
        elif supervisor.kind == "systemd":
            yield note(
                subject,
                f"the guest comes back beside {supervisor.who}, which stays inactive; `systemctl stop` does not reach "
                "it any more",
            )
        else:
            yield note(subject, f"{supervisor.who} ends at the jump, and nobody takes its place as the guest's parent")
