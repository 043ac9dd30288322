"""The old spelling of character devices: `-serial unix:/p,server,nowait`, `-qmp tcp:...`, `-parallel file:x`.

In scope: which chardev such an option makes, and the label QEMU gives it. Sources: chardev/char.c
(qemu_chr_parse_compat) and system/vl.c (serial_parse, parallel_parse, debugcon_parse, monitor_parse). Out of scope:
rewriting them (`normalise`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from cpr.qemu.cmdline.argv import CommandLine
from cpr.qemu.cmdline.params import CommandLineError, Form, Item, Params, parse_keyval

LEGACY_OPTIONS = ("serial", "parallel", "debugcon", "monitor", "qmp", "qmp-pretty", "gdb", "s", "qtest")

MONITOR_OBJECTS = {"monitor-qmp": "control", "monitor-hmp": "readline"}
"""What follows the options: -object monitor-qmp (11.1, which calls -mon deprecated)."""

_BARE = frozenset({"null", "pty", "msmouse", "wctablet", "braille", "testdev", "stdio"})
_HOST_PORT = re.compile(r"([^:]{1,64}):([^,]{1,32})|:([^,]{1,32})")
_UDP = re.compile(r"([^:]{1,64}):([^@,]{1,32})|:([^@,]{1,32})")
_PIXELS = re.compile(r":(\d{1,7})x(\d{1,7})$")
_CELLS = re.compile(r":(\d{1,7})Cx(\d{1,7})C")
_PROTOCOLS = ("tcp:", "telnet:", "tn3270:", "websocket:")


@dataclass(frozen=True, slots=True)
class LegacyChardev:
    """A chardev made by the option at `index`. `existing` names one made elsewhere (`chardev:ID`); else `params`."""

    index: int
    option: str
    label: str
    params: Params | None
    existing: str | None = None
    monitor: bool = False  # `mon:` puts an HMP monitor beside the port on the same mux


def legacy_chardevs(cmdline: CommandLine) -> Iterator[LegacyChardev]:
    """Every chardev of an old option with its label. `none` makes none, but a serial port's number is used up by it."""
    serial = parallel = monitor = 0
    for index, option in cmdline.find(*LEGACY_OPTIONS):
        text = option.value or ""
        match option.name:
            case "serial":
                label = f"serial{serial}"
                serial += 1
            case "parallel":
                label = f"parallel{parallel}"
                parallel += text != "none"
            case "debugcon" | "qtest":
                label = option.name
            case "gdb" | "s":
                label, text = "gdb", gdb_device(option.value)
            case _:
                if option.name == "monitor" and text.startswith("none"):  # vl.c looks at four characters
                    continue
                label = f"compat_monitor{monitor}"
                monitor += 1  # `chardev:ID` counts as well
        if text == "none":
            continue
        if text.startswith("chardev:"):
            existing = text.removeprefix("chardev:")
            yield LegacyChardev(index, option.name, existing, None, existing)
            continue
        port = option.name in ("serial", "parallel", "debugcon")
        yield LegacyChardev(
            index, option.name, label, legacy_params(label, text), monitor=port and text.startswith("mon:")
        )


def gdb_device(value: str | None) -> str:
    """What -gdb makes of its argument; -s has none (gdbstub/system.c gdbserver_start)."""
    device = "tcp::1234" if value is None else value
    return f"{device},wait=off,nodelay=on,server=on" if device.startswith("tcp:") else device


def legacy_params(label: str, text: str) -> Params:
    """The parameters of the -chardev that `text` stands for; CommandLineError where QEMU knows no such driver."""
    device = text.removeprefix("mon:")
    params = _backend(label, device)
    if device != text:
        params = params.with_({"mux": "on"})
        if device == "stdio":
            params = params.with_({"signal": "off"})  # Ctrl-C goes to the guest
    return params


def _backend(label: str, device: str) -> Params:
    if device in _BARE:
        return _params(device, label)
    if device.startswith("vc"):
        return _virtual_console(label, device)
    if device == "con:":
        return _params("console", label)
    for prefix, backend in (("file:", "file"), ("pipe:", "pipe"), ("pty:", "pty")):
        if device.startswith(prefix):
            return _params(backend, label, path=device.removeprefix(prefix))
    for prefix in _PROTOCOLS:
        if device.startswith(prefix):
            return _network(label, prefix.removesuffix(":"), device.removeprefix(prefix))
    if device.startswith("udp:"):
        return _udp(label, device.removeprefix("udp:"))
    if device.startswith("unix:"):
        return _extended(_params("socket", label), parse_keyval(device.removeprefix("unix:"), "path"))
    if device.startswith(("/dev/parport", "/dev/ppi")):
        return _params("parallel", label, path=device)
    if device.startswith(("/dev/", "COM")):
        return _params("serial", label, path=device)
    raise CommandLineError(f"{device!r} is not a valid char driver")


def _virtual_console(label: str, device: str) -> Params:
    size = device.removeprefix("vc")
    if pixels := _PIXELS.match(size):
        return _params("vc", label, width=pixels[1], height=pixels[2])
    if cells := _CELLS.match(size):
        return _params("vc", label, cols=cells[1], rows=cells[2])
    if size.startswith(":"):
        raise CommandLineError(f"{device!r} is not a valid char driver")
    return _params("vc", label)


def _network(label: str, protocol: str, address: str) -> Params:
    found = _HOST_PORT.match(address)
    if found is None:
        raise CommandLineError(f"{protocol}:{address!r} has no port")
    params = _params("socket", label, host=found[1] or "", port=found[2] or found[3])
    rest = address[found.end() :]
    if rest.startswith(","):
        params = _extended(params, parse_keyval(rest[1:]))
    return params if protocol == "tcp" else params.with_({protocol: "on"})


def _udp(label: str, address: str) -> Params:
    found = _UDP.match(address)
    if found is None:
        raise CommandLineError(f"udp:{address!r} has no port")
    params = _params("udp", label, host=found[1] or "", port=found[2] or found[3])
    rest = address[found.end() :]
    if rest.startswith("@"):
        local = _HOST_PORT.match(rest[1:])
        if local is None:
            raise CommandLineError(f"udp:{address!r} has no local port")
        params = params.with_({"localaddr": local[1] or "", "localport": local[2] or local[3]})
    return params


def _params(backend: str, label: str, **pairs: str) -> Params:
    return Params.of(("backend", backend), id=label, **pairs)


def _extended(params: Params, more: Params) -> Params:
    """`more` after `params`, flags written out: `server,nowait` becomes `server=on,wait=off`."""
    return Params((*params.items, *(Item(item.key, item.value, Form.PAIR) for item in more.items)))
