"""Drift: what was changed in the guest since its start, and is therefore not on its command line.

The new QEMU is made from the command line; a snapshot taken or a device plugged in meanwhile would be missing, and a
medium long ejected be back. Compared are the guest as it is, its argv, and what the rehearsed start made of that argv.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from cpr.checks.command import absolute
from cpr.checks.registry import BOTH, blocker, check
from cpr.checks.words import size, some
from cpr.qemu.cmdline import CommandLineError, devices, drives, objects, parse_size, settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cpr.model import BlockChain, Device, Finding, Guest, Rehearsal
    from cpr.qemu.cmdline import CommandLine, Params
    from cpr.qemu.cmdline.facts import Drive

UNPLUG = "unplug it (device_del), or start the guest with it on the command line the next time"
PLUG = "plug it in again the same way, or start the guest without it the next time"


@check("drift-memory", "Memory that was plugged in since the start", ignorable=False, modes=BOTH)
def drift_memory(guest: Guest) -> Iterator[Finding]:
    """Every block of RAM is on the command line."""
    for block in guest.ram:
        if not block.in_argv:
            yield blocker(
                block.id,
                f"{size(block.size)} of RAM was plugged in while the guest ran and is not on its command line",
                "unplug it in the guest (device_del, object-del), or start the guest with it the next time",
            )


@check("drift-device", "Devices that were plugged in or out since the start", ignorable=False, modes=BOTH)
def drift_device(guest: Guest, command: CommandLine, rehearsal: Rehearsal | None = None) -> Iterator[Finding]:
    """The devices are those that a start with this command line makes; those without an id are counted by type."""
    now = [d for d in guest.devices if not _is_cpu(d.type)]
    if rehearsal is not None and rehearsal.started:
        fresh = [d for d in rehearsal.devices if not _is_cpu(d.type)]
        yield from _by_type(now, fresh)
        there = {d.id for d in fresh if not d.anonymous}
    else:
        there = {d.id for d in devices(command) if d.id and not _is_cpu(d.driver)}
    types = {d.id: d.type for d in now if not d.anonymous}
    for id in sorted(set(types) - there):
        yield blocker(id, f"device {id} ({types[id]}) was plugged in and is not on the command line", UNPLUG)
    for id in sorted(there - set(types)):
        yield blocker(id, f"device {id} is on the command line and was unplugged: the new QEMU would have it", PLUG)


def _by_type(now: Iterable[Device], fresh: Iterable[Device]) -> Iterator[Finding]:
    have, would = (Counter(d.type for d in side if d.anonymous) for side in (now, fresh))
    for kind in sorted(set(have) | set(would)):
        if have[kind] != would[kind]:
            yield blocker(
                kind,
                f"the guest has {have[kind]} device(s) {kind} without an id, its command line makes {would[kind]}",
                UNPLUG if have[kind] > would[kind] else PLUG,
            )


@check("drift-cpu", "CPUs that were plugged in or out since the start", ignorable=False, modes=BOTH)
def drift_cpu(guest: Guest, command: CommandLine) -> Iterator[Finding]:
    """As many vCPUs as -smp and -device say."""
    wanted = _cpus(command)
    if guest.vcpus and wanted and len(guest.vcpus) != wanted:
        yield blocker(
            "cpu",
            f"the guest has {len(guest.vcpus)} vCPU(s), its command line makes {wanted}",
            "plug CPUs until they agree (device_add, device_del), or change -smp at the next start",
        )


def _cpus(command: CommandLine) -> int:
    """vCPUs at the start; 0 where it cannot be told."""
    last = command.last("smp")
    params = last[1].params if last else None
    try:
        plugged = sum(1 for d in devices(command) if _is_cpu(d.driver))
        if params is None:
            return 1 + plugged
        cpus = params.get("cpus") or params.get("maxcpus")
        if cpus:
            return int(cpus) + plugged
        product = 1
        for key in ("drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads"):
            product *= int(params.get(key) or 1)
        return product + plugged
    except ValueError:
        return 0


def _is_cpu(kind: str) -> bool:
    return kind.endswith(("-cpu", "-cpu-core"))


@check("drift-object", "I/O threads that were made since the start", ignorable=False, modes=BOTH)
def drift_object(guest: Guest, command: CommandLine) -> Iterator[Finding]:
    """Every iothread is on the command line."""
    there = {o.id for o in objects(command) if o.qom_type == "iothread"}
    for name, _ in guest.iothreads:
        if name not in there:
            yield blocker(name, f"iothread {name} was made while the guest ran and is not on the command line", UNPLUG)


@check("drift-chardev", "Chardevs that were made since the start", ignorable=False, modes=BOTH)
def drift_chardev(guest: Guest, rehearsal: Rehearsal | None = None) -> Iterator[Finding]:
    """Every chardev is on the command line, or one that QEMU makes by itself (the gdb stub's `#chr7` among them)."""
    fresh = set(rehearsal.chardevs) if rehearsal is not None and rehearsal.started else set()
    for chardev in guest.chardevs:
        if not chardev.in_argv and chardev.label not in fresh and chardev.backend != "gdb":
            yield blocker(
                chardev.label,
                f"chardev {chardev.label} ({chardev.filename}) was made while the guest ran and is not on the command "
                "line",
                "remove it (chardev-remove), or start the guest with it the next time",
            )


@check("drift-netdev", "Network back ends that were made since the start", ignorable=False, modes=BOTH)
def drift_netdev(guest: Guest) -> Iterator[Finding]:
    """Every network back end is on the command line."""
    for netdev in guest.netdevs:
        if not netdev.in_argv:
            yield blocker(
                netdev.id,
                f"network back end {netdev.id} ({netdev.type}) was made while the guest ran and is not on the command "
                "line",
                "remove it (netdev_del), or start the guest with it the next time",
            )


@check("snapshot-mode", "Writes that go to a temporary file", ignorable=False, modes=BOTH)
def snapshot_mode(command: CommandLine) -> Iterator[Finding]:
    """-snapshot, snapshot=on: the temporary file is unlinked, and a new QEMU would make an empty one."""
    if settings(command).snapshot:
        yield blocker(
            "-snapshot",
            "with -snapshot all that the guest has written lies in unlinked temporary files, which end with the old "
            "QEMU",
            "commit what is to stay (HMP commit), and start the guest without -snapshot the next time",
        )
    for drive in drives(command):
        if drive.snapshot:
            yield blocker(
                drive.id or drive.file or "drive",
                "snapshot=on: what the guest has written lies in an unlinked temporary file, which ends with the old "
                "QEMU",
                "commit what is to stay (HMP commit), and start the guest without snapshot=on the next time",
            )


@check("drift-chain", "Drives that use another file than the command line says", ignorable=False, modes=BOTH)
def drift_chain(guest: Guest, command: CommandLine) -> Iterator[Finding]:
    """The active layer of every drive is named by argv, and every file of argv is in use.

    A snapshot moves the device to an overlay while argv names the base: the new QEMU would write into the base, and
    the guest's latest writes would be gone. Only files with a local name are compared; of others QEMU reports another
    spelling than argv has.
    """
    if settings(command).snapshot:
        return  # says so itself
    named = {absolute(f, guest.cwd): f for f in _argv_files(command)}
    used: set[str] = set()
    for chain in guest.chains:
        used |= {absolute(_plain(f), guest.cwd) for f in chain.files}
        active = _plain(chain.files[0]) if chain.files else ""
        if active and _local(active) and absolute(active, guest.cwd) not in named and not _temporary(chain, command):
            yield blocker(
                chain.device,
                f"{chain.device} uses {active}, which the command line does not name (it names "
                f"{some(named.values()) or 'no file'}): a snapshot or a change of medium since the start",
                "commit the overlay back (block-commit) or change the medium back, or start the guest with this file "
                "the next time",
            )
    used |= {absolute(_plain(node.filename), guest.cwd) for node in guest.nodes}
    for path, spelling in sorted(named.items()):
        if _local(spelling) and path not in used and (guest.chains or guest.nodes):
            yield blocker(
                spelling,
                f"the command line names {spelling}, and no drive uses it any more: the new QEMU would open it again",
                "put the medium back, or start the guest without it the next time",
            )


def _argv_files(command: CommandLine) -> Iterator[str]:
    for drive in drives(command):
        if drive.file and not drive.snapshot:
            yield _plain(drive.file)


def _plain(name: str) -> str:
    return name.removeprefix("file:")


def _local(name: str) -> bool:
    """A file's name, as against nbd:..., json:..., rbd:..., fat:... and descriptors."""
    return bool(name) and not name.startswith("/dev/fdset/") and (name.startswith("/") or ":" not in name)


def _temporary(chain: BlockChain, command: CommandLine) -> bool:
    """Of a drive with snapshot=on, which `snapshot-mode` has named."""
    return any(
        d.snapshot and ((d.id and d.id == chain.drive) or (d.file and _plain(d.file) in chain.files))
        for d in drives(command)
    )


@check("throttle-set", "I/O limits that were set since the start", modes=BOTH)
def throttle_set(guest: Guest, command: CommandLine) -> Iterator[Finding]:
    """block_set_io_throttle is not on the command line."""
    for chain in guest.chains:
        now = {name: value for name, value in chain.throttle if value and not name.endswith("_length")}
        now.pop("iops_size", None)
        drive = _drive_of(chain, guest, command)
        there = _limits(drive.params) if drive else {}
        if now != there:
            yield blocker(
                chain.device,
                f"I/O limits of {chain.device} are {_words(now)}, the command line says {_words(there)}: the new QEMU "
                "would have those of the command line",
                "--ignore throttle-set, and set them again after the update (block_set_io_throttle)",
            )


def _drive_of(chain: BlockChain, guest: Guest, command: CommandLine) -> Drive | None:
    """The drive of argv that a chain is: by its id, else by its file (QEMU makes names up: `virtio0`)."""
    known = drives(command)
    by_id = next((d for d in known if d.id and d.id == chain.drive), None)
    files = {absolute(_plain(f), guest.cwd) for f in chain.files[:1]}
    return by_id or next((d for d in known if d.file and absolute(_plain(d.file), guest.cwd) in files), None)


_SPELLINGS = {
    "bps-total": "bps", "bps-read": "bps_rd", "bps-write": "bps_wr",
    "iops-total": "iops", "iops-read": "iops_rd", "iops-write": "iops_wr",
}  # fmt: skip


def _limits(params: Params) -> dict[str, int]:
    """throttling.bps-total=... and the older bps=..., as query-block names them."""
    found = {}
    for new, name in _SPELLINGS.items():
        for key, result in ((f"throttling.{new}", name), (f"throttling.{new}-max", f"{name}_max"),
                            (name, name), (f"{name}_max", f"{name}_max")):  # fmt: skip
            text = params.get(key)
            try:
                value = parse_size(text) if text else 0
            except CommandLineError:
                value = 0
            if value:
                found[result] = value
    return found


def _words(limits: dict[str, int]) -> str:
    return some(f"{name}={value}" for name, value in sorted(limits.items())) or "none"
