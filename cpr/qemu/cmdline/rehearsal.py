"""A command line that starts the same guest with nothing outside: for trying a new QEMU before it matters.

Same machine, devices, ids and block node names; null back ends for chardevs, netdevs and disks, throw-away RAM (or a
copy-on-write mapping of the guest's own), no display, no log, one private monitor. In scope: the edit. Out of scope:
running it, and judging what it says. What cannot be had without the outside world is left out and named by
`not_rehearsed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cpr.qemu.cmdline.argv import CommandLine, Option
from cpr.qemu.cmdline.edit import for_incoming, without
from cpr.qemu.cmdline.edit_chardevs import null_chardev
from cpr.qemu.cmdline.edit_memory import with_memory_backend_fd, with_memory_backend_memfd
from cpr.qemu.cmdline.edit_net import with_netdev_null
from cpr.qemu.cmdline.edit_vnc import with_spice_deaf
from cpr.qemu.cmdline.facts import Device, Drive, QomObject
from cpr.qemu.cmdline.legacy import MONITOR_OBJECTS
from cpr.qemu.cmdline.normalise import implicit_chardevs, normalise_chardevs
from cpr.qemu.cmdline.params import CommandLineError, Params, parse_keyval
from cpr.qemu.cmdline.queries import devices, machine, memory_backends, objects
from cpr.qemu.cmdline.query_io import DRIVE_OPTIONS, drive_params, drives, netdevs

MONITOR = "cpr-rehearsal"
"""The label of the private monitor's chardev."""

_LEFT_OUT = (
    *("S", "incoming", "loadvm", "snapshot", "preconfig", "daemonize", "pidfile", "chroot", "runas", "run-with"),
    *("async-teardown", "mem-path", "mem-prealloc", "overcommit", "realtime", "gdb", "s", "qtest", "qtest-log"),
    *("D", "d", "dfilter", "trace", "dump-vmstate", "plugin", "perfmap", "jitdump", "writeconfig", "add-fd"),
    *("mon", "display", "vnc", "sdl", "curses", "full-screen", "no-quit", "iscsi", "tpmdev"),
)
_OUTSIDE_DEVICES = ("vfio-", "vhost-", "usb-host", "tpm-", "ivshmem", "scsi-generic", "u2f-passthru", "xen-")
_OUTSIDE_OBJECTS = ("input-", "filter-", "can-host-", "pr-manager", "iommufd", "colo-", "dbus-vmstate", "vfio-user")
_DRIVE_KEPT = (
    *("id", "if", "index", "bus", "unit", "media", "node-name", "readonly", "read-only", "werror", "rerror"),
    *("cache", "discard", "detect-zeroes", "group"),
)
_DRIVE_KEPT_PREFIXES = ("throttling.", "bps", "iops", "cache.")
_NODE_KEPT = frozenset({"node-name", "read-only", "auto-read-only", "discard", "detect-zeroes"})
_FILTERS = frozenset({"throttle", "copy-on-read"})
_SIZE_UNKNOWN = 1 << 30  # of what no device looks at: a protocol node below a format node


def for_rehearsal(
    cmdline: CommandLine,
    *,
    monitor_fd: int,
    disk_sizes: Mapping[str, int],
    ram_fds: Mapping[str, int] | None = None,
    tap_fds: Mapping[str, Sequence[int]] | None = None,
) -> CommandLine:
    """`cmdline` with nothing outside, waiting for incoming state, its QMP monitor on the connected socket `monitor_fd`.

    `disk_sizes` are true sizes in bytes by drive id, node name or file name; firmware flash must be among them, else
    CommandLineError, for a machine refuses flash of a wrong size. `ram_fds` maps memory backends to descriptors of the
    guest's RAM, mapped copy-on-write; other backends become fresh memfds. `tap_fds` see `with_netdev_null`.
    """
    if cmdline.has("readconfig"):
        raise CommandLineError("-readconfig must be written out first (inline_readconfig)")
    result = without(normalise_chardevs(_with_quiet_defaults(cmdline)), _LEFT_OUT)
    result = _without_the_outside(result)
    result = with_spice_deaf(result.mapped(_quiet))
    for netdev in reversed(netdevs(result)):  # the last first: one may vanish
        taps = (tap_fds or {}).get(netdev.id or "", ())
        result = with_netdev_null(result, netdev.index, taps)
    result = _with_null_disks(result, disk_sizes)
    for backend in memory_backends(result):
        if ram_fds and backend.id in ram_fds:
            result = with_memory_backend_fd(result, backend.id, ram_fds[backend.id], share=False)
        elif backend.qom_type != "memory-backend-epc":
            result = with_memory_backend_memfd(result, backend.id)
    monitor = (
        Option("display", "none"),
        Option("chardev", Params.of(("backend", "socket"), id=MONITOR, fd=str(monitor_fd)).render()),
        Option("mon", Params.of(None, id=MONITOR, chardev=MONITOR, mode="control").render()),
    )
    return for_incoming(result.appended(*monitor))


def not_rehearsed(cmdline: CommandLine) -> tuple[Device | QomObject, ...]:
    """The devices and objects `for_rehearsal` leaves out, because they are nothing without the world outside."""
    return (
        *(device for device in devices(cmdline) if device.driver.startswith(_OUTSIDE_DEVICES)),
        *(found for found in objects(cmdline) if found.qom_type.startswith(_OUTSIDE_OBJECTS)),
    )


def _with_quiet_defaults(cmdline: CommandLine) -> CommandLine:
    """What QEMU would add by itself (a console on the standard output under -nographic), said as null."""
    labels = implicit_chardevs(cmdline)
    extra = []
    if "serial0" in labels:
        extra.append(Option("serial", "null"))
    if "parallel0" in labels:
        extra.append(Option("parallel", "null"))
    if cmdline.has("nographic"):
        extra.append(Option("machine", "graphics=off"))
    return without(cmdline, ("nographic",)).appended(*extra)


def _without_the_outside(cmdline: CommandLine) -> CommandLine:
    gone = {found.index for found in not_rehearsed(cmdline)}
    return cmdline.with_options(option for n, option in enumerate(cmdline.options) if n not in gone)


def _quiet(option: Option) -> Option | tuple[Option, ...]:
    """Null back ends for what needs no knowledge of the rest."""
    params = option.params
    match option.name:
        case "chardev":
            return option.with_params(null_chardev(params).without("logfile", "logappend", "logtimestamp"))
        case "audiodev":
            return option.with_params(Params.of(("driver", "none"), id=params.get("id") or ""))
        case "audio":
            return Option("audio", _audio(option.value or ""))
        case "device" if params.get("driver") == "scsi-block":  # passes SG_IO on; its state is scsi-hd's
            return option.with_params(params.with_({"driver": "scsi-hd"}))
        case "object" if params.get("qom-type") in MONITOR_OBJECTS:
            return ()
        case "set" if not (option.value or "").startswith("device."):
            return ()
    return option


def _audio(value: str) -> str:
    before = parse_keyval(value, "driver")
    kept = {key: before.get(key) for key in ("model", "id") if key in before}
    return Params.of(("driver", "none"), **kept).render()


def _with_null_disks(cmdline: CommandLine, sizes: Mapping[str, int]) -> CommandLine:
    firmware = _firmware_nodes(cmdline)
    for drive in drives(cmdline):
        option = cmdline.options[drive.index]
        if drive.option == "blockdev":
            if drive.driver in _FILTERS and drive.child is not None:
                continue
            params = _null_node(drive, _size(drive, sizes, exact=drive.node_name in firmware))
            cmdline = cmdline.replaced(drive.index, option.with_params(params))
        elif drive.option in DRIVE_OPTIONS or drive.file is not None or drive.driver is not None:
            size = _size(drive, sizes, exact=drive.interface == "pflash")
            params = _null_drive(drive_params(option), size)
            cmdline = cmdline.replaced(drive.index, Option("drive", params.render()))
    return cmdline


def _firmware_nodes(cmdline: CommandLine) -> set[str]:
    """Block nodes that are flash: of `-machine pflash0=NODE`, and what they stand on is not."""
    board = machine(cmdline).params
    return {board.get(key) or "" for key in ("pflash0", "pflash1")} - {""}


def _size(drive: Drive, sizes: Mapping[str, int], *, exact: bool) -> int:
    for name in (drive.node_name, drive.id, drive.file, drive.child):
        if name is not None and name in sizes:
            return sizes[name]
    if exact:
        raise CommandLineError(f"the size of flash {drive.node_name or drive.id or drive.file} is not known")
    return _SIZE_UNKNOWN


def _null_drive(before: Params, size: int) -> Params:
    kept = {
        key: before.get(key) for key in before.names() if key in _DRIVE_KEPT or key.startswith(_DRIVE_KEPT_PREFIXES)
    }
    return Params().with_({**kept, "driver": "null-co", "size": size, "read-zeroes": "on"})


def _null_node(drive: Drive, size: int) -> Params:
    before = drive.params
    if before.json is None:
        kept = {key: before.get(key) for key in before.names() if key in _NODE_KEPT or key.startswith("cache.")}
        return Params.of(("driver", "null-co")).with_({**kept, "size": size, "read-zeroes": "on"})
    node = {key: value for key, value in before.json.items() if key in _NODE_KEPT or key == "cache"}
    return Params(json={"driver": "null-co", **node, "size": size, "read-zeroes": True})
