"""What is written down of a guest while its process lives: all that a new one is made from, when it is gone.

Out of scope: what is known only once it is saved (saving.py).
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

from cpr.checks.command import command_of
from cpr.engines.settings import Settings
from cpr.errors import Blocked
from cpr.linux import likeness, pci, proc
from cpr.linux.process import RunFailed, run
from cpr.model import Binary, Storage
from cpr.qemu.cmdline import devices
from cpr.reboot.afresh import afresh
from cpr.reboot.afresh_ram import OF_KERNEL
from cpr.reboot.claims import unit_of
from cpr.reboot.facts import agent_socket
from cpr.reboot.manifest import Directory, RamCopy, SavedGuest, SavedRam, VfioDevice, namespaces_of_its_own

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from cpr.model import Guest, RamBlock, Target

ASK_SECONDS = 10.0


def known_of(
    guest: Guest,
    *,
    target: Target | None = None,
    pinned: str = "",
    lost: Collection[str] = (),
    copy: RamCopy = RamCopy.NONE,
    path: str = "",
) -> SavedGuest:
    """All of it but the seals. `target`: the QEMU that is going to load it; `pinned`: the copy of the old one.

    `lost`: ids of RAM blocks that are made anew; `copy`: how RAM is saved for their sake; `path`: of the state.

    Raises:
        Blocked: its RAM has no path by which it could be found again. ProcessLookupError, OSError.
    """
    pid = guest.process.pid
    like = likeness.likeness_of(pid)
    vfio = tuple(_vfio(guest))
    after = target.binary if target is not None else guest.installed or Binary(path=guest.binary.path)
    return SavedGuest(
        name=guest.name,
        uuid=guest.uuid,
        pid=pid,
        likeness=like,
        own_namespaces=namespaces_of_its_own(like, proc.namespaces(os.getpid())),
        machine=guest.machine,
        runstate=guest.runstate,
        ram=tuple(_anew(block) if block.id in lost else _ram(guest, block) for block in guest.ram),
        state=None,
        disks=(),
        binary_before=guest.binary,
        pinned_binary=pinned,
        binary_after=after,
        ram_copy=copy,
        state_path=path,
        options=target.extra_options if target is not None else (),
        vfio=vfio,
        suspended=bool(vfio),
        monitor=guest.monitor,
        agent=agent_socket(guest),
        unit=unit_of(guest.process),
        pidfile=guest.pidfile,
        directories=directories(guest, target, lost) if target is not None else (),
        guest=replace(guest, not_had_again=()),
        settings=Settings.of(guest, likeness.thread_placement(pid), ()).json(),
        data_directories=data_directories(pid) if pinned else (),
        module_directory=module_directory(pid) if pinned else "",
    )


def _ram(guest: Guest, block: RamBlock) -> SavedRam:
    """Raises Blocked: its path does not lead to this very memory."""
    storage = block.storage
    why = ""
    if storage is None or block.fd is None or not storage.path.startswith("/"):
        why = f"it is {block.backing}, which ends with the process"
    elif not block.shared:
        why = "it is mapped copy-on-write (share=off): what the guest wrote is in no file"
    else:
        try:
            here, there = os.stat(storage.path), os.stat(f"/proc/{guest.process.pid}/fd/{block.fd}")
        except OSError as error:
            why = f"{storage.path}: {error.strerror}"
        else:
            if not same_file(here, there):
                why = f"another file stands at {storage.path} now"
    if why or storage is None:
        hint = "give it RAM in a named file with share=on at its next start; or --mode reboot --save-ram DIR copies it"
        raise Blocked(f"{guest.label}: RAM {block.id} could not be found again: {why}", hint=hint)
    return SavedRam(id=block.id, size=block.size, path=storage.path, storage=storage, offset=block.offset)


def _anew(block: RamBlock) -> SavedRam:
    """Its path is that of a file of the kernel's RAM: where it may be in the way, or its directory has to be."""
    storage = block.storage or Storage(kind=block.backing, path=block.path)
    path = storage.path if storage.kind in OF_KERNEL else ""
    return SavedRam(id=block.id, size=block.size, path=path, storage=storage, offset=block.offset, volatile=True)


def same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """The same device, or the same inode."""
    if stat.S_ISCHR(one.st_mode) and stat.S_ISCHR(other.st_mode):
        return one.st_rdev == other.st_rdev
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def directories(guest: Guest, target: Target, lost: Collection[str] = ()) -> tuple[Directory, ...]:
    """Those in which QEMU makes something when it starts, as they are now; what is not there is left out."""
    found = []
    for path in afresh(guest, target, anew=lost).directories:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            mode = stat.S_IMODE(status.st_mode)
            found.append(Directory(path=path, uid=status.st_uid, gid=status.st_gid, mode=mode))
    return tuple(found)


def make_directories(wanted: Iterable[Directory]) -> None:
    """Make those again that are gone, as they were. OSError."""
    for one in wanted:
        if not os.path.isdir(one.path):
            os.makedirs(one.path, mode=0o755)
            os.chmod(one.path, one.mode)
            if (one.uid, one.gid) != (os.geteuid(), os.getegid()):
                os.chown(one.path, one.uid, one.gid)


def _vfio(guest: Guest) -> list[VfioDevice]:
    command = command_of(guest)
    found = []
    for device in devices(command) if command is not None else ():
        with contextlib.suppress(ValueError, OSError):
            address = pci.passed_through(device.driver, device.params.get("host"), device.params.get("sysfsdev"))
            if address is not None:
                found.append(VfioDevice(address=address, driver=pci.driver(address)))
    return found


# -- the old binary, for the way back


def data_directories(pid: int) -> tuple[str, ...]:
    """Where the QEMU of a process looks for firmware, in its order (`-L help`).

    It finds them relative to itself (util/cutils.c, get_relocated_path), so a copy elsewhere would not.
    """
    program = f"/proc/{pid}/exe"
    with contextlib.suppress(RunFailed, OSError):
        said = run([program, "-L", "help"], timeout=ASK_SECONDS).stdout.decode(errors="surrogateescape")
        return tuple(line for line in said.splitlines() if line.startswith("/"))
    return ()


def module_directory(pid: int) -> str:
    """Where the process has loaded QEMU's modules from; "" where it has none (QEMU_MODULE_DIR)."""
    with contextlib.suppress(OSError):
        return module_directory_in(m.path for m in proc.read_maps(pid))
    return ""


def module_directory_in(paths: Iterable[str]) -> str:
    """The directory called qemu that holds shared objects among `paths`."""
    for path in paths:
        directory, name = os.path.split(path)
        if name.endswith(".so") and os.path.basename(directory) == "qemu":
            return directory
    return ""
