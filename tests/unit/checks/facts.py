"""What the checks are asked about: a guest, host, target and rehearsal that nothing speaks against, and changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cpr.checks import run_checks
from cpr.model import (
    Backing,
    Chardev,
    Device,
    Finding,
    Guest,
    Host,
    MonitorAddress,
    Netdev,
    NextKernel,
    PmemRegion,
    Rehearsal,
    Storage,
    Target,
    VncListener,
    VncServer,
)
from tests.unit import values

MIB = 1 << 20
GIB = 1 << 30

ARGV = (
    "/usr/bin/qemu-system-x86_64",
    *("-machine", "q35,memory-backend=ram0"),
    *("-object", "memory-backend-file,id=ram0,size=1G,mem-path=/proc/self/fd/20,share=on"),
    *("-display", "none"),
)


def guest(*more: str, **changes: Any) -> Guest:
    """A guest whose command line has `more` at its end."""
    return replace(values.guest(), **{"argv": (*ARGV, *more), **changes})


def host(**changes: Any) -> Host:
    known: dict[str, Any] = {
        "boot_id": "b",
        "uid": 0,
        "capabilities": ("CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "CAP_SYS_RESOURCE", "CAP_SETUID", "CAP_SETGID"),
        "limits": {"RLIMIT_NOFILE": (1024, 4096)},
        "run_directory": "/run/cpr",
        "run_directory_free": GIB,
        "run_directory_inodes": 10000,
        "memory_available": 8 * GIB,
        "architecture": "x86_64",
    }
    return Host(**{**known, **changes})


def target(**changes: Any) -> Target:
    made = replace(values.target(), **changes)
    return made if "binary" in changes else replace(made, binary=replace(made.binary, inode=200))


def rehearsal(**changes: Any) -> Rehearsal:
    known: dict[str, Any] = {"started": True, "words": "", "seconds": 0.2, "accelerator": "tcg"}
    return Rehearsal(**{**known, **changes})


def next_kernel(**changes: Any) -> NextKernel:
    """One to which nothing stands in the way, and that leaves the memory of `DEVDAX` alone."""
    known: dict[str, Any] = {
        "image": "/boot/vmlinuz-7.2",
        "initrd": "/boot/initrd.img-7.2",
        "release": "7.2",
        "command_line": "ro memmap=1G!4G",
    }
    return NextKernel(**{**known, **changes})


REGION = PmemRegion(provider="e820", start=4 * GIB, size=GIB, namespace_uuid="u", mode="devdax")
DEVDAX = Storage(kind=Backing.DEVDAX, path="/dev/dax0.0", device=(252, 0), size=GIB, pmem=REGION)


def chardev(label: str = "serial0", **changes: Any) -> Chardev:
    known: dict[str, Any] = {
        "label": label,
        "backend": "socket",
        "filename": f"disconnected:unix:/run/{label},server=on",
        "frontend_open": True,
        "server": True,
        "listener": 10,
    }
    return Chardev(**{**known, **changes})


def netdev(kind: str = "tap", **changes: Any) -> Netdev:
    return Netdev(**{"id": "net0", "type": kind, "ifname": "tap0", "fds": (30,), **changes})


def device(kind: str, id: str = "dev0", *, anonymous: bool = False) -> Device:
    return Device(id=id, type=kind, anonymous=anonymous)


def browsers(**changes: Any) -> VncServer:
    """A VNC display that also listens for websockets, at a listener like this."""
    plain = VncListener(family="ipv4", host="127.0.0.1", service="5901", number=20)
    web = VncListener(family="ipv4", host="127.0.0.1", service="5701", number=21, websocket=True)
    return vnc(listeners=(plain, web._replace(**changes)))


def vnc(**changes: Any) -> VncServer:
    known: dict[str, Any] = {"id": "default", "auth": "none", "listeners": (), "clients": 0}
    return VncServer(**{**known, **changes})


def monitor() -> MonitorAddress:
    return MonitorAddress(label="mon0", path="/run/web1.qmp")


def said(check: str, *, of: Guest, mode: str = "restart", **facts: Any) -> list[Finding]:
    """What one check says, the other facts being as they should be."""
    known: dict[str, Any] = {"host": host(), "target": target(), "rehearsal": rehearsal(), "kexec": None, **facts}
    found = run_checks(of, known["host"], known["target"], known["rehearsal"], mode=mode, kexec=known["kexec"])
    return [f for f in found if f.check == check]
