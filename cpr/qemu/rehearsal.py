"""The rehearsed start: the new QEMU with the guest's own command line, and nothing of the guest in it.

Null back ends, throw-away RAM, empty disks of the true sizes, a private monitor; in the guest's likeness, so that what
it may not read shows here and not later. It never runs (`-S -incoming defer`), is killed and reaped at the end, and
touches neither the guest nor its sockets, images, logs and taps. What it says where it does not start is kept in its
own words.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cpr.errors import CprError, MonitorError, MonitorHeld
from cpr.linux import likeness, proc
from cpr.linux.fds import Fd, descriptor_table, take_fd
from cpr.linux.process import Process
from cpr.model import Device, Rehearsal
from cpr.qemu import block, chardevs, cpu, devices, memory, qmp
from cpr.qemu import cmdline as cl
from cpr.qemu.answers import Answers
from cpr.qemu.cmdline.facts import Device as GivenDevice
from cpr.qemu.cmdline.rehearsal import MONITOR
from cpr.qemu.features import PENDING, last_words
from cpr.qemu.options import translate
from cpr.qemu.readconfig import inline_readconfig
from cpr.qemu.variables import DROPPED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from cpr.linux.lazycopy import LazyCopies
    from cpr.model import Guest, Target
    from cpr.qemu.qmp import Monitor

REHEARSAL_SECONDS = 60.0
SCAN_SECONDS = 5.0
"""Longest that throw-away RAM is looked through; what was found by then counts."""
MONITOR_NUMBER = 20
"""Of the private monitor in the rehearsal: above what QEMU could take for one of its own early on."""
CHUNK = 1 << 20


class NotStarted(Exception):
    """It did not come up; the message is the reason, in QEMU's words where it said any."""


@dataclass(frozen=True, slots=True)
class Started:
    """A rehearsing QEMU that waits for a state, and the private monitor it is driven by."""

    process: Process
    monitor: Monitor
    said: Fd
    """What it writes to standard output and error."""
    copies: LazyCopies | None = None
    """RAM of the guest's that is copied as it is looked at."""

    def words(self) -> str:
        """What it said last."""
        return last_words(self.said.number)


def rehearse(guest: Guest, target: Target, *, timeout: float = REHEARSAL_SECONDS) -> Rehearsal:
    """Start it, look at it, end it. What goes wrong is in the answer; nothing is raised for it.

    Raises:
        ProcessLookupError: the guest is gone.
    """
    began = time.monotonic()
    changed: tuple[str, ...] = ()
    try:
        command = base_command(guest)
        translation = translate(cl.with_program(command, target.binary.path), target.options)
        changed = translation.changes
        wanted = cl.append_options(translation.cmdline, target.extra_options)
        line = cl.for_rehearsal(wanted, monitor_fd=MONITOR_NUMBER, disk_sizes=disk_sizes(guest))
        with started(guest, target.binary.path, target.binary.identity, line, timeout=timeout) as it:
            try:
                told = _look(it.process.pid, it.monitor, guest, wanted)
            except CprError as error:
                it.process.wait_dead(1.0)
                raise NotStarted(it.words() or f"it does not answer ({error.message})") from None
    except (cl.CommandLineError, NotStarted) as error:
        return Rehearsal(
            started=False, words=str(error), seconds=time.monotonic() - began, options_changed=changed
        )
    return replace(told, seconds=time.monotonic() - began, options_changed=changed)


def base_command(guest: Guest, *, with_added: bool = False) -> cl.CommandLine:
    """The guest's command line with its configuration files written out and its machine type made concrete.

    `with_added`: with the options that an earlier update added for the QEMU that the guest is in now.

    Raises:
        CommandLineError: it cannot be understood, or a configuration file is gone.
    """
    texts = dict(guest.config_files)

    def read(path: str) -> str:
        if path not in texts:
            raise cl.CommandLineError(f"-readconfig {path}: the file cannot be read any more")
        return texts[path]

    command = cl.CommandLine.parse(guest.argv)
    if not with_added:
        command = cl.remove_appended(command, guest.added_options)
    if command.has("readconfig"):
        command = inline_readconfig(command, read)
    return cl.with_machine_type(command, guest.machine) if guest.machine else command


def disk_sizes(guest: Guest) -> dict[str, int]:
    """True sizes in bytes, by node name, drive id and file name."""
    sizes: dict[str, int] = {}
    for node in guest.nodes:
        sizes.setdefault(node.filename, node.size)  # a format node comes before the file below it
    return sizes | block.disk_sizes(guest.chains, guest.nodes)


# -- the process


@contextlib.contextmanager
def started(
    guest: Guest,
    program: str,
    identity: tuple[int, int] | None,
    line: cl.CommandLine,
    *,
    timeout: float = REHEARSAL_SECONDS,
    descriptors: Mapping[int, Fd] | None = None,
    attend: Callable[[], None] | None = None,
) -> Iterator[Started]:
    """The rehearsing QEMU and its monitor; killed and reaped whatever happens, also by our own end.

    `program` is a path as the guest sees it, `identity` its (st_dev, st_ino); `descriptors` are {number there: ours}.
    `attend` see `qmp.negotiate`.

    Raises:
        NotStarted: it did not come up within `timeout` seconds. ProcessLookupError: the guest is gone.
    """
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as held:
        said = held.enter_context(Fd(os.memfd_create("cpr-said", os.MFD_CLOEXEC)))
        ours, theirs = socket.socketpair()
        held.callback(ours.close)
        with theirs:
            given: dict[int, int | Fd] = {**(descriptors or {}), MONITOR_NUMBER: theirs.fileno()}
            process = _launch(guest, (program, identity), line, given, said, deadline)
        held.callback(_end, process)
        try:
            left = max(0.1, deadline - time.monotonic())
            monitor = qmp.negotiate(ours, "of the rehearsal", timeout=left, attend=attend)
        except MonitorError as error:
            ended = process.wait_dead(0.0 if isinstance(error, MonitorHeld) else 1.0)
            words = last_words(said.number)
            if not words:
                words = "it ended without a word" if ended else f"it does not answer ({error.message})"
            raise NotStarted(words) from None
        held.enter_context(monitor)
        yield Started(process, monitor, said)


def _launch(
    guest: Guest,
    executable: tuple[str, tuple[int, int] | None],
    line: cl.CommandLine,
    descriptors: Mapping[int, int | Fd],
    said: Fd,
    deadline: float,
) -> Process:
    environ = [(k, v) for k, v in guest.environ if not DROPPED.match(k)]
    try:
        launched = likeness.launch(
            likeness.likeness_of(guest.process.pid),
            argv=line.argv(),
            environ=[*environ, (PENDING, "1")],
            executable=executable,
            descriptors=descriptors,
            stdout=said,
            stderr=said,
            ends_with_us=True,
            timeout=max(0.1, deadline - time.monotonic()),
        )
    except ProcessLookupError:
        raise
    except OSError as error:
        raise NotStarted(f"it could not be started in the guest's likeness: {error}") from None
    return Process.of(launched)


def _end(process: Process) -> None:
    process.kill()
    process.wait_dead(10.0)
    process.close()


# -- what it shows


def _look(pid: int, monitor: Monitor, guest: Guest, wanted: cl.CommandLine) -> Rehearsal:
    answers = Answers(monitor)
    chains = block.chains(answers)
    labels = [label for label, _, _ in answers.read("query-chardev", chardevs.parse_chardevs, ())]
    features = dict(cpu.features(answers, wanted))
    return Rehearsal(
        started=True,
        words="",
        seconds=0.0,
        devices=as_given(devices.devices(answers), wanted),
        drives=tuple(dict.fromkeys(name for c in chains for name in (c.device, c.drive) if name)),
        chardevs=tuple(sorted(label for label in labels if label != MONITOR)),
        written=written(pid, answers),
        accelerator=devices.accelerator(answers),
        cpu_differences=cpu.differences(dict(guest.cpu_features), features) if guest.cpu_features else (),
    )


def as_given(made: Sequence[Device], wanted: cl.CommandLine) -> tuple[Device, ...]:
    """The devices as a real start would have them: with those that are not rehearsed, and by their real types."""
    left_out = [d for d in cl.not_rehearsed(wanted) if isinstance(d, GivenDevice)]
    found = [*made, *(Device(id=d.id or d.driver, type=d.driver, anonymous=d.id is None) for d in left_out)]
    given = [d for d in cl.devices(wanted) if d.driver == "scsi-block"]  # rehearsed as scsi-hd
    named = {d.id for d in given if d.id}
    unnamed = Counter(scsi_block=sum(1 for d in given if not d.id))
    result = []
    for device in found:
        if device.type == "scsi-hd" and not device.anonymous and device.id in named:
            device = replace(device, type="scsi-block")
        elif device.type == "scsi-hd" and device.anonymous and unnamed["scsi_block"]:
            unnamed["scsi_block"] -= 1
            device = replace(device, type="scsi-block")
        result.append(device)
    return tuple(result)


def written(pid: int, answers: Answers) -> tuple[tuple[str, int], ...]:
    """(RAM block, bytes) of the pages that are not zero in the throw-away RAM: nobody but the start wrote them."""
    deadline = time.monotonic() + SCAN_SECONDS
    blocks = memory.ram_blocks(
        answers, proc.read_maps(pid), descriptor_table(pid), pid=pid, mountinfo="", argv_ids=None
    )
    found = []
    for ram in blocks:
        if ram.fd is not None:
            with take_fd(pid, ram.fd) as fd:
                count = data_bytes(fd.number, deadline)
            if count:
                found.append((ram.id, count))
    return tuple(found)


def data_bytes(fd: int, deadline: float) -> int:
    """Bytes in pages that are not all zero; holes are skipped by SEEK_DATA."""
    page, size = os.sysconf("SC_PAGESIZE"), os.fstat(fd).st_size
    count, offset = 0, 0
    while offset < size and time.monotonic() < deadline:
        try:
            offset = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError:  # ENXIO: no data behind this
            break
        end = os.lseek(fd, offset, os.SEEK_HOLE)
        while offset < end and time.monotonic() < deadline:
            chunk = os.pread(fd, min(CHUNK, end - offset), offset)
            if not chunk:
                return count
            if chunk.strip(b"\0"):
                pages = (chunk[at : at + page] for at in range(0, len(chunk), page))
                count += sum(len(p) for p in pages if p.strip(b"\0"))
            offset += len(chunk)
    return count
