"""RAM: whether a second QEMU can map the same pages, whether the stream leaves them out, and who would write them.

The heart of the pre-check: a guest that passes here wrongly is a corrupted guest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpr.checks.registry import BOTH, blocker, check, note
from cpr.checks.words import size
from cpr.model import Backing
from cpr.qemu.cmdline import devices

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cpr.model import Finding, Guest, Host, RamBlock, Rehearsal, Target
    from cpr.qemu.cmdline import CommandLine

NAMED_FILES_ONLY = (8, 1)
"""From this QEMU on x-ignore-shared skips `memory-backend-file` alone (8.1, "exec/memory: Introduce RAM_NAMED_FILE
flag"); before it every shared block. Nothing that can be asked tells the two apart, so this goes by the version."""

SKIPPING_ENGINES = ("handover", "reexec")
"""Engines that move the state by a stream with x-ignore-shared."""

SHARE_HINT = (
    "start it the next time with `cpr run`, or with its memory on -object memory-backend-file,share=on"
    " (for example mem-path=/dev/shm/NAME); until then only a shutdown and a start update this guest"
)


@check("ram-volatile", "RAM that a second process cannot map", ignorable=False)
def ram_volatile(guest: Guest, host: Host, target: Target | None = None) -> Iterator[Finding]:
    """Every RAM block is shared memory with something behind it that can be mapped again."""
    hint = SHARE_HINT + _kept_over_exec(host, target)
    for block in guest.ram:
        why = _volatile(block)
        if why:
            yield blocker(
                block.id,
                f"{size(block.size)} of RAM ({block.qom_type}) {why}: it would be gone with the old QEMU",
                hint,
            )


V1_COMMANDS = frozenset({"cprsave", "cprload", "cprinfo"})
"""Of a QEMU that marks its private RAM by MADV_DOEXEC and executes itself; the next dialects, with `cprexec` at last,
have memfds instead."""


def keeps_private_ram(host: Host, target: Target) -> bool:
    """Whether a QEMU of that kind could take private RAM along, on a kernel that was seen to keep it over an exec."""
    return host.keeps_memory_over_exec and target.commands >= V1_COMMANDS and "cprexec" not in target.commands


def _kept_over_exec(host: Host, target: Target | None) -> str:
    if not host.keeps_memory_over_exec or target is None:
        return ""
    if keeps_private_ram(host, target):
        return "; this kernel (MADV_DOEXEC) and the new QEMU (cprsave) could keep it, which this release does not use"
    return "; this kernel keeps private memory over an exec (MADV_DOEXEC), but only a QEMU with cprsave makes use of it"


def _volatile(block: RamBlock) -> str:
    match block.backing:
        case Backing.GUEST_MEMFD:
            return "is guest_memfd (confidential computing), which no second QEMU can take over"
        case Backing.ANONYMOUS:
            return "is anonymous memory" + (" (share=on has no file behind it)" if block.shared else "")
        case Backing.UNKNOWN:
            return "is of a kind that cannot be told from /proc"
    return "" if block.shared else f"is a private copy-on-write mapping of a {block.backing} (share=off)"


@check("ram-not-skipped", "RAM that the state stream would copy", ignorable=False, engines=SKIPPING_ENGINES)
def ram_not_skipped(guest: Guest) -> Iterator[Finding]:
    """From QEMU 8.1 on only named files are left out of the stream; a copy would be written over live RAM."""
    if not skips_named_files_only(guest.binary.version):
        return
    which = f"QEMU {guest.binary.version}" if version_of(guest.binary.version) else "a QEMU of unknown version"
    for block in guest.ram:
        if not _volatile(block) and not block.named_file:
            yield blocker(
                block.id,
                f"{size(block.size)} of RAM is {block.backing} ({block.qom_type}), and {which} copies all shared RAM "
                "but memory-backend-file into the stream (since 8.1): the copy would overwrite RAM in use",
                SHARE_HINT,
            )


@check("ram-fd-missing", "RAM whose descriptor cannot be had", ignorable=False)
def ram_fd_missing(guest: Guest) -> Iterator[Finding]:
    """A descriptor of every block is found in the guest's process: a path may lead elsewhere by now."""
    for block in guest.ram:
        if not _volatile(block) and block.fd is None:
            yield blocker(
                block.id,
                f"no descriptor of the process is this RAM ({block.path or block.backing}), so it cannot be handed on",
                "see `cpr show` for what was found; run cpr as root if descriptors could not be read",
            )


@check("ram-discarded-at-exit", "RAM that QEMU throws away when it ends", modes=BOTH)
def ram_discarded_at_exit(guest: Guest) -> Iterator[Finding]:
    """discard-data=on punches the pages out of the shared file at exit: on every version, measured."""
    for block in guest.ram:
        if block.discard_data and block.qom_path:
            yield note(block.id, "discard-data=on would throw this RAM away at the old QEMU's end: it is switched off")
        elif block.discard_data:
            yield blocker(
                block.id,
                "discard-data=on would throw this RAM away at the old QEMU's end, and the backend cannot be reached "
                "to switch it off",
                "start the guest the next time without discard-data=on (libvirt: without <discard/>)",
                ignorable=False,
            )


VIRTIO_MEM_KEEPS = (8, 1)
"""From this QEMU on virtio-mem leaves its RAM alone when it waits for state (8.1, "virtio-mem: Support
"x-ignore-shared" migration"); before it the device's start throws the pages away. Nothing that can be asked tells."""


@check("writes-ram-at-start", "Options by which the new QEMU would write guest RAM", ignorable=False, modes=BOTH)
def writes_ram_at_start(
    command: CommandLine, target: Target | None = None, rehearsal: Rehearsal | None = None
) -> Iterator[Finding]:
    """A second QEMU must not write the RAM it maps: the loader device does, incoming state or not."""
    for device in devices(command):
        source = next((key for key in ("data", "file") if key in device.params), None)
        if device.driver == "loader" and source is not None:
            what = f"{source}={device.params.get(source)}"
            yield blocker(
                device.id or f"loader {what}",
                f"-device loader,{what} is written into the guest's RAM whenever a QEMU starts",
                "start the guest the next time without it (-kernel, -initrd and firmware are fine)",
            )
        elif device.driver.startswith("virtio-mem") and _throws_away(target):
            yield blocker(
                device.id or device.driver,
                f"{device.driver} of the new QEMU ({target.binary if target else '?'}) would throw this RAM away as it "
                "starts, while the guest uses it",
                "choose QEMU 8.1 or newer with --qemu, or unplug the device",
            )
    for block, count in rehearsal.written if rehearsal else ():
        yield blocker(
            block,
            f"the rehearsed start of the new QEMU wrote {size(count)} into this RAM, which the guest is using",
            "`cpr show` lists the command line; the option that loads something into RAM has to go",
        )


def skips_named_files_only(version: str | None) -> bool:
    """Whether a QEMU of this version leaves no other shared RAM out of a stream; one of unknown version may not."""
    known = version_of(version)
    return known is None or known >= NAMED_FILES_ONLY


def _throws_away(target: Target | None) -> bool:
    return target is not None and (version_of(target.binary.version) or (0, 0)) < VIRTIO_MEM_KEEPS


def version_of(text: str | None) -> tuple[int, int] | None:
    """(major, minor) of a version, None where it is unknown."""
    parts = (text or "").split(".")
    if len(parts) < 2 or not parts[0].isdigit() or not parts[1].isdigit():
        return None
    return int(parts[0]), int(parts[1])
