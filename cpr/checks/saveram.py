"""RAM that a jump takes, and that is copied to a disk because somebody asked for that (--save-ram DIR).

Everything that it costs is said before anything is touched: how much is written, where, and how long nobody runs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cpr.checks.reboot import MODES, STATE_BYTES, copied
from cpr.checks.registry import blocker, check, note, warning
from cpr.checks.words import size, some
from cpr.model import Backing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cpr.model import Finding, Guest, NextKernel, RamDirectory

HUGE = 1 << 20
"""Pages from here on come out of a pool."""
SPARE_SECONDS = 60


def amount(guest: Guest, kexec: NextKernel) -> tuple[int, int]:
    """Bytes that are written of a guest, about and at most: all of its RAM, or nothing.

    About: what its process has in memory; pages that nobody has touched are not written. Huge pages are not in that.
    """
    if not copied(guest, kexec):
        return 0, 0
    most = sum(block.size for block in guest.ram)
    huge = sum(block.size for block in guest.ram if _huge(block.page_size, block.backing))
    return min(most, (guest.resident + huge) or most), most


def _huge(page_size: int, backing: Backing) -> bool:
    return backing is Backing.HUGETLB or page_size >= HUGE


def _wanted(kexec: NextKernel, guest: Guest | None) -> tuple[int, int]:
    """Of all guests; of this one where it is saved alone."""
    if guest is not None:
        return amount(guest, kexec)
    return (kexec.save_ram.likely, kexec.save_ram.most) if kexec.save_ram is not None else (0, 0)


@check("save-ram", "RAM that is copied to a disk for the jump", modes=MODES)
def save_ram(guest: Guest, kexec: NextKernel) -> Iterator[Finding]:
    """The guest stands still for the whole of it, twice."""
    blocks = copied(guest, kexec)
    if kexec.save_ram is None or not blocks:
        return
    likely, most = amount(guest, kexec)
    kinds = some(f"{b.id}: {b.backing}{'' if b.shared else ', private'}" for b in blocks)
    yield warning(
        some(b.id for b in blocks),
        f"its RAM ({kinds}) is not kept over the jump and is copied to {kexec.save_ram.path}, about {size(likely)} and "
        f"at most {size(most)}: the guest stands still while that is written, and while it is read after the boot",
    )
    pages: dict[int, int] = {}
    for block in blocks:
        if block.page_size >= HUGE:
            pages[block.page_size] = pages.get(block.page_size, 0) + -(-block.size // block.page_size)
    for page, count in pages.items():
        yield note(
            "huge pages",
            f"{count} huge pages of {size(page)} have to be free after the boot, before the guest is restored",
            "reserve them on the next kernel's command line (hugepages=) or in /etc/sysctl.d (vm.nr_hugepages)",
        )


@check("save-ram-directory", "Nowhere to copy RAM to", ignorable=False, modes=MODES)
def save_ram_directory(kexec: NextKernel) -> Iterator[Finding]:
    """It is on a disk that is there after the jump, and nobody else may read it."""
    directory = kexec.save_ram
    if directory is None:
        return
    if directory.unusable:
        yield blocker(
            directory.path,
            f"the guests' memory cannot be written to {directory.path}: {directory.unusable}",
            "name a directory of root's alone (chmod 700), or one that is not there yet",
        )
    if directory.volatile:
        yield blocker(
            directory.path,
            f"RAM copied to {directory.path} would be lost: {directory.volatile}",
            "name a directory on a disk",
        )


@check("save-ram-space", "Room for the copy of RAM", modes=MODES)
def save_ram_space(kexec: NextKernel, guest: Guest | None = None) -> Iterator[Finding]:
    """Of all of it, though zeroes take no room: how much there is of them shows too late."""
    directory, (likely, most) = kexec.save_ram, _wanted(kexec, guest)
    if directory is not None and most and directory.free < most + STATE_BYTES:
        yield blocker(
            directory.path,
            f"{size(directory.free)} are left in {directory.path}, and the copy of RAM may take "
            f"{size(most + STATE_BYTES)} (about {size(likely)} are in use)",
            "make room there or name another directory; with --ignore save-ram-space the guests run again if it fills",
        )


@check("save-ram-time", "How long the copy of RAM takes", modes=MODES)
def save_ram_time(kexec: NextKernel, guest: Guest | None = None) -> Iterator[Finding]:
    """From a short measurement. No guest of a jump runs before the last of them is saved."""
    directory, (likely, most) = kexec.save_ram, _wanted(kexec, guest)
    if directory is None or not most:
        return
    if directory.rate is None:
        why = directory.unmeasured or "it was not measured"
        yield warning(
            directory.path,
            f"how long the copy of {_span(size(likely), size(most))} of RAM takes is not estimated: {why}"
            + _undone_after(directory),
        )
        return
    short, long = likely / directory.rate, most / directory.rate
    told = (
        f"{_span(size(likely), size(most))} of RAM are written in about {_span(_time(short), _time(long))} "
        f"({size(directory.rate)} a second were measured), and no guest runs meanwhile; reading them "
        "after the boot takes about as long again"
    )
    if directory.timeout and short > directory.timeout:
        yield blocker(directory.path, told + _undone_after(directory), _longer(long))
    elif directory.timeout and long > directory.timeout:
        yield warning(directory.path, told + _undone_after(directory), _longer(long))
    else:
        yield warning(directory.path, told)


def _span(least: str, most: str) -> str:
    return least if least == most else f"{least} to {most}"


def _undone_after(directory: RamDirectory) -> str:
    return f"; after {_time(directory.timeout)} (--timeout) everything is undone" if directory.timeout else ""


def _longer(seconds: float) -> str:
    return f"allow more with --timeout {math.ceil(seconds) + SPARE_SECONDS}"


def _time(seconds: float) -> str:
    """For people: 1 s, 90 s, 4 min, 2.5 h."""
    if seconds < 120:
        return f"{max(1, math.ceil(seconds))} s"
    return f"{math.ceil(seconds / 60)} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
