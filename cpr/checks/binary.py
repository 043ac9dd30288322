"""The new QEMU: whether it is another one, knows the guest's machine, devices and options, and starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpr.checks.registry import BOTH, blocker, check, note, warning
from cpr.checks.words import some
from cpr.qemu.cmdline import settings
from cpr.qemu.options import translate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cpr.model import Binary, Finding, Guest, Rehearsal, Target
    from cpr.qemu.cmdline import CommandLine


def same_binary(one: Binary, other: Binary) -> bool:
    """Whether both are the same build: by build id where both have one, else by device and inode."""
    if one.build_id and other.build_id:
        return one.build_id == other.build_id
    return one.identity != (0, 0) and one.identity == other.identity


@check("binary-same", "The new QEMU is the one that runs")
def binary_same(guest: Guest, target: Target) -> Iterator[Finding]:
    """Allowed when asked for; with no guest named such a one is left alone."""
    if same_binary(guest.binary, target.binary) and not target.extra_options:
        yield note(target.binary.path, f"the guest runs this very QEMU {target.binary.version or ''} already".rstrip())


@check("machine-unknown", "A machine type that the new QEMU does not have", ignorable=False, modes=BOTH)
def machine_unknown(guest: Guest, target: Target) -> Iterator[Finding]:
    """Concrete machine types are kept for some years and then removed."""
    known = target.machines | set(target.machine_aliases)
    if guest.machine not in known:
        yield blocker(
            guest.machine or "machine",
            f"the new QEMU ({target.binary}) has no machine type {guest.machine or '(unknown)'}, and a running guest "
            "cannot change its machine",
            "choose a QEMU that has it with --qemu, or shut the guest down and give it a newer machine type",
        )


@check("device-unknown", "Device models that the new QEMU does not have", ignorable=False, modes=BOTH)
def device_unknown(guest: Guest, target: Target) -> Iterator[Finding]:
    """Some come as modules in packages of their own, others were removed from QEMU."""
    missing: dict[str, list[str]] = {}
    for device in guest.devices:
        if target.device_types and device.type not in target.device_types:
            missing.setdefault(device.type, []).append(device.id)
    for kind, ids in missing.items():
        yield blocker(
            some(ids),
            f"the new QEMU ({target.binary}) has no device {kind}",
            "install the package that has its module, or choose a QEMU that has it with --qemu",
        )


@check("options-removed", "Options that the new QEMU does not know", ignorable=False, modes=BOTH)
def options_removed(command: CommandLine, target: Target) -> Iterator[Finding]:
    """What was renamed is translated by asking the new binary; what is left would end its start."""
    if target.options is None:
        return
    translation = translate(command, target.options)
    for words in translation.unknown:
        yield blocker(
            words,
            f"the new QEMU ({target.binary}) does not know {words}, and there is no other word for it",
            "start the guest the next time without it, or choose a QEMU that has it with --qemu",
        )
    for words in translation.changes:
        yield note("command line", words)


@check("start-refused", "The new QEMU does not start with this command line", ignorable=False, modes=BOTH)
def start_refused(rehearsal: Rehearsal) -> Iterator[Finding]:
    """Rehearsed with null back ends and throw-away RAM; QEMU's own words."""
    if not rehearsal.started:
        yield blocker(
            "rehearsal",
            f'the new QEMU was started for a try and did not come up: "{rehearsal.words or "it said nothing"}"',
            "what it names has to be there for the new QEMU too",
        )


@check("cpu-differs", "CPU features that differ in the new QEMU", modes=BOTH)
def cpu_differs(rehearsal: Rehearsal) -> Iterator[Finding]:
    """The guest keeps what it has seen in CPUID at its boot; the new vCPUs may not have it."""
    if rehearsal.cpu_differences:
        yield warning(
            "cpu",
            f"the vCPUs of the new QEMU differ: {some(rehearsal.cpu_differences)}",
            "under KVM a concrete CPU model instead of host or max keeps them alike",
        )


@check("accelerator-changes", "Another accelerator", ignorable=False, modes=BOTH)
def accelerator_changes(guest: Guest, command: CommandLine, rehearsal: Rehearsal | None = None) -> Iterator[Finding]:
    """vCPU state moves between TCG and KVM neither safely nor at a speed that anybody wants."""
    there = rehearsal.accelerator if rehearsal else ""
    if there and guest.accelerator and there != guest.accelerator:
        yield blocker(
            there,
            f"the guest runs with {guest.accelerator}, the new QEMU comes up with {there}",
            "see that /dev/kvm is there and may be opened by the guest's user",
        )
    elif not there and len(settings(command).accel) > 1:
        yield warning(
            " ".join(settings(command).accel),
            f"several accelerators are named; the guest runs with {guest.accelerator}, and the new QEMU takes the "
            "first that works",
        )
