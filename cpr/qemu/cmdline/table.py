"""Which options QEMU has, which of them take an argument, and how the argument is to be read.

Covers QEMU 6.0 to 11.x (qemu-options.hx), with what was removed before in case a vendor kept it, and what Proxmox adds
(-id, -cpuunits). Which options a given binary knows is not said here: see `cpr.qemu.options`, which asks the binary.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Notation(Enum):
    """How QEMU reads an option's argument."""

    NONE = "takes no argument"
    TEXT = "as it stands"
    OPTS = "comma notation with bare flags (util/qemu-option.c)"
    KEYVAL = "comma notation without bare flags (util/keyval.c)"


@dataclass(frozen=True, slots=True)
class Spec:
    """What is known of one option: how to read its argument, the key of a bare first item, whether JSON is taken."""

    notation: Notation
    implied: str | None = None
    json: bool = False

    @property
    def takes_argument(self) -> bool:
        return self.notation is not Notation.NONE


_NO_ARGUMENT = """
    S async-teardown audio-help daemonize enable-fips enable-kvm enable-sync-profile full-screen h help jitdump
    mem-prealloc no-acpi no-fd-bootchk no-frame no-hpet no-kvm no-quit no-reboot no-shutdown no-user-config
    nodefaults nographic old-param only-migratable perfmap portrait preconfig s semihosting show-cursor singlestep
    snapshot usb version win2k-hack xen-attach xen-domid-restrict
    alt-grab ctrl-grab curses sdl no-kvm-irqchip no-kvm-pit no-kvm-pit-reinjection localtime nodefconfig
    rtc-td-hack tdf xen-create
"""

_TEXT = """
    D L append audio balloon bios bootp bt cdrom chroot cpu d debugcon dfilter dtb dump-vmstate echr fda fdb g gdb
    hda hdachs hdb hdc hdd igd-passthru incoming initrd k kernel loadvm mem-path monitor mtdblock parallel pflash
    pidfile prom-env qmp qmp-pretty qtest qtest-log readconfig redir rotate runas sd seed serial set shim smb
    soundhw startdate tb-size tftp usbdevice uuid vga virtioconsole watchdog watchdog-action writeconfig xen-domid
    global
    cpuunits id
"""

_OPTS = {
    "accel": "accel",
    "acpitable": None,
    "action": None,
    "add-fd": None,
    "boot": "order",
    "chardev": "backend",
    "device": "driver",
    "drive": None,
    "fsdev": "fsdriver",
    "fw_cfg": "name",
    "icount": "shift",
    "iscsi": None,
    "m": "size",
    "mon": "chardev",
    "msg": None,
    "name": "guest",
    "net": "type",
    "netdev": "type",
    "nic": "type",
    "numa": "type",
    "option-rom": "romfile",
    "overcommit": None,
    "plugin": "file",
    "realtime": None,
    "rtc": None,
    "run-with": None,
    "sandbox": "enable",
    "semihosting-config": None,
    "smbios": None,
    "smp": "cpus",
    "spice": None,
    "tpmdev": "type",
    "trace": "enable",
    "virtfs": "fsdriver",
    "vnc": "vnc",
}

_KEYVAL = {
    "audiodev": "driver",
    "blockdev": "driver",
    "compat": None,
    "display": "type",
    "machine": "type",
    "object": "qom-type",
}

_JSON = frozenset({"audiodev", "blockdev", "compat", "device", "display", "netdev", "object"})

ALIASES = {"M": "machine", "h": "help", "?": "help"}
"""Other spellings of the same option (qemu-options.hx)."""

SPECS: dict[str, Spec] = {
    **{name: Spec(Notation.NONE) for name in _NO_ARGUMENT.split()},
    **{name: Spec(Notation.TEXT) for name in _TEXT.split()},
    **{name: Spec(Notation.OPTS, implied, name in _JSON) for name, implied in _OPTS.items()},
    **{name: Spec(Notation.KEYVAL, implied, name in _JSON) for name, implied in _KEYVAL.items()},
}
"""Every option by its canonical name, without the dash."""
