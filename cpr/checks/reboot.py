"""A new host kernel: what of a guest is still there after the jump, whether it can be made, and who is lost by it.

RAM that is not kept is refused without exception, or copied (saveram.py): a guest loaded over what follows it is
corrupted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpr.checks.registry import REBOOT, blocker, check, note, warning
from cpr.checks.words import size, some
from cpr.kernelargs import AVOIDED_BY_KASLR, exposed_ranges, meeting
from cpr.model import Backing, Storage
from cpr.persistence import Persistence, persistence
from cpr.qemu.cmdline import devices

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cpr.model import Finding, Guest, NextKernel, RamBlock
    from cpr.qemu.cmdline import CommandLine

MODES = (REBOOT,)
STATE_BYTES = 64 << 20
"""Of a guest's state file, generously: 0.3 MiB seen, and the video memory comes on top (16 MiB)."""

KEPT_HINT = (
    "give the guest persistent memory at its next start: -object memory-backend-file,share=on with mem-path on device "
    "DAX (/dev/dax0.0, with align=2M) or on a file system mounted with -o dax; a file on a disk is kept too, but slow"
)
COPY_HINT = (
    "; or have its RAM copied to a disk and back with --save-ram DIR: DIR has to have room for {size}, and the guest "
    "stands still for as long as writing and reading that takes"
)
MADE_ANEW = (Backing.ANONYMOUS, Backing.MEMFD, Backing.TMPFS, Backing.HUGETLB)
"""RAM that any kernel has."""


def kept(block: RamBlock, kexec: NextKernel) -> Persistence:
    """What becomes of a RAM block."""
    if not block.shared and block.backing is not Backing.ANONYMOUS:
        why = f"it is a private copy-on-write mapping of a {block.backing} (share=off), which ends with its process"
        return Persistence(kept=False, reason=why)
    return persistence(block.storage or Storage(kind=block.backing, path=block.path), kexec.command_line)


def can_be_copied(block: RamBlock, kexec: NextKernel) -> bool:
    """Whether a block that the jump takes can be had anew after it, to be filled from a file.

    A private mapping needs what it maps, if only to begin with.
    """
    if kept(block, kexec).kept or block.backing is Backing.GUEST_MEMFD:
        return False
    if block.backing in MADE_ANEW:
        return True
    return not block.shared and block.storage is not None and persistence(block.storage, kexec.command_line).kept


def copied(guest: Guest, kexec: NextKernel) -> tuple[RamBlock, ...]:
    """Blocks for whose sake the guest's RAM is copied; none unless that was asked for (--save-ram)."""
    return tuple(b for b in guest.ram if can_be_copied(b, kexec)) if kexec.save_ram is not None else ()


@check("ram-volatile-over-kexec", "RAM that is gone after the jump", ignorable=False, modes=MODES)
def ram_volatile_over_kexec(guest: Guest, kexec: NextKernel) -> Iterator[Finding]:
    """Every RAM block lies on memory that the next kernel leaves alone, or on a disk, or is copied to one."""
    saved = copied(guest, kexec)
    whole = size(sum(block.size for block in guest.ram))
    for block in guest.ram:
        found = kept(block, kexec)
        if found.kept or found.memmap or block in saved:
            continue
        where = f" at {block.path}" if block.path else ""
        yield blocker(
            block.id,
            f"{size(block.size)} of RAM ({block.backing}{where}) would be lost: {found.reason}",
            KEPT_HINT + (COPY_HINT.format(size=whole) if can_be_copied(block, kexec) else ""),
        )


@check("memmap-missing", "Persistent memory that the next kernel would not leave alone", ignorable=False, modes=MODES)
def memmap_missing(guest: Guest, kexec: NextKernel) -> Iterator[Finding]:
    """kexec does not carry a memmap= over: it has to be on the new command line as well."""
    for block in guest.ram:
        found = kept(block, kexec)
        if found.memmap:
            yield blocker(
                block.id,
                f"{size(block.size)} of RAM at {block.path} would be lost: {found.reason}",
                f"keep the running command line (--reuse-cmdline), or add {found.memmap} with --append",
            )


@check("memmap-kaslr", "Persistent memory that the next kernel may unpack itself over", ignorable=False, modes=MODES)
def memmap_kaslr(guest: Guest, kexec: NextKernel) -> Iterator[Finding]:
    """Each jump throws the dice, and what is hit is the guest's RAM, or the block by which the device is known."""
    exposed = exposed_ranges(kexec.command_line)
    lying = [(b.id, f"{size(b.size)} of RAM at {b.path}", b.storage) for b in guest.ram if kept(b, kexec).kept]
    lying += [(disk.path, f"the image {disk.path}", disk) for disk in guest.disks]
    for subject, what, storage in lying:
        region = storage.pmem if storage is not None else None
        if region is not None and region.start is not None and meeting(exposed, region.start, region.size):
            yield blocker(
                subject,
                f"{what} may be overwritten: the next kernel puts itself at a random address, and leaves the first "
                f"{AVOIDED_BY_KASLR} regions of memmap= alone and no others",
                "add nokaslr with --append; or write the regions as one list (memmap=A,B,C,D,E), for more than "
                f"{AVOIDED_BY_KASLR} in one switch that off, too",
            )


@check("ram-on-disk", "RAM that is read from a disk after the jump", modes=MODES)
def ram_on_disk(guest: Guest, kexec: NextKernel) -> Iterator[Finding]:
    """It works, but the guest waits for every page."""
    for block in guest.ram:
        found = kept(block, kexec)
        if found.kept and found.slow:
            yield warning(
                block.id,
                f"{size(block.size)} of RAM is {found.reason}: it is written there before the jump, and read page by "
                "page when the guest runs again, which it notices as stalls of seconds",
                "device DAX or a file system mounted with -o dax are as quick as memory",
            )


@check("disk-volatile-over-kexec", "A disk that is gone after the jump", ignorable=False, modes=MODES)
def disk_volatile_over_kexec(guest: Guest, kexec: NextKernel) -> Iterator[Finding]:
    """Images on tmpfs, RAM disks, or on memory that the next kernel takes."""
    for storage in guest.disks:
        if storage.kind is Backing.UNKNOWN and not storage.volatile:
            continue  # a block device, or something that is no file: not judged
        found = persistence(storage, kexec.command_line)
        if not found.kept:
            yield blocker(
                storage.path, f"the image {storage.path} would be lost: {found.reason}", "move it to a disk"
            )


@check("kexec-impossible", "This host cannot jump into another kernel", ignorable=False, modes=MODES)
def kexec_impossible(kexec: NextKernel) -> Iterator[Finding]:
    """Found out without loading one; that is done before the first guest is paused."""
    for why in kexec.obstacles:
        yield blocker(
            "kexec", why, "restart the guests with `cpr update --restart`, or reboot with the guests shut down"
        )


@check("kexec-kernel-missing", "No kernel to jump into", ignorable=False, modes=MODES)
def kexec_kernel_missing(kexec: NextKernel) -> Iterator[Finding]:
    """Kernel and initrd are there; without an initrd the host may not find its root."""
    for path in kexec.missing:
        yield blocker(path, f"{path} is not there", "name kernel and initrd with --kernel and --initrd")
    if not kexec.image:
        yield blocker("kernel", "no installed kernel was found in /boot", "install one, or name it with --kernel")
    elif not kexec.initrd and not kexec.missing:
        yield warning(
            kexec.image,
            f"{kexec.image} ({kexec.release}) has no initrd beside it: the host may not find its root file system",
            "name it with --initrd, or make it (update-initramfs, dracut)",
        )


@check("guest-not-saved", "A guest on this host that nobody saves", ignorable=False, modes=MODES)
def guest_not_saved(kexec: NextKernel) -> Iterator[Finding]:
    """The jump ends every process on the host."""
    for label in kexec.unsaved:
        yield blocker(
            label,
            f"{label} runs on this host, is not going to be saved, and would end with the jump",
            "update it too (--all), shut it down, or name it as lost with --abandon NAME",
        )


@check("room-state", "Room for the guests' state", ignorable=False, modes=MODES)
def room_state(kexec: NextKernel) -> Iterator[Finding]:
    """State files are written to a disk that is there after the jump."""
    if kexec.state_directory_volatile:
        yield blocker(
            kexec.state_directory,
            f"state written to {kexec.state_directory} would be lost: {kexec.state_directory_volatile}",
            "name a directory on a disk",
        )
    elif kexec.state_directory_free is not None and kexec.state_directory_free < STATE_BYTES:
        yield blocker(
            kexec.state_directory,
            f"{size(kexec.state_directory_free)} are left in {kexec.state_directory}, and a guest's state may take "
            f"{size(STATE_BYTES)}",
            "make room there, or name another directory on a disk",
        )


@check("restore-not-enabled", "Nothing restores the guests after the jump", modes=MODES)
def restore_not_enabled(kexec: NextKernel) -> Iterator[Finding]:
    """Otherwise they stay saved until somebody comes and restores them."""
    if not kexec.restores_by_itself:
        yield blocker(
            "cpr-restore.service",
            "the unit that restores guests after the boot is not enabled: they would stay saved until somebody runs "
            "`cpr restore`",
            "systemctl enable cpr-restore.service, or --ignore restore-not-enabled and run `cpr restore` by hand",
        )


@check("live-update", "A kernel that could carry memfds over", modes=MODES)
def live_update(guest: Guest, kexec: NextKernel) -> Iterator[Finding]:
    """/dev/liveupdate (kernel 6.19): seen, not used yet."""
    memfds = [block.id for block in guest.ram if block.backing is Backing.MEMFD]
    if kexec.live_update and memfds:
        yield note(
            "/dev/liveupdate",
            f"this kernel can carry memfds ({some(memfds)}) over a kexec, which this release does not use",
            "",
        )


# -- VFIO


def _vfio(guest: Guest) -> list[str]:
    found = [d.id for d in guest.devices if d.type.startswith("vfio-")]
    return found or [f"fd {f.number}" for f in guest.open_files if f.kind == "vfio"][:1]


@check("vfio-no-agent", "A passed-through device that cannot be put to sleep", ignorable=False, modes=MODES)
def vfio_no_agent(guest: Guest) -> Iterator[Finding]:
    """QEMU saves a guest with VFIO only when it is suspended to RAM, which only the guest itself can do."""
    held = _vfio(guest)
    if not held:
        return
    agent = guest.agent
    if agent is None:
        why = "it has no guest agent port (virtserialport org.qemu.guest_agent.0)"
        hint = "give it one at its next start, and qemu-guest-agent in the guest; or unplug the device for the update"
    elif agent.error:
        why, hint = f"its guest agent cannot be asked ({agent.error})", "start qemu-guest-agent in the guest"
    elif not agent.can_suspend:
        why = f"its guest agent ({agent.version}) has guest-suspend-ram disabled"
        hint = "allow it in the agent's configuration in the guest (block-rpcs, allow-rpcs)"
    elif guest.s3_disabled:
        why = "its firmware does not offer suspend to RAM (S3)"
        hint = "start it the next time with -global ICH9-LPC.disable_s3=0 (pc: PIIX4_PM.disable_s3=0)"
    else:
        return
    yield blocker(
        some(held), f"{some(held)} is passed through: the guest has to be suspended for the jump, and {why}", hint
    )


@check("vfio-mdev", "A mediated device, or none of PCI", ignorable=False, modes=MODES)
def vfio_mdev(command: CommandLine) -> Iterator[Finding]:
    """Its state is in the host's driver, and ends with this kernel."""
    for device in devices(command):
        place = device.params.get("sysfsdev") or ""
        if device.driver.startswith("vfio-") and ("/mdev/" in place or place.count("-") >= 4):
            yield blocker(
                device.id or device.driver,
                f"{device.driver} on {place} is a mediated device (mdev): its state ends with this kernel",
                "unplug it for the update and plug it in again",
            )
        elif device.driver.startswith("vfio-") and not device.driver.startswith("vfio-pci"):
            yield blocker(
                device.id or device.driver,
                f"{device.driver} is no PCI device: it cannot be bound again after the boot",
                "unplug it for the update and plug it in again",
            )
