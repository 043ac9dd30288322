"""The command line with which a guest is started after a boot, when no descriptor of its old process is left. Pure.

    made = afresh(guest, target)              guest: facts.with_reboot_facts(survey(candidate)), before it is saved
    made.argv, made.environ                   start it so, in the guest's likeness (likeness.launch): it waits for state
    made.control_number                       ... with a connected socket of ours as this descriptor: a QMP monitor, the
    made.control                              chardev of this label; no other descriptor but stdio and memory is needed
    made.missing                              (subject, why, hint) of what cannot be had again; argv does not start then
    made.directories                          of the sockets, pid and log files that QEMU makes: those on a tmpfs (/run)
                                              are gone after the boot. Note owner and mode before, make them again
    made.needs                                (kind, name) of what somebody else has to have made: "interface" tap0,
                                              "bridge" br0, "socket" /run/tpm.sock or @abstract, "address" HOST:PORT
    made.notes                                in words, for a person
    made.memory                               new memory files that have to be given besides, where RAM is made anew
    with_ram_paths(argv, {"ram0": "/dev/dax1.0"})      names of DAX devices are counted anew at every boot

It is edited from the old command line, as the successor of a restart is (`engines.successor`). RAM is what its
descriptor really is. Where an earlier update has put a descriptor in place of an address, the address is put back:
sockets from where they listen, displays, forwarded ports, taps as they were given, or by name if they stay. Gone is
what would touch the guest (-loadvm, prealloc, `discard-data`) or wait for somebody (`wait=on`).

Out of scope: whether RAM is still there (persistence.py), and doing any of it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cpr.engines.successor import base_command, environment, without_control
from cpr.model import NotHadAgain
from cpr.qemu import cmdline as cl
from cpr.qemu.chardevs import CONTROL, GDB, MUX_BASE, gdb_device, host_port, parse_filename
from cpr.qemu.given_taps import taps_as_given
from cpr.qemu.options import translate
from cpr.reboot.afresh_ram import RamFindings, files_made, with_ram

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from cpr.model import Chardev, Guest, Netdev, Target, VncListener
    from cpr.qemu.cmdline.facts import Netdev as GivenNetdev
    from cpr.reboot.afresh_ram import NewMemory

CONTROL_NUMBER = 20
"""Descriptor number of the private monitor, above stdio and what a launcher holds for itself."""

DROPPED_OPTIONS = ("incoming", "loadvm", "daemonize", "pidfile", "mem-prealloc", "S", "dump-vmstate", "D")
"""-D: it would empty the log; QEMU logs to standard error instead, which is a file."""

FIRST_MEMORY = CONTROL_NUMBER + 1
"""Descriptor number of the first new memory file, where RAM is made anew."""

WILDCARDS = {"0.0.0.0", "::"}  # noqa: S104 (compared with, not bound to)
VNC_BASE_PORT = 5900

TAP_HINT = (
    "let the host make the interface (ip tuntap add, systemd-networkd) and start the guest with "
    "-netdev tap,ifname=NAME,script=no"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Afresh:
    """A start after a boot: see the module's docstring."""

    argv: tuple[str, ...]
    environ: tuple[tuple[str, str], ...]
    control: str = CONTROL
    control_number: int = CONTROL_NUMBER
    missing: tuple[NotHadAgain, ...] = ()
    directories: tuple[str, ...] = ()
    needs: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    memory: tuple[NewMemory, ...] = ()


@dataclass(slots=True)
class _Findings(RamFindings):
    """All that comes to light while the command line is edited."""

    needs: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def afresh(guest: Guest, target: Target, *, mark: str = "", anew: Collection[str] = ()) -> Afresh:
    """Build it. `mark`: value of `successor.MARK` in its environment, where it shall be found by that.

    `anew`: ids of RAM blocks whose pages are gone, and that are filled from the state: QEMU makes them as its command
    line says, or over memory files of ours (`Afresh.memory`) where it was given descriptors.

    Raises `CommandLineError` where argv cannot be understood (a check has said so before).
    """
    line, found = _edited(guest, anew)
    line = cl.with_program(line, target.binary.path)
    if target.options is not None:
        translation = translate(line, target.options)
        line = translation.cmdline
        found.notes += translation.changes
    directories = _directories(guest, line, anew)
    line = line.appended(
        cl.Option("chardev", f"socket,id={CONTROL},fd={CONTROL_NUMBER}"),
        cl.Option("mon", f"chardev={CONTROL},mode=control"),
    )
    line = cl.append_options(cl.for_incoming(line), target.extra_options)
    return Afresh(
        argv=tuple(line.argv()),
        environ=environment(guest, target, mark=mark),
        missing=tuple(found.missing),
        directories=directories,
        needs=tuple(dict.fromkeys(found.needs)),
        notes=tuple(found.notes),
        memory=tuple(found.memory),
    )


def demands(guest: Guest) -> tuple[tuple[NotHadAgain, ...], tuple[tuple[str, str], ...]]:
    """`Afresh.missing` and `needs`, which are the same for every new QEMU. Raises `CommandLineError`."""
    found = _edited(guest)[1]
    return tuple(found.missing), tuple(dict.fromkeys(found.needs))


def with_ram_paths(argv: Sequence[str], paths: Mapping[str, str]) -> tuple[str, ...]:
    """A command line made by `afresh` with RAM blocks (by id) at other paths. Raises `CommandLineError`."""
    line = cl.CommandLine.parse(argv)
    for block, path in paths.items():
        line = cl.with_memory_backend_file(line, block, path)
    return tuple(line.argv())


def _edited(guest: Guest, anew: Collection[str] = ()) -> tuple[cl.CommandLine, _Findings]:
    """The command line but for what is the new QEMU's, and what was found on the way."""
    found = _Findings()
    line = base_command(guest)
    if line.has("D"):
        found.notes.append("-D is left out, it would empty the log: QEMU logs to standard error")
    line = cl.without_user(without_control(cl.without(line, DROPPED_OPTIONS)))
    line = cl.with_machine_type(line, guest.machine)
    line = cl.without_waiting(cl.with_log_append(line))
    if guest.generation_id:
        line = cl.with_generation_id(line, guest.generation_id)
    if guest.pidfile:
        line = line.appended(cl.Option("pidfile", guest.pidfile))
    line = with_ram(line, guest, anew, FIRST_MEMORY, found)
    line = _with_sockets(line, guest, found)
    line = _with_network(line, guest, found)
    line = _with_vnc(line, guest, found)
    stub = next((c for c in guest.chardevs if c.label == GDB), None)
    if stub is not None and cl.gdbstub(line) is None:
        line = line.appended(cl.Option("gdb", gdb_device(stub.filename)))
    _note_numbers(line, found)
    return line, found


# -- sockets


def _with_sockets(line: cl.CommandLine, guest: Guest, found: _Findings) -> cl.CommandLine:
    known = {c.label: c for c in guest.chardevs}
    for given in cl.chardevs(line):
        if given.socket is None:
            continue
        if given.socket.kind != "fd":
            if not given.socket.server and not given.socket.reconnect:
                place = given.socket.path or f"{given.socket.host}:{given.socket.port}"
                place = f"@{place}" if given.socket.abstract else place
                found.needs.append(("socket" if given.socket.path else "address", place))
            continue
        server = given.socket.server
        address = _address(known, given.label, server=server)
        if not address:
            found.said.add(given.index)
            found.missing.append(_socket_missing(given.label, given.socket.fd or "?", server=server))
            continue
        if "/" in address or address.startswith("@"):
            line = cl.with_chardev_address(line, given.label, path=address, server=server)
        else:
            host, port = host_port(address)
            line = cl.with_chardev_address(line, given.label, host=host, port=port, server=server)
        if not server:
            found.needs.append(("socket" if address.startswith(("/", "@")) else "address", address))
    return line


def _address(known: Mapping[str, Chardev], label: str, *, server: bool) -> str:
    """Path, @name or HOST:PORT where a chardev listens, or is connected to; "" where nobody knows."""
    chardev = known.get(label)
    if chardev is None:
        return ""
    if not server:
        return chardev.peer if chardev.peer.startswith(("/", "@")) or _is_tcp(chardev.peer) else ""
    below = known.get(f"{label}{MUX_BASE}")
    filename = (below or chardev).filename
    what = parse_filename(filename)
    if what.protocol == "unix":
        return f"@{what.address}" if ",abstract" in filename else _with_slash(what.address)
    return what.address if _is_tcp(what.address) else ""


def _is_tcp(address: str) -> bool:
    return ":" in address and "/" not in address and host_port(address)[1] > 0


def _with_slash(path: str) -> str:
    """A relative path told from HOST:PORT."""
    return path if "/" in path or not path else f"./{path}"


def _socket_missing(label: str, number: str, *, server: bool) -> NotHadAgain:
    what = "listens at a socket" if server else "is connected by a socket"
    return NotHadAgain(
        f"chardev {label}",
        f"it {what} that was passed in by number (fd={number}), and no address is known for it",
        "start the guest the next time with the socket's address (path=, or host= and port=)",
    )


# -- network


def _with_network(line: cl.CommandLine, guest: Guest, found: _Findings) -> cl.CommandLine:
    noted = taps_as_given(line, guest.environ)
    for given in cl.netdevs(line):
        fact = _fact_of(given, guest)
        if given.fds and given.id in noted:  # as it was before an update put descriptors there
            line = line.replaced(given.index, cl.Option("netdev", noted[given.id]))
            (given,) = [n for n in cl.netdevs(line) if n.index == given.index]
        if given.type in ("tap", "bridge"):
            line = _with_tap(line, given, fact, found)
        elif given.type == "user" and fact is not None and len(fact.hostfwd) >= len(given.hostfwd):
            line = cl.with_hostfwd(line, given.index, fact.hostfwd)
    return line


def _fact_of(given: GivenNetdev, guest: Guest) -> Netdev | None:
    """By id; one without an id by its interface, or where it is the only one of its type."""
    named = next((n for n in guest.netdevs if given.id and n.id == given.id), None)
    if named is not None or given.id:
        return named
    alike = [n for n in guest.netdevs if n.type == given.type and n.id.startswith("#")]
    by_name = [n for n in alike if n.ifname and n.ifname == given.ifname]
    return by_name[0] if by_name else alike[0] if len(alike) == 1 else None


def _with_tap(line: cl.CommandLine, given: GivenNetdev, fact: Netdev | None, found: _Findings) -> cl.CommandLine:
    if not given.fds:
        if given.type == "bridge" or given.helper or given.br:
            found.needs.append(("bridge", given.br or "br0"))
        elif given.ifname and fact is not None and fact.persistent:
            found.needs.append(("interface", given.ifname))
        elif given.ifname and given.script == "no":
            found.notes.append(
                f"{given.ifname} is made anew by QEMU, which runs no script: whatever attached it to a bridge has to "
                "do so again"
            )
        return line
    if fact is not None and fact.ifname and fact.persistent:
        found.needs.append(("interface", fact.ifname))
        queues = max(len(fact.fds), len(given.fds))
        return cl.with_netdev_name(line, given.index, fact.ifname, queues=queues, vhost=fact.vhost)
    name = given.id or (fact.id if fact is not None else "") or "#"
    interface = f" ({fact.ifname})" if fact is not None and fact.ifname else ""
    found.said.add(given.index)
    found.missing.append(
        NotHadAgain(
            f"netdev {name}",
            f"its tap{interface} was passed in by number, and the interface goes away with its last descriptor",
            TAP_HINT,
        )
    )
    return line


# -- displays


def _with_vnc(line: cl.CommandLine, guest: Guest, found: _Findings) -> cl.CommandLine:
    """A server that listens nowhere by its command line, because an earlier update handed it its listeners."""
    servers = {v.id: v for v in guest.vnc}
    for display in cl.displays(line):
        server = servers.get(display.vnc.id) if display.vnc is not None else None
        if display.vnc is None or server is None or not server.listeners:
            continue
        if display.vnc.addresses and not display.vnc.to:
            continue
        addresses = list(_vnc_addresses(server.listeners))
        if server.websocket or "" in addresses:
            if display.vnc.addresses:
                continue  # from its own command line, at another port of its range maybe
            why = "its listener was opened over QMP, at an address that no command line can give"
            hint = "start the guest the next time with -vnc and its address"
            found.missing.append(NotHadAgain(f"vnc {server.id}", why, hint))
            continue
        line = cl.with_vnc_addresses(line, server.id, addresses)
    return line


def _vnc_addresses(listeners: Sequence[VncListener]) -> Iterator[str]:
    """As -vnc takes them; "" for one that it cannot be given."""
    everywhere = {w.service for w in listeners if w.host == "::"}
    for family, host, service, *_ in listeners:
        if family == "unix":
            yield f"unix:{host}"
        elif not service.isdigit() or int(service) < VNC_BASE_PORT:
            yield ""
        elif host in WILDCARDS and service in everywhere:
            if host == "::":
                yield f":{int(service) - VNC_BASE_PORT}"
        else:
            yield f"{f'[{host}]' if ':' in host else host}:{int(service) - VNC_BASE_PORT}"


# -- what is left


def _note_numbers(line: cl.CommandLine, found: _Findings) -> None:
    """Every descriptor number that still stands in argv leads nowhere after the boot."""
    left: dict[int, list[str]] = {}
    for number in cl.fd_numbers(line):
        if number.index not in found.said:
            left.setdefault(number.index, []).append(f"{number.key or 'fd'}={number.fd}")
    for index, numbers in left.items():
        option = line.options[index]
        name = option.params.get("id")
        subject = f"-{option.name} set {option.params.get('set')}" if option.name == "add-fd" else f"-{option.name}"
        found.missing.append(
            NotHadAgain(
                f"{subject} {name}" if name else subject,
                f"{', '.join(numbers)} was passed in by whoever started the guest, and ends with its process",
                "start the guest the next time with the path instead of a descriptor, or have whoever passes it in "
                "start the guest after the boot",
            )
        )


def _directories(guest: Guest, line: cl.CommandLine, anew: Collection[str]) -> tuple[str, ...]:
    """Of everything that QEMU makes when it starts."""
    made = [option.value or "" for _, option in line.find("pidfile")]
    made += files_made(guest, anew)
    for chardev in cl.chardevs(line):
        made += [path for path in (chardev.path, chardev.logfile) if path]
        if chardev.socket is not None and chardev.socket.server and not chardev.socket.abstract:
            made.append(chardev.socket.path or "")
    for display in cl.displays(line):
        made += [a.path for a in (display.vnc.addresses if display.vnc is not None else ())]
    stub = cl.gdbstub(line)
    if stub is not None and stub.address.startswith("unix:"):
        made.append(stub.address.removeprefix("unix:").partition(",")[0])
    parents = (os.path.dirname(os.path.normpath(os.path.join(guest.cwd, path))) for path in made if path)
    return tuple(dict.fromkeys(parent for parent in parents if parent != "/"))
