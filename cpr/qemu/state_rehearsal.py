"""A rehearsing QEMU that can load the guest's own state: its RAM is a copy-on-write mapping of the guest's.

What virtio rings, page tables and firmware tables the load looks at are the guest's own, and what it writes there stays
with it. A character device of DAX has no such mappings: each page of it that the load looks at is copied. Everything
else is as in `rehearsal`: null back ends, empty disks of the true sizes, taps in a network namespace of their own. Out
of scope: getting the state, sending it, judging what comes of it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from cpr.errors import CprError
from cpr.linux import proc, stub, tun
from cpr.linux.fds import Fd, take_fd
from cpr.linux.lazycopy import LazyCopies, Source, empty_memory_file
from cpr.linux.syscalls import tun_interface
from cpr.model import Backing
from cpr.qemu import cmdline as cl
from cpr.qemu.cmdline.facts import Device as GivenDevice
from cpr.qemu.options import translate
from cpr.qemu.rehearsal import MONITOR_NUMBER, NotStarted, Started, base_command, disk_sizes, started

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cpr.linux.process import Process
    from cpr.model import Guest, RamBlock, Target

DISCARDS = "virtio-mem"
"""Punches holes into the file behind its RAM when it is made or loaded, however that is mapped
(system/physmem.c, ram_block_discard_range)."""


class CannotRehearse(Exception):
    """It started, and the state must not be given to it. Why, in words."""


def not_rehearsable(guest: Guest) -> tuple[str, ...]:
    """What of the guest keeps its state from being rehearsed; empty where nothing does.

    Devices that are nothing without the world outside have their part in the state, which no QEMU without them takes.
    """
    line = base_command(guest, with_added=True)
    left_out = cl.not_rehearsed(line)
    names = [f"{d.driver} {d.id or ''}".strip() for d in left_out if isinstance(d, GivenDevice)]
    names += [f"{d.type} {d.id}" for d in guest.devices if d.type.startswith(DISCARDS)]
    names += [f"RAM {b.id}" for b in guest.ram if not _mappable(b)]
    named = {netdev.id for netdev in cl.netdevs(line)}
    taps = [netdev for netdev in guest.netdevs if netdev.fds]
    names += [f"network {n.id}" for n in taps if n.id not in named or not _taps_can_be_made()]
    return tuple(dict.fromkeys(names))


def _taps_can_be_made() -> bool:
    """Without one like its own a NIC may refuse its own state: offloads and queues in use are in that."""
    try:
        for fd in tun.throw_away_queues(0, 1):
            fd.close()
    except OSError:
        return False
    return True


def _mappable(ram: RamBlock) -> bool:
    if ram.fd is None or not ram.shared:
        return False
    return ram.backing is not Backing.DEVDAX or stub.architecture() is not None


@contextlib.contextmanager
def new_qemu(
    guest: Guest, target: Target, old: Process, *, timeout: float, attend: Callable[[], None], state: bool
) -> Iterator[Started]:
    """The QEMU to go to, waiting for a state; without `state` only started, with throw-away RAM.

    Raises:
        NotStarted: why not. CannotRehearse. OSError: the guest is gone, or we may not take its descriptors.
    """
    try:
        line = translate(cl.with_program(base_command(guest), target.binary.path), target.options).cmdline
        line = cl.append_options(line, target.extra_options)
    except cl.CommandLineError as error:
        raise NotStarted(str(error)) from None
    binary = target.binary
    with _over_guest(guest, line, (binary.path, binary.identity), old, timeout, attend, state) as it:
        yield it


@contextlib.contextmanager
def old_qemu(
    guest: Guest, old: Process, *, timeout: float, attend: Callable[[], None], state: bool
) -> Iterator[Started]:
    """The QEMU that the guest is in, started once more from the very file it was started from, be that deleted.

    What it loads besides (libraries, modules, firmware) is what stands there today. Errors as `new_qemu`.
    """
    with Fd(os.open(f"/proc/{old.pid}/exe", os.O_PATH | os.O_CLOEXEC)) as binary:
        try:
            line = base_command(guest, with_added=True)
        except cl.CommandLineError as error:
            raise NotStarted(str(error)) from None
        with _over_guest(guest, line, binary, old, timeout, attend, state) as it:
            yield it


@contextlib.contextmanager
def _over_guest(
    guest: Guest,
    line: cl.CommandLine,
    program: Fd | tuple[str, tuple[int, int] | None],
    old: Process,
    timeout: float,
    attend: Callable[[], None],
    state: bool,
) -> Iterator[Started]:
    with contextlib.ExitStack() as held:
        numbers = itertools.count(MONITOR_NUMBER + 1)
        descriptors: dict[int, Fd] = {}

        def give(fd: Fd) -> int:
            number = next(numbers)
            descriptors[number] = held.enter_context(fd)
            return number

        ram: dict[str, int] = {}
        inodes: dict[str, int] = {}
        copied: list[Source] = []
        for block in guest.ram if state else ():
            memory = _ram(old, block)
            if block.backing is Backing.DEVDAX:  # cannot be mapped copy-on-write (drivers/dax/device.c, check_vma)
                copied.append(Source(held.enter_context(memory), empty_memory_file(block.offset + block.size)))
                memory = copied[-1].seen
            inodes[block.id] = os.fstat(memory.number).st_ino
            ram[block.id] = give(memory)
        taps = {name: [give(fd) for fd in queues] for name, queues in _taps(guest, old)} if state else {}
        if isinstance(program, Fd):
            status = os.fstat(program.number)
            program = f"/proc/self/fd/{give(program.dup())}", (status.st_dev, status.st_ino)
        try:
            rehearsed = cl.for_rehearsal(
                line, monitor_fd=MONITOR_NUMBER, disk_sizes=disk_sizes(guest), ram_fds=ram, tap_fds=taps
            )
            for block in guest.ram:
                if block.id in ram and block.page_size > os.sysconf("SC_PAGESIZE"):
                    rehearsed = cl.without_reservation(rehearsed, block.id)
        except cl.CommandLineError as error:
            raise NotStarted(str(error)) from None
        it = held.enter_context(
            started(guest, *program, rehearsed, timeout=timeout, descriptors=descriptors, attend=attend)
        )
        if state:
            _see_private(it.process.pid, inodes)
        if copied:
            it = replace(it, copies=held.enter_context(_begun(it.process, copied)))
        yield it


def _begun(process: Process, sources: Sequence[Source]) -> LazyCopies:
    try:
        return LazyCopies.begin(process, sources)
    except (OSError, CprError, ValueError) as error:
        raise CannotRehearse(f"its RAM cannot be copied page by page ({error})") from None


def _ram(old: Process, block: RamBlock) -> Fd:
    assert block.fd is not None
    fd = take_fd(old.pidfd, block.fd)
    if block.inode and os.fstat(fd.number).st_ino != block.inode:
        fd.close()
        raise NotStarted(f"descriptor {block.fd} of the guest is not its RAM {block.id} any more")
    return fd


def _taps(guest: Guest, old: Process) -> Iterator[tuple[str, list[Fd]]]:
    """(netdev, throw-away queues like its own)."""
    for netdev in guest.netdevs:
        if not netdev.fds:
            continue
        with take_fd(old.pidfd, netdev.fds[0]) as queue:
            _, flags = tun_interface(queue.number)
        yield netdev.id, tun.throw_away_queues(flags, len(netdev.fds))


def _see_private(pid: int, inodes: dict[str, int]) -> None:
    """All of the guest's RAM is mapped copy-on-write, and not shared. inodes: by block.

    Raises:
        NotStarted: it is not, and must not be given any state.
    """
    mapped = {(m.inode, m.perms[3]) for m in proc.read_maps(pid)}
    for name, inode in inodes.items():
        if (inode, "s") in mapped or (inode, "p") not in mapped:
            raise NotStarted(f"it does not map the guest's RAM {name} copy-on-write")
