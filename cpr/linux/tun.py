"""Tap queues: the settings of a tun device that a second user of the same queue would change under the first.

A queue's descriptor can be shared by two processes, but header size, offloads and whether it is attached belong to the
device and the open file, not to the process (drivers/net/tun.c). Who uses which queue is not known here.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import threading
from dataclasses import dataclass

from cpr.linux.fds import Fd
from cpr.linux.syscalls import (
    CLONE_NEWNET,
    IFF_MULTI_QUEUE,
    IFF_NO_PI,
    IFF_TAP,
    IFF_VNET_HDR,
    tun_interface,
    unshare,
)

TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNGETVNETHDRSZ = 0x800454D7
TUNSETVNETHDRSZ = 0x400454D8
TUNSETQUEUE = 0x400454D9
IFF_ATTACH_QUEUE = 0x0200
IFF_DETACH_QUEUE = 0x0400
"""Also among the flags of a queue that is detached (Linux 3.8)."""
IFF_PERSIST = 0x0800
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 = 0x01, 0x02, 0x04
SIOCETHTOOL = 0x8946
ETHTOOL_GTXCSUM, ETHTOOL_GTSO = 0x16, 0x1E


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """What one tap descriptor is set to. `header` in bytes, 0 without virtio headers; `offloads`: TUN_F_ bits."""

    name: str
    multi: bool
    attached: bool
    header: int
    offloads: int


def header_size(fd: Fd) -> int:
    """Bytes of the virtio header before each packet (TUNGETVNETHDRSZ)."""
    return int(struct.unpack("i", fcntl.ioctl(fd.number, TUNGETVNETHDRSZ, bytes(4)))[0])


def set_header_size(fd: Fd, size: int) -> None:
    fcntl.ioctl(fd.number, TUNSETVNETHDRSZ, struct.pack("i", size))


def set_attached(fd: Fd, attached: bool) -> None:
    """Attach or detach a queue of a multi-queue device (TUNSETQUEUE). EINVAL: it is so already."""
    flags = IFF_ATTACH_QUEUE if attached else IFF_DETACH_QUEUE
    fcntl.ioctl(fd.number, TUNSETQUEUE, struct.pack("16sH22x", b"", flags))


def offloads(name: str) -> int:
    """TUN_F_ bits that are on, as far as the interface tells; 0 where it is in another network namespace."""
    found = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for command, bits in ((ETHTOOL_GTXCSUM, TUN_F_CSUM), (ETHTOOL_GTSO, TUN_F_TSO4 | TUN_F_TSO6)):
            if _ethtool(sock, name, command):
                found |= bits
    return found if found & TUN_F_CSUM else 0


def _ethtool(sock: socket.socket, name: str, command: int) -> bool:
    value = (ctypes.c_uint32 * 2)(command, 0)
    request = struct.pack("16sP16x", name.encode(), ctypes.addressof(value))
    try:
        fcntl.ioctl(sock.fileno(), SIOCETHTOOL, request)
    except OSError:
        return False
    return bool(value[1])


def set_offloads(fd: Fd, bits: int) -> None:
    fcntl.ioctl(fd.number, TUNSETOFFLOAD, bits)


def read_queue(fd: Fd) -> Queue:
    """The settings of a tap descriptor. Raises OSError: it is none."""
    name, flags = tun_interface(fd.number)
    return Queue(
        name=name,
        multi=bool(flags & IFF_MULTI_QUEUE),
        attached=not flags & IFF_DETACH_QUEUE,
        header=header_size(fd) if flags & IFF_VNET_HDR else 0,
        offloads=offloads(name),
    )


def persistent(name: str, *, root: str = "/") -> bool:
    """Whether the tun device `name` of our network namespace stays without any descriptor of it (TUNSETPERSIST)."""
    try:
        with open(os.path.join(root, "sys/class/net", name, "tun_flags")) as file:
            return bool(int(file.read(), 16) & IFF_PERSIST)
    except (OSError, ValueError):
        return False


def throw_away_queues(flags: int, count: int) -> list[Fd]:
    """Queues of a new tap in a network namespace of its own; both go with the last descriptor of it.

    `flags`: IFF_ bits as TUNGETIFF tells them of another queue; those that change what a guest can use are taken over.

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN.
    """
    wanted = IFF_TAP | IFF_NO_PI | flags & (IFF_VNET_HDR | IFF_MULTI_QUEUE)
    queues: list[Fd] = []
    failed: list[OSError] = []

    def make() -> None:
        try:
            unshare(CLONE_NEWNET)  # of this thread alone, which ends at once
            for _ in range(count):
                queues.append(Fd(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)))
                fcntl.ioctl(queues[-1].number, TUNSETIFF, struct.pack("16sH22x", b"rehearsal", wanted))
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if failed:
        for fd in queues:
            fd.close()
        raise failed[0]
    return queues


def mend_queue(fd: Fd, wanted: Queue) -> bool:
    """Put header size and attachment back where they differ. Whether anything did."""
    mended = False
    if wanted.multi:
        attached = not tun_interface(fd.number)[1] & IFF_DETACH_QUEUE
        if attached != wanted.attached:
            with contextlib.suppress(OSError):
                set_attached(fd, wanted.attached)
            mended = True
    if wanted.header and (not wanted.multi or wanted.attached) and header_size(fd) != wanted.header:
        set_header_size(fd, wanted.header)
        mended = True
    return mended
