"""Edits of chardevs: an inherited descriptor in place of an address, the null device, logs that are appended to.

A chardev is named by its QMP label; one in an old spelling is written out as -chardev first (`normalise_chardevs`).
"""

from __future__ import annotations

from cpr.qemu.cmdline.argv import CommandLine
from cpr.qemu.cmdline.normalise import normalise_chardevs
from cpr.qemu.cmdline.params import CommandLineError, Params

_ADDRESS = (
    "path",
    "host",
    "port",
    "to",
    "abstract",
    "tight",
    "ipv4",
    "ipv6",
    "mptcp",
    "localaddr",
    "localport",
    "reconnect",
    "reconnect-ms",
    "delay",
    "nodelay",
    "fd",
    "server",
    "wait",
)
_OF_EVERY_BACKEND = frozenset({"id", "mux", "logfile", "logappend", "logtimestamp"})


def with_chardev_fd(cmdline: CommandLine, label: str, fd: int, *, server: bool, wait: bool = False) -> CommandLine:
    """A socket chardev given its socket by number: a listening one (`server`), else a connected one.

    What frames the stream (telnet, websocket, tls-creds), the log and mux stay. With `wait` QEMU stands still until
    somebody connects. A connection that is handed over must not be dialled again, so `reconnect` goes.
    """
    cmdline, index = find_chardev(cmdline, label)
    option = cmdline.options[index]
    params = option.params
    if params.get("backend") != "socket":
        raise CommandLineError(f"chardev {label!r} is no socket but {params.get('backend')}")
    changed = params.without(*_ADDRESS).with_({"fd": str(fd)})
    if server:
        changed = changed.with_({"server": "on", "wait": wait})
    return cmdline.replaced(index, option.with_params(changed))


def with_chardev_address(
    cmdline: CommandLine, label: str, *, path: str = "", host: str = "", port: int = 0, server: bool
) -> CommandLine:
    """A socket chardev given back an address in place of a number: a UNIX `path` ('@name': abstract), else TCP.

    Nobody is waited for. What frames the stream, the log and mux stay.
    """
    cmdline, index = find_chardev(cmdline, label)
    option = cmdline.options[index]
    changed = option.params.without(*_ADDRESS)
    if path.startswith("@"):
        changed = changed.with_({"path": path[1:], "abstract": True})
    elif path:
        changed = changed.with_({"path": path})
    else:
        changed = changed.with_({"host": host, "port": str(port)})
    if server:
        changed = changed.with_({"server": True, "wait": False})
    return cmdline.replaced(index, option.with_params(changed))


def without_waiting(cmdline: CommandLine) -> CommandLine:
    """No chardev makes QEMU stand still at its start until a client comes (`wait`, which is on where nobody says)."""
    cmdline = normalise_chardevs(cmdline)
    for index, option in cmdline.find("chardev"):
        params = option.params
        if params.get("backend") == "socket" and params.flag("server") and params.flag("wait", True):
            cmdline = cmdline.replaced(index, option.with_params(params.with_({"wait": False})))
    return cmdline


def with_chardev_null(cmdline: CommandLine, label: str) -> CommandLine:
    """The null device in place of whatever it was; label, mux and log stay."""
    cmdline, index = find_chardev(cmdline, label)
    option = cmdline.options[index]
    return cmdline.replaced(index, option.with_params(null_chardev(option.params)))


def with_log_append(cmdline: CommandLine) -> CommandLine:
    """Every log and every file chardev opened for appending, so that a second QEMU does not empty it.

    Not covered, because QEMU has no word for it: -D, -trace file=, -dump-vmstate; take those away.
    """
    cmdline = normalise_chardevs(cmdline)
    for index, option in cmdline.find("chardev"):
        params = option.params
        if "logfile" in params:
            params = params.with_({"logappend": "on"})
        if params.get("backend") == "file":
            params = params.with_({"append": "on"})
        if params != option.params:
            cmdline = cmdline.replaced(index, option.with_params(params))
    return cmdline


def find_chardev(cmdline: CommandLine, label: str) -> tuple[CommandLine, int]:
    """The -chardev called `label`, written out if need be, and its index. Raises CommandLineError if there is none."""
    for candidate in (cmdline, normalise_chardevs(cmdline)):
        for index, option in candidate.find("chardev"):
            if option.params.get("id") == label:
                return candidate, index
    raise CommandLineError(f"no chardev {label!r} in the command line")


def null_chardev(params: Params) -> Params:
    """The parameters of a null device in the place of the one with `params`."""
    kept = {key: params.get(key) for key in params.names() if key in _OF_EVERY_BACKEND}
    return Params.of(("backend", "null")).with_(kept)
