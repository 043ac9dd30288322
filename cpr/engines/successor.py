"""The new QEMU as a value: its command line, its environment and the descriptors it inherits. Pure.

The old command line is edited, never written anew: RAM, listeners and taps become inherited descriptors, what only
one QEMU can have at a time (a VNC address, a forwarded port, the gdb stub) is left out and handed over later, and what
would touch the guest a second time (prealloc, a truncated log) is taken away. The numbers of the inherited descriptors
are ours to choose, so they are part of the plan that is shown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpr.qemu import chardevs, given_taps
from cpr.qemu import cmdline as cl
from cpr.qemu.chardevs import CONTROL, GDB, gdb_device
from cpr.qemu.options import translate
from cpr.qemu.readconfig import inline_readconfig
from cpr.qemu.variables import DROPPED, foreign

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from cpr.model import Chardev, Guest, Target, VncServer

FIRST_NUMBER = 20
"""Inherited descriptors are numbered from here: above stdio and what a launcher holds for itself."""

DROPPED_OPTIONS = ("incoming", "loadvm", "daemonize", "pidfile", "mem-prealloc", "S", "readconfig", "dump-vmstate", "D")
"""-D: a second QEMU would truncate the log of the first; it logs to standard error instead."""

VHOST_NET = "/dev/vhost-net"

IN_PLACE_DISTANCE = 100
"""Between the highest descriptor of the old QEMU and those that it is given for its successor."""

SILENT = "silent:"
"""How the names of inherited connections begin on which nothing comes."""

PLUGGED_BY_CLIENTS = ("usb-serial", "usb-braille", "usb-redir", "ccid-card-passthru")
"""Devices that the guest sees plugged in when a client comes: their doors are left open."""

MARK = "CPR_RUN"
"""Environment variable of the new QEMU, and of the helper that becomes it: see `run_mark`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inherited:
    """One descriptor of the new QEMU: taken from number `source` of the old one, opened afresh at `path`, or, without
    either, an end of a socket pair whose other end is ours.

    `target`: its number there; None where it is sent over the monitor. Of a QEMU that is replaced in place `source` and
    `target` are the same.
    """

    name: str
    target: int | None
    source: int | None = None
    inode: int = 0
    path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Successor:
    """Everything that starting the new QEMU needs besides the old one's likeness."""

    argv: tuple[str, ...]
    deaf: tuple[str, ...]
    """The same, with no VNC server nor SPICE that opens a listener: for where that keeps the guest from starting."""
    environ: tuple[tuple[str, str], ...]
    inherited: tuple[Inherited, ...]
    control: str
    """Chardev label of the monitor that we drive it by: the guest's own QMP socket, or `cpr-control`."""
    control_number: int | None
    """Descriptor number of the private monitor; None where the guest's own one is used."""
    monitors: tuple[str, ...]
    """Labels of the monitors that must not serve anybody before the commit, the control one among them."""
    vnc: tuple[tuple[str, tuple[str, ...]], ...]
    """(display id, names of inherited listeners), of those that are given them by monitor."""
    bound: tuple[str, ...]
    """Names of listeners that QEMU is given by nobody and binds by itself: in place it gets those that it has
    (linux/rebind.py)."""
    forwards: tuple[str, ...]
    """HMP commands that hand the forwarded ports back."""
    gdb: str
    """HMP command that opens the gdb stub again."""
    notes: tuple[str, ...]

    @property
    def opened_again(self) -> tuple[str, ...]:
        """HMP commands that open what cannot be inherited."""
        return (*self.forwards, *([self.gdb] if self.gdb else []))


class _Numbers:
    """Descriptor numbers for the new QEMU, none twice."""

    def __init__(self, first: int) -> None:
        self._next = first

    def __call__(self) -> int:
        self._next += 1
        return self._next - 1


def base_command(guest: Guest) -> cl.CommandLine:
    """The guest's command line as if it had been written out in full: no -readconfig, every chardev with its label."""
    files = dict(guest.config_files)
    line = cl.remove_appended(cl.CommandLine.parse(guest.argv), guest.added_options)
    return cl.normalise_chardevs(inline_readconfig(line, lambda path: files[path]))


def _talkers(guest: Guest) -> Iterator[Chardev]:
    """Chardevs that are sockets, but for monitors, and for those where the guest would see a device come and go."""
    devices = [d.params for d in cl.devices(base_command(guest)) if d.driver.startswith(PLUGGED_BY_CLIENTS)]
    spared = {params.get("chardev") for params in devices}
    for chardev in guest.chardevs:
        if chardev.backend == "socket" and not chardev.monitor and chardev.in_argv and chardev.label not in spared:
            yield chardev


def doors(guest: Guest) -> tuple[Chardev, ...]:
    """Chardevs that listen for clients, but for monitors (`OccupyMonitors`)."""
    return tuple(c for c in _talkers(guest) if c.server and c.listener is not None)


def callers(guest: Guest) -> tuple[Chardev, ...]:
    """Chardevs whose connection QEMU has made. The new QEMU would read from it as soon as it starts, and what it reads
    before it has the guest is lost: so it starts with a silent one, and is given this one later."""
    return tuple(c for c in _talkers(guest) if not c.server and c.client is not None)


def waiting_chardevs(guest: Guest) -> tuple[Chardev, ...]:
    """Chardevs that a QEMU started in place shall wait for a client of: ours, which takes the place of who is there.

    Telnet, websocket and TLS would speak with it.
    """
    return tuple(c for c in doors(guest) if c.plain)


def controls(guest: Guest) -> str:
    """Label of the guest's own QMP socket if the new QEMU can be driven by it: UNIX, as descriptors must pass, and
    nobody else's."""
    own = guest.monitor
    return own.label if own is not None and own.path and not guest.monitor_held else CONTROL


def server_monitors(guest: Guest) -> tuple[Chardev, ...]:
    """Monitors that listen for clients."""
    return tuple(c for c in guest.chardevs if c.monitor and c.server and c.listener is not None)


def first_free(guest: Guest) -> int:
    """The first of the numbers that descriptors are given in the old process: well above what it may open meanwhile."""
    return max((file.number for file in guest.open_files), default=0) + IN_PLACE_DISTANCE


def successor(
    guest: Guest, target: Target, run_id: str, *, in_place: bool = False, alone: bool = False
) -> Successor:
    """Build it. `in_place`: in the process of the old one, where every descriptor has its number already. `alone`: when
    the old one is gone: it is driven by a private monitor, and waits for nobody at the others.

    Raises `CommandLineError` where argv cannot be understood (a check has said so before).
    """
    numbers = _Numbers(first_free(guest) if in_place else FIRST_NUMBER)
    inherited: list[Inherited] = []
    notes: list[str] = []
    shut = waiting_chardevs(guest) if in_place else ()
    calling = callers(guest)
    inodes = {file.number: file.inode for file in guest.open_files}

    def take(name: str, source: int, inode: int = 0) -> int:
        number = source if in_place else numbers()
        inherited.append(Inherited(name=name, source=source, inode=inode, target=number))
        return number

    line = cl.with_program(cl.without(base_command(guest), DROPPED_OPTIONS), target.binary.path)
    line = without_control(line)
    line = cl.with_machine_type(line, guest.machine)
    line = cl.with_log_append(line)
    if guest.generation_id:
        line = cl.with_generation_id(line, guest.generation_id)
    for block in guest.ram:
        if block.fd is not None and block.shared:
            line = cl.with_memory_backend_fd(line, block.id, take(f"ram:{block.id}", block.fd, block.inode))
    monitors = () if alone else server_monitors(guest)
    for chardev in guest.chardevs:
        if chardev.backend != "socket" or not chardev.in_argv:
            continue
        source = chardev.listener if chardev.server else chardev.client
        if source is None:
            continue
        kind = "listener" if chardev.server else "connection"
        if chardev in calling:
            number = numbers()
            kept = source if in_place else None
            inherited.append(Inherited(name=f"{kind}:{chardev.label}", source=source, target=kept))
            inherited.append(Inherited(name=SILENT + chardev.label, target=number))
        else:
            number = take(f"{kind}:{chardev.label}", source)
        wait = chardev.server and (chardev in monitors or chardev in shut)
        line = cl.with_chardev_fd(line, chardev.label, number, server=chardev.server, wait=wait)
    line = _with_taps(line, guest, take, numbers, inherited)
    line = _with_fdsets(line, guest, take)
    line, _ = cl.without_hostfwd(line)
    line, _ = cl.without_gdb(line)
    bound = _bound(guest)
    line, _ = cl.with_vnc_detached(line, but={v.id for v in guest.vnc if v.websocket} if in_place or alone else ())
    if in_place:
        inherited += [Inherited(name=name, source=number, target=None) for name, number in bound.items()]
    vnc = [(server.id, tuple(_listeners(server, inherited, but=bound))) for server in guest.vnc]
    control = CONTROL if alone else controls(guest)
    control_number: int | None = None
    if control == CONTROL:
        control_number = numbers()
        line = line.appended(
            cl.Option("chardev", f"socket,id={CONTROL},fd={control_number}"),
            cl.Option("mon", f"chardev={CONTROL},mode=control"),
        )
    if target.options is not None:
        translation = translate(line, target.options)
        line = translation.cmdline
        notes += translation.changes
    if stale := foreign(guest.environ):
        notes.append(f"variables that are never acted on are not passed on: {', '.join(stale)}")
    line = cl.append_options(cl.for_incoming(line), target.extra_options)
    deaf, _ = cl.with_vnc_detached(cl.with_spice_deaf(line))
    return Successor(
        argv=tuple(line.argv()),
        deaf=tuple(deaf.argv()),
        environ=environment(
            guest,
            target,
            mark=run_mark(run_id, guest.process.pid),
            pidfile=guest.pidfile,
            connections={c.label: inodes[c.client] for c in calling if c.client in inodes},
        ),
        inherited=tuple(inherited),
        control=control,
        control_number=control_number,
        monitors=tuple(c.label for c in monitors),
        vnc=tuple((display, names) for display, names in vnc if names),
        bound=tuple(bound),
        forwards=tuple(_forwards(guest)),
        gdb=next((f"gdbserver {gdb_device(c.filename)}" for c in guest.chardevs if c.label == GDB), ""),
        notes=tuple(notes),
    )


def _bound(guest: Guest) -> dict[str, int]:
    """{name: descriptor} of listeners that no QEMU can be given by monitor: of SPICE, and of VNC servers that serve
    browsers, too."""
    found = {
        _listener_name(server, index): listener.number
        for server in guest.vnc
        if server.websocket
        for index, listener in enumerate(server.listeners)
        if listener.number is not None
    }
    spice = (file.number for file in guest.open_files if (file.owner, file.kind) == ("spice", "listener"))
    return found | {f"spice:{index}": number for index, number in enumerate(spice)}


def _listeners(server: VncServer, inherited: list[Inherited], *, but: Collection[str]) -> Iterator[str]:
    """Names of what it listens with, which it is given by monitor."""
    for index, listener in enumerate(server.listeners):
        name = _listener_name(server, index)
        if listener.number is not None and name not in but:
            inherited.append(Inherited(name=name, source=listener.number, target=None))
            yield name


def _listener_name(server: VncServer, index: int) -> str:
    return f"vnc:{server.id}:{index}"


def _forwards(guest: Guest) -> Iterator[str]:
    """The ports that are forwarded now, whoever said so: an earlier update has taken them off the command line."""
    for netdev in guest.netdevs:
        name = "" if netdev.id.startswith("#") else f"{netdev.id} "  # a name that QEMU made up is another one there
        for rule in netdev.hostfwd:
            yield f"hostfwd_add {name}{rule}"


def without_control(line: cl.CommandLine) -> cl.CommandLine:
    """Without the private monitor that an earlier update added."""

    def keep(option: cl.Option) -> Iterator[cl.Option]:
        ours = (option.name == "chardev" and f"id={CONTROL}," in f"{option.value},") or (
            option.name == "mon" and f"chardev={CONTROL}," in f"{option.value},"
        )
        if not ours:
            yield option

    return line.mapped(keep)


def _with_taps(
    line: cl.CommandLine, guest: Guest, take: Callable[[str, int], int], numbers: _Numbers, inherited: list[Inherited]
) -> cl.CommandLine:
    known = {n.id: n for n in guest.netdevs}
    for netdev in cl.netdevs(line):
        fact = known.get(netdev.id or "") or next(
            (n for n in guest.netdevs if n.ifname and n.ifname == netdev.ifname), None
        )
        if fact is None or not fact.fds:
            continue
        fds = [take(f"tap:{fact.id}:{i}", number) for i, number in enumerate(fact.fds)]
        vhost = []
        if fact.vhost:
            for i in range(len(fds)):
                vhost.append(numbers())
                inherited.append(Inherited(name=f"vhost:{fact.id}:{i}", target=vhost[-1], path=VHOST_NET))
        line = cl.with_netdev_fds(line, netdev.index, fds, vhost)
    return line


def _with_fdsets(line: cl.CommandLine, guest: Guest, take: Callable[[str, int], int]) -> cl.CommandLine:
    """-add-fd: QEMU closed the number at its start and keeps a duplicate; today's is in query-fdsets."""
    left = {number: list(members) for number, members in guest.fdsets}
    for entry in cl.add_fds(line):
        members = left.get(entry.fdset, [])
        match = next((m for m in members if m[1] == (entry.opaque or "")), members[0] if members else None)
        if match is None:
            continue
        members.remove(match)
        number = take(f"fdset:{entry.fdset}:{match[0]}", match[0])
        option = line.options[entry.index]
        line = line.replaced(entry.index, option.with_params(option.params.with_(fd=str(number))))
    return line


def environment(
    guest: Guest, target: Target, *, mark: str = "", pidfile: str = "", connections: Mapping[str, int] | None = None
) -> tuple[tuple[str, str], ...]:
    """The guest's variables, and what an update leaves for the next one.

    `pidfile`: where argv does not name it. `connections`: inodes of those that argv names by another number.
    """
    kept = [(k, v) for k, v in guest.environ if not DROPPED.match(k)]
    ours = {MARK: mark, "CPR_PIDFILE": pidfile}
    ours[given_taps.NOTE] = given_taps.note(given_taps.taps_as_given(base_command(guest), guest.environ))
    ours[chardevs.NOTE] = json.dumps(connections) if connections else ""
    if target.extra_options:
        ours["CPR_QEMU_OPTIONS"] = json.dumps(list(target.extra_options))
    return (*kept, *((k, v) for k, v in ours.items() if v))


def run_mark(run_id: str, old_pid: int) -> str:
    """The value of `MARK`: which run started it, in place of whom."""
    return f"{run_id}/{old_pid}"
