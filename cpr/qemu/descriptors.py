"""Every descriptor of a QEMU process, and whose it is.

Owners are `ram:ID`, `chardev:LABEL`, `vnc:ID`, `spice`, `netdev:ID`, `node:NAME`, `fdset:N`, `pidfile`, `log`, `stdio`,
`kvm`, `display`, or `qemu` for what every QEMU makes for itself (eventfds, its event loop). An owner that nobody could
be found for is empty: of a listening socket that means somebody may be served there who would be dropped.
"""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING

from cpr.model import OpenFile
from cpr.qemu import sockets

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from cpr.linux.fds import OpenDescriptor
    from cpr.model import BlockNode, Chardev, Netdev, RamBlock, VncServer
    from cpr.qemu.sockets import Endpoint

ANONYMOUS_KINDS = {"eventfd": "eventfd", "eventpoll": "epoll"}
DEVICE_KINDS = {"/dev/kvm": "kvm", "/dev/net/tun": "tap", "/dev/ptmx": "pty", "/dev/vhost-net": "vhost"}
OWN_MEMFDS = {"displaysurface": "display", "vnc-worker-output": "display", "tcg-jit": "qemu"}


def owners(
    ram: Iterable[RamBlock],
    chardevs: Iterable[Chardev],
    vnc: Iterable[VncServer],
    netdevs: Iterable[Netdev],
    fdsets: Iterable[tuple[int, tuple[tuple[int, str], ...]]],
    usernet: Iterable[tuple[int, str]],
) -> dict[int, str]:
    """Descriptor -> owner, of what the survey has found a number for."""
    found: dict[int, str] = {}
    for block in ram:
        if block.fd is not None:
            found[block.fd] = f"ram:{block.id}"
    for chardev in chardevs:
        for number in (chardev.listener, chardev.client):
            if number is not None:
                found[number] = f"chardev:{chardev.label}"
    for server in vnc:
        for listener in server.listeners:
            if listener.number is not None:
                found[listener.number] = f"vnc:{server.id}"
    for netdev in netdevs:
        for number in (*netdev.fds, *netdev.vhost_fds):
            found[number] = f"netdev:{netdev.id}"
    for number, netdev_id in usernet:
        found[number] = f"netdev:{netdev_id}"
    for fdset, members in fdsets:
        for number, _ in members:
            found[number] = f"fdset:{fdset}"
    return found


def open_files(
    table: Collection[OpenDescriptor],
    endpoints: Collection[Endpoint],
    known: Mapping[int, str],
    *,
    ram: Iterable[RamBlock],
    files: Mapping[tuple[int, int], str],
    ptys: Mapping[int, str],
    spice: Collection[int | str] = (),
) -> tuple[OpenFile, ...]:
    """`files`: owner by (st_dev, st_ino) of files that somebody names; `ptys`: chardev label by pts number;
    `spice`: its ports and paths."""
    unique = [d for d in table if d.number in known and kind_of(d) in ("file", "socket")]
    by_inode = {(d.device, d.inode): known[d.number] for d in unique}
    by_inode |= {(b.device, b.inode): f"ram:{b.id}" for b in ram if b.inode}
    by_number = {e.number: e for e in endpoints}
    served = {sockets_key(e): known[e.number] for e in endpoints if e.listening and e.number in known}
    found = []
    for entry in table:
        endpoint = by_number.get(entry.number)
        kind = kind_of(entry, endpoint)
        owner = known.get(entry.number, "")
        if not owner and (entry.device, entry.inode) in by_inode:
            owner = by_inode[entry.device, entry.inode]
        if not owner and endpoint is not None:
            owner = _owner_of_socket(endpoint, endpoints, known, served, spice)
        if not owner:
            owner = _owner_of_other(entry, kind, files, ptys)
        found.append(
            OpenFile(
                number=entry.number,
                target=entry.target,
                kind=kind,
                owner=owner,
                inode=entry.inode,
                device=entry.device,
            )
        )
    return tuple(found)


def sockets_key(endpoint: Endpoint) -> tuple[int, str, tuple[str, int]]:
    return endpoint.family, endpoint.path, endpoint.local


def kind_of(entry: OpenDescriptor, endpoint: Endpoint | None = None) -> str:
    """In the words of `OpenFile.kind`."""
    target = entry.target
    if target.startswith("socket:["):
        return "listener" if endpoint is not None and endpoint.listening else "socket"
    if target.startswith("anon_inode:"):
        name = target.removeprefix("anon_inode:").strip("[]")
        if name.startswith("kvm"):
            return "kvm"
        return "vfio" if name.startswith("vfio") else ANONYMOUS_KINDS.get(name, "anon")
    if target.startswith("pipe:["):
        return "pipe"
    if target.startswith("/memfd:"):
        return "memfd"
    if target in DEVICE_KINDS:
        return DEVICE_KINDS[target]
    if target.startswith(("/dev/vfio", "/dev/iommu")):
        return "vfio"
    if target.startswith("/dev/vhost"):
        return "vhost"
    if entry.mode and (stat.S_ISCHR(entry.mode) or stat.S_ISBLK(entry.mode)):
        return "device"
    return "file"


def _owner_of_socket(
    endpoint: Endpoint,
    endpoints: Collection[Endpoint],
    known: Mapping[int, str],
    served: Mapping[tuple[int, str, tuple[str, int]], str],
    spice: Collection[int | str],
) -> str:
    if endpoint.local[1] in spice or endpoint.path in spice:
        return "spice"
    if endpoint.listening:
        return ""
    for listener in endpoints:
        ours = listener.listening and sockets_key(listener) in served
        if ours and sockets.clients_of([endpoint], listener):
            return known.get(listener.number, "")
    return ""


def _owner_of_other(
    entry: OpenDescriptor, kind: str, files: Mapping[tuple[int, int], str], ptys: Mapping[int, str]
) -> str:
    if kind == "pty":
        index = dict(entry.extra).get("tty-index", "")  # drivers/tty/pty.c pty_show_fdinfo
        label = ptys.get(int(index)) if index.isdigit() else None
        return f"chardev:{label}" if label else ""
    if kind == "memfd":
        return OWN_MEMFDS.get(entry.target.removeprefix("/memfd:").removesuffix(" (deleted)"), "")
    if kind == "kvm":
        return "kvm"
    if kind in ("eventfd", "epoll") or entry.target in ("anon_inode:[signalfd]", "anon_inode:[io_uring]"):
        return "qemu"
    named = files.get((entry.device, entry.inode))
    if named and kind in ("file", "device"):
        return named
    if entry.number <= 2:
        return "stdio"
    return "qemu" if entry.target in ("/dev/null", "/dev/urandom") else ""


def named_files(pid: int, cwd: str, names: Iterable[tuple[str, str]]) -> dict[tuple[int, int], str]:
    """Owner by (st_dev, st_ino), of (path as the guest gives it, owner); what cannot be looked at is left out."""
    found: dict[tuple[int, int], str] = {}
    for path, owner in names:
        if not path or path.startswith(("json:", "fd:")) or re.match(r"[a-z0-9+-]+://", path):
            continue
        absolute = os.path.normpath(os.path.join(cwd, path))
        for place in (f"/proc/{pid}/root{absolute}", absolute):
            try:
                status = os.stat(place)
            except OSError:
                continue
            found.setdefault((status.st_dev, status.st_ino), owner)
            break
    return found


def node_names(nodes: Iterable[BlockNode]) -> list[tuple[str, str]]:
    """(file name, owner) of the nodes that open a file themselves."""
    return [(n.filename, f"node:{n.name}") for n in nodes if n.driver in ("file", "host_device", "host_cdrom")]
