"""Character devices: `query-chardev` joined with argv, and with the sockets of the process.

QEMU's own description of a chardev (`filename`) says where it listens and who is connected; argv says what of it a
command line can give again; the sockets say which descriptors these are.
"""

from __future__ import annotations

import json
import re
import socket
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cpr.model import Chardev
from cpr.qemu import cmdline as cl
from cpr.qemu import sockets
from cpr.qemu.answers import flag, mappings, text

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from cpr.qemu.answers import Answers
    from cpr.qemu.cmdline.facts import Chardev as Given
    from cpr.qemu.sockets import Endpoint

FRAMED = ("telnet", "tn3270", "websocket")
GDB = "gdb"
"""The label of the gdb stub's chardev (gdbstub/system.c), and what we call its back end: nobody else's rules fit it."""
OWN_LABEL = "#"
"""Begins the labels that QEMU makes up (util/id.c id_generate); nobody else may use it."""
MUX_BASE = "-base"
"""What QEMU adds to the label of the chardev below a multiplexer (chardev/char.c)."""

NOTE = "CPR_CONNECTIONS"
"""Variable: a JSON object of the inodes of connections that QEMU has made, by chardev. An update puts a silent one at
the number that argv says, and gives this one later, at another."""

CONTROL = "cpr-control"
"""Label of the private monitor that an update adds where the guest has no QMP socket that takes descriptors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """QEMU's `filename` of a chardev, taken apart."""

    protocol: str
    """unix, tcp, telnet, tn3270, websocket, vsock, fd, pty, file, vc, null, ..."""
    address: str = ""
    """Path, or HOST:PORT of the local end."""
    peer: str = ""
    server: bool = False
    connected: bool = True

    @property
    def backend(self) -> str:
        return "socket" if self.protocol in ("unix", "tcp", "vsock", "fd", *FRAMED) else self.protocol


def parse_filename(filename: str) -> Described:
    """E.g. `disconnected:unix:/run/a.sock,server=on`, `tcp:127.0.0.1:4444,server=on <-> 127.0.0.1:51234`, `vc`.

    As chardev/char-socket.c writes them. An option may follow the address in any order; a path may hold commas.
    """
    connected = not filename.startswith("disconnected:")
    rest, _, peer = filename.removeprefix("disconnected:").partition(" <-> ")
    protocol, _, address = rest.partition(":")
    server = bool(re.search(r",server(=on)?(,|$)", address))
    address = re.sub(r"(,(server|abstract|tight|telnet|tn3270|websocket)(=on|=off)?)+$", "", address)
    return Described(protocol=protocol, address=address, peer=peer, server=server, connected=connected)


def gdb_device(filename: str) -> str:
    """What HMP `gdbserver` takes to open a stub again that `query-chardev` describes so."""
    what = parse_filename(filename)
    options = ",server=on,wait=off" if what.protocol == "unix" else ""  # to tcp: it adds them itself
    return f"{what.protocol}:{what.address}{options}"


def host_port(address: str) -> tuple[str, int]:
    """`127.0.0.1:4444`, `[::1]:4444`; port 0 where there is none."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port) if port.isdigit() else 0


def parse_chardevs(reply: Any) -> tuple[tuple[str, str, bool], ...]:
    """(label, filename, frontend-open), by label.

    A label that QEMU made up (#chr030) is another in every process: it is replaced by one that stays, `#chr0`.
    """
    entries = sorted((text(e["label"]), text(e["filename"]), flag(e["frontend-open"])) for e in mappings(reply))
    made_up = [label for label, _, _ in entries if label.startswith(OWN_LABEL)]
    stable = {label: f"{OWN_LABEL}chr{number}" for number, label in enumerate(made_up)}
    return tuple((stable.get(label, label), filename, opened) for label, filename, opened in entries)


def monitor_objects(answers: Answers) -> dict[str, str]:
    """Chardev label -> mode of the monitors that are objects (QEMU >= 11.1)."""
    found: dict[str, str] = {}
    for name, kind in answers.children("/objects"):
        mode = {"monitor-qmp": "control", "monitor-hmp": "readline"}.get(kind)
        if mode:
            label = answers.qom_get(f"/objects/{name}", "chardev", text, "")
            found[label.rpartition("/")[2] or name] = mode
    return found


def noted(environ: Iterable[tuple[str, str]]) -> dict[str, int]:
    """{chardev: inode of the connection that QEMU has made}, from `NOTE`."""
    try:
        value = json.loads(dict(environ).get(NOTE, "{}"))
    except ValueError:
        return {}
    if not isinstance(value, dict):
        return {}
    return {label: inode for label, inode in value.items() if isinstance(inode, int)}


def chardevs(
    answers: Answers,
    cmdline: cl.CommandLine | None,
    table: Collection[Endpoint],
    *,
    pid: int,
    noted: Mapping[str, int] | None = None,
) -> tuple[Chardev, ...]:
    """Every chardev there is, by label; not an earlier update's `CONTROL`, which is nobody's any more.

    `noted`: see the function of that name.
    """
    listed = answers.read("query-chardev", parse_chardevs, ())
    modes = monitor_objects(answers)
    if cmdline is not None:
        modes |= {m.label: m.mode for m in cl.monitors(cmdline)}
    return tuple(c for c in join(listed, cmdline, modes, table, pid=pid, noted=noted or {}) if c.label != CONTROL)


def join(
    listed: Iterable[tuple[str, str, bool]],
    cmdline: cl.CommandLine | None,
    modes: Mapping[str, str],
    table: Collection[Endpoint],
    *,
    pid: int,
    noted: Mapping[str, int] = MappingProxyType({}),
) -> tuple[Chardev, ...]:
    """The pure part, but for the backlog of UNIX listeners, which the kernel is asked for."""
    given = {c.label: c for c in cl.chardevs(cmdline)} if cmdline is not None else {}
    implicit = set(cl.implicit_chardevs(cmdline)) if cmdline is not None else set()
    implicit.add(GDB)
    described = {label: (parse_filename(filename), filename, opened) for label, filename, opened in listed}
    found = []
    for label, (what, filename, opened) in sorted(described.items()):
        argv = given.get(label)
        if argv is not None and argv.mux and f"{label}{MUX_BASE}" in described:
            what = described[f"{label}{MUX_BASE}"][0]  # the socket is the base's; argv knows it by this label
        below_mux = label.endswith(MUX_BASE) and (upper := given.get(label.removesuffix(MUX_BASE))) and upper.mux
        if below_mux:
            known = Chardev(label=label, backend="mux", filename=filename, frontend_open=opened, movable=False)
            found.append(known)
            continue
        found.append(
            _chardev(
                label,
                filename,
                opened,
                what,
                argv,
                in_argv=argv is not None or label in implicit or label.startswith(OWN_LABEL) or cmdline is None,
                mode=modes.get(label, ""),
                table=table,
                pid=pid,
                noted=noted.get(label, 0),
            )
        )
    return tuple(found)


def _chardev(
    label: str,
    filename: str,
    opened: bool,
    what: Described,
    argv: Given | None,
    *,
    in_argv: bool,
    mode: str,
    table: Collection[Endpoint],
    pid: int,
    noted: int,
) -> Chardev:
    given = argv.socket if argv is not None else None
    backend = argv.backend if argv is not None else what.backend
    if label == GDB:
        backend = GDB
    server = what.server or (given is not None and given.server)
    framed = what.protocol in FRAMED or (
        given is not None and bool(given.telnet or given.tn3270 or given.websocket or given.tls_creds)
    )
    listener = _listener(what, argv, table) if backend in ("socket", GDB) and server else None
    if listener is not None:
        client = _accepted(what, sockets.clients_of(table, listener))
    elif backend == "socket" and not server:
        client = _outgoing(what, argv, table, pid, noted)
    else:
        client = None
    return Chardev(
        label=label,
        backend=backend or "unknown",
        filename=filename,
        frontend_open=opened,
        connected=backend == "socket" and what.connected,
        server=server,
        listener=listener.number if listener is not None else None,
        client=client.number if client is not None else None,
        queued=sockets.waiting(listener, pid) if listener is not None else 0,
        monitor=mode,
        plain=not framed,
        in_argv=in_argv,
        movable=backend == "socket" and not framed and not (argv is not None and argv.mux),
        reconnect=given is not None and given.reconnect > 0,
    )


def _numbered(argv: Given | None, table: Collection[Endpoint]) -> Endpoint | None:
    """The socket whose number argv gives. A number that was closed since may be anything now: only a socket counts."""
    number = argv.socket.fd if argv is not None and argv.socket is not None else None
    if number is None or not number.isdigit():
        return None
    return next((e for e in table if e.number == int(number)), None)


def _listener(what: Described, argv: Given | None, table: Collection[Endpoint]) -> Endpoint | None:
    numbered = _numbered(argv, table)
    if numbered is not None and numbered.listening:
        return numbered
    given = argv.socket if argv is not None else None
    if given is not None and given.kind == "unix" and given.path:
        return sockets.unix_listener(table, f"@{given.path}" if given.abstract else given.path)
    if what.protocol == "unix":
        return sockets.unix_listener(table, what.address) or sockets.unix_listener(table, f"@{what.address}")
    host, port = host_port(what.address)
    return sockets.tcp_listener(table, host, port) if port else None


def _accepted(what: Described, clients: tuple[Endpoint, ...]) -> Endpoint | None:
    """QEMU serves one client; of several TCP ones (a gone one not closed yet) the one it names."""
    if what.peer:
        named = [c for c in clients if _same_end(c.remote, host_port(what.peer))]
        return named[0] if named else None
    return clients[0] if len(clients) == 1 and what.connected else None


def _outgoing(
    what: Described, argv: Given | None, table: Collection[Endpoint], pid: int, noted: int
) -> Endpoint | None:
    if not what.connected:
        return None
    if noted:
        return next((e for e in table if e.inode == noted and e.connected), None)
    numbered = _numbered(argv, table)
    if numbered is not None and not numbered.listening:
        return numbered
    if what.peer:
        ends = host_port(what.address), host_port(what.peer)
        found = [e for e in table if e.connected and _same_end(e.local, ends[0]) and _same_end(e.remote, ends[1])]
        return found[0] if len(found) == 1 else None
    if what.protocol == "unix":
        unnamed = [e for e in table if e.family == socket.AF_UNIX and e.connected and not e.listening and not e.path]
        path = (argv.socket.path if argv is not None and argv.socket is not None else None) or what.address
        named = [e for e in unnamed if path and sockets.peer_path(e, pid).removeprefix("@") == path]
        return named[0] if len(named) == 1 else None
    return None


def _same_end(one: tuple[str, int], other: tuple[str, int]) -> bool:
    return one[1] == other[1] and sockets.plain_host(one[0]) == sockets.plain_host(other[0])


def pty_numbers(found: Iterable[Chardev]) -> dict[int, str]:
    """Chardev label by the number of its pty (`pty:/dev/pts/3`)."""
    numbered = ((re.match(r"pty:/dev/pts/(\d+)$", c.filename), c.label) for c in found)
    return {int(match[1]): label for match, label in numbered if match}
