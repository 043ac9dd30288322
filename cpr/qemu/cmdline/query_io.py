"""Questions to a command line: chardevs and monitors, network, displays, drives."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any, Literal

from cpr.qemu.cmdline.argv import POSITIONAL, CommandLine, Option
from cpr.qemu.cmdline.facts import Chardev, Display, Drive, Monitor, Netdev, Socket, Vnc, VncAddress
from cpr.qemu.cmdline.legacy import MONITOR_OBJECTS, legacy_chardevs
from cpr.qemu.cmdline.params import CommandLineError, Params, parse_keyval

_BACKENDS = {"tty": "serial", "parport": "parallel", "memory": "ringbuf"}  # chardev/char.c chardev_alias_table
_FRONTENDS = frozenset({"nic", "none"})  # of -net and -nic: no back end
_DISPLAY_SUGAR = frozenset({"curses", "sdl", "nographic"})

DRIVE_OPTIONS: dict[str, dict[str, str]] = {
    POSITIONAL: {"index": "0", "media": "disk"},
    "hda": {"index": "0", "media": "disk"},
    "hdb": {"index": "1", "media": "disk"},
    "hdc": {"index": "2", "media": "disk"},
    "hdd": {"index": "3", "media": "disk"},
    "cdrom": {"index": "2", "media": "cdrom"},
    "fda": {"if": "floppy", "index": "0"},
    "fdb": {"if": "floppy", "index": "1"},
    "mtdblock": {"if": "mtd"},
    "sd": {"if": "sd"},
    "pflash": {"if": "pflash"},
}
"""What the short options say as -drive (system/vl.c drive_add); their argument is the file."""


def chardevs(cmdline: CommandLine) -> tuple[Chardev, ...]:
    """Every chardev argv makes, old spellings included, in the order of argv. Implicit ones are not among them."""
    found = [_chardev(p.get("id") or "", p, index, "chardev") for index, p in _all_params(cmdline, "chardev")]
    found += [
        _chardev(old.label, old.params, old.index, old.option)
        for old in legacy_chardevs(cmdline)
        if old.params is not None
    ]
    return tuple(sorted(found, key=lambda chardev: chardev.index))


def monitors(cmdline: CommandLine) -> tuple[Monitor, ...]:
    """Every monitor: -mon, -monitor, -qmp, -object monitor-qmp, and one that shares a port (`-serial mon:stdio`)."""
    known = {chardev.label: chardev for chardev in chardevs(cmdline)}

    def monitor(label: str, mode: str | None, index: int, option: str, pretty: bool = False) -> Monitor:
        control: Literal["control", "readline"] = "control" if mode == "control" else "readline"
        return Monitor(label=label, mode=control, index=index, option=option, pretty=pretty, chardev=known.get(label))

    found = [
        monitor(p.get("chardev") or "", p.get("mode"), index, "mon", p.flag("pretty"))
        for index, p in _all_params(cmdline, "mon")
    ]
    for index, p in _all_params(cmdline, "object"):
        if mode := MONITOR_OBJECTS.get(p.get("qom-type") or ""):
            found.append(monitor(p.get("chardev") or "", mode, index, "object", p.flag("pretty")))
    for old in legacy_chardevs(cmdline):
        if old.monitor or old.option == "monitor":
            found.append(monitor(old.label, "readline", old.index, old.option))
        elif old.option in ("qmp", "qmp-pretty"):
            found.append(monitor(old.label, "control", old.index, old.option, old.option == "qmp-pretty"))
    return tuple(sorted(found, key=lambda found: found.index))


def netdevs(cmdline: CommandLine) -> tuple[Netdev, ...]:
    """Every network back end of -netdev, -nic and -net."""
    return tuple(
        _netdev(index, option.name, option.params)
        for index, option in cmdline.find("netdev", "nic", "net")
        if option.name == "netdev" or option.params.get("type") not in _FRONTENDS
    )


def displays(cmdline: CommandLine) -> tuple[Display, ...]:
    """Everything that shows the screen or could; a VNC server of `-display vnc=` as much as one of -vnc."""
    found: list[tuple[int, str, Params, str]] = []
    for index, option in cmdline.find("vnc", "spice", "display", *_DISPLAY_SUGAR):
        params, kind = option.params, option.name
        if option.name == "display":
            text = option.value or ""
            kind = "vnc" if text.startswith("vnc") else params.get("type") or ""
            params = parse_keyval(text.removeprefix("vnc="), "vnc") if kind == "vnc" else params
        found.append((index, option.name, params, "none" if kind == "nographic" else kind))
    ids = iter(_vnc_ids([params for _, _, params, kind in found if kind == "vnc"]))
    return tuple(
        Display(
            kind=kind,
            index=index,
            option=name,
            params=params,
            vnc=_vnc(next(ids), params) if kind == "vnc" else None,
        )
        for index, name, params, kind in found
    )


def drives(cmdline: CommandLine) -> tuple[Drive, ...]:
    """-drive, -blockdev, the short options (-hda, -cdrom, -pflash...) and the positional image."""
    return tuple(_drive(index, option) for index, option in cmdline.find("drive", "blockdev", *DRIVE_OPTIONS))


def drive_params(option: Option) -> Params:
    """A drive option's parameters; of a short one those of the -drive it stands for."""
    if option.name in DRIVE_OPTIONS:
        return Params.of(None, file=option.value or "", **DRIVE_OPTIONS[option.name])
    return option.params


def _all_params(cmdline: CommandLine, name: str) -> Iterator[tuple[int, Params]]:
    return ((index, option.params) for index, option in cmdline.find(name))


def _chardev(label: str, params: Params, index: int, option: str) -> Chardev:
    backend = params.get("backend") or ""
    backend = _BACKENDS.get(backend, backend)
    return Chardev(
        label=label,
        backend=backend,
        index=index,
        option=option,
        params=params,
        socket=_socket(params) if backend == "socket" else None,
        path=None if backend == "socket" else params.get("path"),
        logfile=params.get("logfile"),
        logappend=params.flag("logappend"),
        append=params.flag("append"),
        mux=params.flag("mux"),
    )


def _socket(params: Params) -> Socket:
    """chardev/char-socket.c qemu_chr_parse_socket: path, host or fd; `wait` is on unless said otherwise."""
    path, host = params.get("path"), params.get("host")
    server, to = params.flag("server"), params.get("to")
    kind: Literal["unix", "inet", "fd"] = "unix" if path is not None else "inet" if host is not None else "fd"
    milliseconds, seconds = params.get("reconnect-ms"), params.get("reconnect")
    return Socket(
        kind=kind,
        server=server,
        wait=server and params.flag("wait", True),
        path=path,
        abstract=params.flag("abstract"),
        tight=params.flag("tight", True),
        host=host,
        port=params.get("port"),
        to=int(to) if to else None,
        fd=params.get("fd"),
        telnet=params.flag("telnet"),
        tn3270=params.flag("tn3270"),
        websocket=params.flag("websocket"),
        tls_creds=params.get("tls-creds"),
        reconnect=int(milliseconds) / 1000 if milliseconds else float(seconds or 0),
    )


def _netdev(index: int, option: str, params: Params) -> Netdev:
    queues = params.get("queues")
    return Netdev(
        type=params.get("type") or "",
        id=params.get("id"),
        index=index,
        option=option,
        params=params,
        ifname=params.get("ifname"),
        script=params.get("script"),
        downscript=params.get("downscript"),
        fds=_numbers(params, "fd", "fds"),
        vhost=params.flag("vhost") or params.flag("vhostforce"),
        vhostfds=_numbers(params, "vhostfd", "vhostfds"),
        queues=int(queues) if queues else None,
        helper=params.get("helper"),
        br=params.get("br"),
        hostfwd=params.all("hostfwd"),
    )


def _numbers(params: Params, one: str, many: str) -> tuple[str, ...]:
    single, several = params.get(one), params.get(many)
    return (single,) if single else tuple(several.split(":")) if several else ()


def _vnc_ids(servers: list[Params]) -> list[str]:
    """ui/vnc.c vnc_auto_assign_id: `default`, then vnc2, vnc3..., passing over what somebody chose."""
    taken = {params.get("id") for params in servers}
    ids = []
    for params in servers:
        chosen = params.get("id")
        if chosen is None:
            names = itertools.chain(["default"], (f"vnc{number}" for number in itertools.count(2)))
            chosen = next(name for name in names if name not in taken)
            taken.add(chosen)
        ids.append(chosen)
    return ids


def _vnc(vnc_id: str, params: Params) -> Vnc:
    reverse = params.flag("reverse")
    texts = params.all("vnc")
    listens = [] if not texts or texts[-1] == "none" else texts
    return Vnc(
        id=vnc_id,
        addresses=tuple(vnc_address(text, reverse=reverse) for text in listens),
        params=params,
        to=int(params.get("to") or 0),
        websocket=params.get("websocket"),
        password=params.flag("password") or "password-secret" in params,
        password_secret=params.get("password-secret"),
        tls_creds=params.get("tls-creds"),
        sasl=params.flag("sasl"),
        share=params.get("share"),
        reverse=reverse,
    )


def vnc_address(text: str, *, reverse: bool = False) -> VncAddress:
    """The number counts from port 5900, but of a reverse connection it is the port (vnc_display_get_address)."""
    if text.startswith("unix:"):
        return VncAddress(kind="unix", path=text.removeprefix("unix:"))
    host, colon, number = text.rpartition(":")
    if not colon or not number.isdigit():
        raise CommandLineError(f"no VNC address: {text!r}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    return VncAddress(kind="tcp", host=host, port=int(number) + (0 if reverse else 5900))


def _drive(index: int, option: Option) -> Drive:
    params = drive_params(option)
    blockdev = option.name == "blockdev"
    file = None if blockdev else params.get("file")
    return Drive(
        index=index,
        option=option.name,
        params=params,
        id=params.get("id"),
        node_name=params.get("node-name"),
        driver=params.get("driver"),
        file=_json_file(file) if file and file.startswith("json:") else file or _filename(params),
        format=params.get("driver") if blockdev else params.get("format") or params.get("driver"),
        interface="none" if blockdev else params.get("if"),
        media=params.get("media"),
        child=params.get("file") if blockdev else None,
        snapshot=params.flag("snapshot"),
        readonly=params.flag("read-only") or params.flag("readonly"),
    )


def _filename(params: Params) -> str | None:
    """`filename`, wherever it stands along the chain of `file` children."""
    for depth in range(6):
        found = params.get("file." * depth + "filename")
        if found is not None:
            return found
    return None


def _json_file(text: str) -> str | None:
    """The file name in `file=json:{...}`, which may be nested or dotted."""
    try:
        node: Any = json.loads(text.removeprefix("json:"))
    except ValueError:
        return text
    return _filename(Params(json=node)) if isinstance(node, dict) else text
