"""What the queries answer: small frozen facts, each with the index of the option it came from.

In scope: the shape of the answers. Out of scope: how they are found (the query modules).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cpr.qemu.cmdline.params import Params


@dataclass(frozen=True, slots=True, kw_only=True)
class Socket:
    """The socket of a chardev. `kind` fd: `fd` is a number, or the name of one given by `getfd`."""

    kind: Literal["unix", "inet", "fd"]
    server: bool
    wait: bool
    path: str | None = None
    abstract: bool = False
    tight: bool = True
    host: str | None = None
    port: str | None = None
    to: int | None = None
    fd: str | None = None
    telnet: bool = False
    tn3270: bool = False
    websocket: bool = False
    tls_creds: str | None = None
    reconnect: float = 0.0  # seconds; 0: never


@dataclass(frozen=True, slots=True, kw_only=True)
class Chardev:
    """A character device. `label` is its name in `query-chardev`; `option` says where it was made (chardev, serial)."""

    label: str
    backend: str
    index: int
    option: str
    params: Params
    socket: Socket | None = None
    path: str | None = None  # of a file, pipe, serial line, parallel port, or pty link
    logfile: str | None = None
    logappend: bool = False
    append: bool = False  # of a file
    mux: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Monitor:
    """A monitor; `control` speaks QMP, `readline` is for people. `chardev` is None if nothing in argv defines it."""

    label: str
    mode: Literal["control", "readline"]
    index: int
    option: str
    pretty: bool = False
    chardev: Chardev | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBackend:
    """An -object memory-backend-*. `size` is in bytes. `share` has the default of its type filled in."""

    id: str
    qom_type: str
    size: int | None
    share: bool
    index: int
    params: Params
    mem_path: str | None = None
    prealloc: bool = False
    policy: str | None = None
    host_nodes: str | None = None
    hugetlb: bool = False
    discard_data: bool = False
    readonly: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NumaNode:
    """A -numa node: its RAM comes from `memdev`, or is `mem` bytes of the unnamed RAM."""

    index: int
    nodeid: int | None
    memdev: str | None
    mem: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestMemory:
    """-m, -mem-path, -mem-prealloc, -machine memory-backend=, -numa. Sizes in bytes; None: not said (128 MiB)."""

    size: int | None
    max_size: int | None
    slots: int | None
    mem_path: str | None
    prealloc: bool
    machine_backend: str | None
    nodes: tuple[NumaNode, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Netdev:
    """A network back end of -netdev, -nic or -net. `id` None: QEMU made one up. fds may be numbers or names."""

    type: str
    id: str | None
    index: int
    option: str
    params: Params
    ifname: str | None = None
    script: str | None = None
    downscript: str | None = None
    fds: tuple[str, ...] = ()
    vhost: bool = False
    vhostfds: tuple[str, ...] = ()
    queues: int | None = None
    helper: str | None = None
    br: str | None = None
    hostfwd: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hostfwd:
    """One forwarding of a user netdev. Given back by HMP `hostfwd_add NETDEV RULE`; `netdev` None: the only one."""

    netdev: str | None
    rule: str
    index: int

    def hmp(self) -> str:
        return f"hostfwd_add {self.netdev + ' ' if self.netdev else ''}{self.rule}"


@dataclass(frozen=True, slots=True, kw_only=True)
class VncAddress:
    """Where a VNC server listens (of a reverse one: whom it calls). `port` is a TCP port: display 1 is 5901."""

    kind: Literal["tcp", "unix"]
    host: str = ""
    port: int = 0
    path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vnc:
    """A VNC server. `id` as `query-vnc-servers` and `display-update` know it. No address: `-vnc none`."""

    id: str
    addresses: tuple[VncAddress, ...]
    params: Params
    to: int = 0
    websocket: str | None = None
    password: bool = False
    password_secret: str | None = None
    tls_creds: str | None = None
    sasl: bool = False
    share: str | None = None
    reverse: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Display:
    """What shows the guest's screen: vnc, spice, gtk, sdl, curses, egl-headless, dbus, cocoa, none."""

    kind: str
    index: int
    option: str
    params: Params
    vnc: Vnc | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """A drive or block node. `interface` is if= (none for -blockdev; None: the machine's default).

    `file` is the image's name wherever it is nested; `child` the node a -blockdev stands on by name.
    """

    index: int
    option: str
    params: Params
    id: str | None = None
    node_name: str | None = None
    driver: str | None = None  # of -blockdev, or -drive driver=
    file: str | None = None
    format: str | None = None
    interface: str | None = None
    media: str | None = None
    child: str | None = None
    snapshot: bool = False
    readonly: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A -device."""

    driver: str
    id: str | None
    index: int
    params: Params


@dataclass(frozen=True, slots=True, kw_only=True)
class QomObject:
    """An -object."""

    qom_type: str
    id: str | None
    index: int
    params: Params


@dataclass(frozen=True, slots=True, kw_only=True)
class AddFd:
    """An -add-fd. QEMU closes `fd` at its start and keeps a duplicate in `fdset`: ask `query-fdsets` for it."""

    fd: int
    fdset: int
    opaque: str | None
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FdNumber:
    """A bare descriptor number in argv, under `key` of the option at `index` (`fds`; "" where the text is no list)."""

    fd: int
    index: int
    option: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GdbStub:
    """-gdb ADDRESS or -s (`tcp::1234`)."""

    address: str
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """All -machine options merged as QEMU does; `type` None: the binary's default."""

    type: str | None
    params: Params
    indexes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The rest of what a restart must know of a command line."""

    name: str | None  # of the guest
    uuid: str | None
    accel: tuple[str, ...]
    cpu: str | None
    incoming: tuple[str, ...]
    loadvm: str | None
    daemonize: bool
    pidfile: str | None
    snapshot: bool
    chroot: str | None
    runas: str | None
    paused: bool  # -S
    nodefaults: bool
    nographic: bool
