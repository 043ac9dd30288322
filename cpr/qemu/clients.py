"""Who is connected to a chardev right now: quick enough to be asked in a blackout.

The survey reads the same facts once, with everything else; here only the accepted sockets are looked up again, because
clients come and go between the check and the switch.
"""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from typing import TYPE_CHECKING

from cpr.linux import proc
from cpr.model import Chardev, MonitorAddress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cpr.linux.fds import Fd

WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what a listener says, not where we listen


def listen_address(listener: Fd, label: str) -> MonitorAddress:
    """Where a listening socket can be connected to, by its own name. Raises OSError, ValueError."""
    with socket.socket(fileno=os.dup(listener.number)) as sock:
        name = sock.getsockname()
        if sock.family == socket.AF_UNIX:
            path = os.fsdecode(name)
            return MonitorAddress(label=label, path="@" + path[1:] if path.startswith("\0") else path)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            return MonitorAddress(label=label, host=WILDCARDS.get(name[0], name[0]), port=name[1])
    raise ValueError(f"{label} listens on a socket of family {sock.family}")


def socket_numbers(pid: int) -> dict[int, int]:
    """{inode: descriptor} of the sockets of a process."""
    found = {}
    base = f"/proc/{pid}/fd"
    for name in os.listdir(base):
        try:
            target = os.readlink(f"{base}/{name}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            found[int(target[8:-1])] = int(name)
    return found


def connected_now(pid: int, chardevs: tuple[Chardev, ...], listeners: Mapping[str, Fd]) -> tuple[Chardev, ...]:
    """The given chardevs with `client` as it is now; `listeners` are duplicates by label.

    Raises:
        OSError: the process is gone or may not be looked into.
    """
    numbers = socket_numbers(pid)
    addresses = {label: listen_address(fd, label) for label, fd in listeners.items()}
    by_path: dict[str, int] = {}
    by_port: dict[int, int] = {}
    if any(a.path for a in addresses.values()):
        for unix in proc.read_net_unix(pid):
            if unix.connected and unix.path and unix.inode in numbers:
                by_path[unix.path] = numbers[unix.inode]
    if any(not a.path for a in addresses.values()):
        for tcp in proc.read_net_tcp(pid):
            if tcp.state == "ESTABLISHED" and tcp.inode in numbers:
                by_port[tcp.local[1]] = numbers[tcp.inode]
    result = []
    for chardev in chardevs:
        address = addresses.get(chardev.label)
        if address is None:
            continue
        client = by_path.get(address.path) if address.path else by_port.get(address.port)
        result.append(replace(chardev, client=client, connected=client is not None))
    return tuple(result)
