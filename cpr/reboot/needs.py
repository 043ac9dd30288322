"""What a guest needs of this boot, and somebody else makes: looked for before its QEMU is started, so that what is
missing is named, and nothing has been tried.

Only what is certain is told. That nobody listens at a socket that is there is not: to connect would take the only
connection that some helpers serve (swtpm), and one in another network namespace is in no list of ours.

Out of scope: RAM, disks and passed-through devices (verifying.py), and what has no name at all (afresh.py, `missing`).
"""

from __future__ import annotations

import os
import socket
import stat
import time
from typing import TYPE_CHECKING

from cpr.linux import net
from cpr.qemu.chardevs import host_port
from cpr.qemu.cmdline import CommandLine, chardevs
from cpr.survey_files import read_at_start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cpr.model import Guest
    from cpr.reboot.afresh import Afresh
    from cpr.reboot.manifest import SavedGuest

PATIENCE_SECONDS = 10.0
"""Early in a boot, others are still at it."""
SLICE = 0.2
LOOPBACK = ("localhost", "127.0.0.1", "::1")
INTERFACES = "/sys/class/net"
KVM = "/dev/kvm"


def unmet(saved: SavedGuest, guest: Guest, made: Afresh) -> tuple[str, ...]:
    """What is missing, in words; `guest`: all that was known of it, `made`: how it is going to be started."""
    line = CommandLine.parse(made.argv)
    sockets = [chardev.socket for chardev in chardevs(line) if chardev.socket is not None and chardev.socket.server]
    own = {("@" if one.abstract else "") + (one.path or f"{one.host}:{one.port}") for one in sockets}
    found = [
        words
        for kind, name in made.needs
        if name not in own and (words := _LOOK[kind](os.path.join(guest.cwd, name), name))
    ]
    return (*found, *_files(saved, guest, line), *_machine(guest))


def awaited(saved: SavedGuest, guest: Guest, made: Afresh, attend: Callable[[], None]) -> tuple[str, ...]:
    """As `unmet`, once it is clear that nobody is about to make it. `attend` is called while waiting, and may raise."""
    end = time.monotonic() + PATIENCE_SECONDS
    while (missing := unmet(saved, guest, made)) and time.monotonic() < end:
        attend()
        time.sleep(SLICE)
    return missing


# -- needs by kind: (as an absolute path, as it is named) -> what is missing, or ""


def _interface(_: str, name: str) -> str:
    if not _there(name):
        return f"the tap interface {name} is not there: make it, up and in its bridge (ip tuntap, systemd-networkd)"
    return f"the interface {name} is there, and is no tap" if _is_not(name, "tun_flags") else ""


def _bridge(_: str, name: str) -> str:
    if not _there(name):
        return f"the bridge {name} is not there: make it (ip link, systemd-networkd)"
    return f"the interface {name} is there, and is no bridge" if _is_not(name, "bridge") else ""


def _there(name: str) -> bool:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def _is_not(name: str, mark: str) -> bool:
    """Known only where /sys shows our network namespace."""
    directory = os.path.join(INTERFACES, name)
    return os.path.isdir(directory) and not os.path.exists(os.path.join(directory, mark))


def _socket(path: str, name: str) -> str:
    if name.startswith("@"):
        listens = any(s.listening and s.path == name for s in net.read_net_unix(os.getpid()))
        return "" if listens else f"nobody listens at {name}, which QEMU connects to"
    try:
        return "" if stat.S_ISSOCK(os.stat(path).st_mode) else f"{path} is there, and is no socket"
    except (FileNotFoundError, NotADirectoryError):
        return f"the socket {path} is not there, which QEMU connects to: whoever listens there has to be started"
    except OSError:
        return ""  # nobody can say


def _address(_: str, name: str) -> str:
    host, port = host_port(name)
    if host not in LOOPBACK or not port:
        return ""  # another host's, or one that a name server knows
    listens = any(s.state == "LISTEN" and s.local[1] == port for s in net.read_net_tcp(os.getpid()))
    return "" if listens else f"nobody listens at {name}, which QEMU connects to"


_LOOK = {"interface": _interface, "bridge": _bridge, "socket": _socket, "address": _address}
"""Kinds of `Afresh.needs`."""


# -- what the command line names


def _files(saved: SavedGuest, guest: Guest, line: CommandLine) -> Iterator[str]:
    """Firmware, kernels, secrets. Of disks more is known (verifying.py)."""
    if _gone(guest.cwd):
        yield f"its working directory {guest.cwd} is not there"
        return
    disks = {disk.path for disk in saved.disks}
    for name in dict.fromkeys(read_at_start(line)):
        path = os.path.join(guest.cwd, name)
        if path not in disks and _gone(path):
            yield f"{path} is not there, which its command line names"


def _machine(guest: Guest) -> Iterator[str]:
    if guest.accelerator == "kvm" and _gone(KVM):
        yield f"{KVM} is not there: this kernel has no KVM, or its module is not loaded (modprobe kvm_intel, kvm_amd)"


def _gone(path: str) -> bool:
    """What may not be looked at counts as there."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False
