"""Every QEMU on this host, from /proc alone: nobody has spoken with it yet.

Passed over: the `cleanup/PID` helper of async teardown (it shares argv and program with its QEMU), zombies, the parent
that waits for a QEMU to daemonize, `-machine none` (somebody asks a binary what it knows), and the QEMUs that an update
has started and not committed. Works without privileges; what could not be read is listed in `Candidate.unreadable`.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from typing import TYPE_CHECKING

from cpr.errors import AmbiguousGuest, GuestVanished, NoSuchGuest, NotQemu
from cpr.linux import elf, proc
from cpr.model import Binary, Candidate, MonitorAddress, ProcessId
from cpr.qemu import cmdline as cl
from cpr.qemu import sockets
from cpr.qemu.devices import socket_descriptors
from cpr.qemu.readconfig import inline_readconfig

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from cpr.linux.proc import ProcessEntry
    from cpr.qemu.cmdline.facts import Socket
    from cpr.qemu.sockets import Endpoint

PROGRAM = re.compile(r"qemu-system-[\w.+-]+|qemu-kvm|kvm")
"""Base names of QEMU programs; a distribution may add to the end (qemu-system-x86_64-microvm)."""
PENDING = "CPR_RUN_PENDING"
"""In the environment of a rehearsal, and of a binary that is being asked."""
RUN = "CPR_RUN"
"""In the environment of a QEMU that an update started: RUN/PID OF THE OLD ONE."""
LOCALHOST = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104


def candidates() -> tuple[Candidate, ...]:
    """Every guest on this host, by pid."""
    entries = [entry for entry in proc.processes() if is_qemu(entry)]
    started = {entry.pid: entry.start_time for entry in entries}
    found = []
    for entry in entries:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            environ = environ_of(entry.pid)
            if not is_waiting_parent(entry) and not is_uncommitted(entry, environ, started):
                found.append(_candidate(entry, environ is None))
    return tuple(c for c in found if c is not None)


def candidate(pid: int) -> Candidate:
    """The QEMU with this pid, whatever state an update of it is in.

    Raises:
        NotQemu: the process is something else. GuestVanished: there is none.
    """
    try:
        entry = next((e for e in proc.processes() if e.pid == pid), None)
        if entry is not None and not is_qemu(entry):
            raise NotQemu(pid, entry.comm)
        made = _candidate(entry, environ_of(pid) is None) if entry is not None else None
    except (ProcessLookupError, FileNotFoundError):
        made = None
    if made is None:
        raise GuestVanished(pid, "it was looked at")
    return made


def find(wanted: str) -> Candidate:
    """The guest of a name, uuid or pid; only exact matches count.

    Raises:
        NoSuchGuest, AmbiguousGuest (two guests of one name, or a name that is another's pid), NotQemu.
    """
    known = candidates()
    matches = matching(wanted, known)
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise AmbiguousGuest(wanted, [_label(c) for c in matches])
    if wanted.isdigit() and len(wanted) < 10 and int(wanted):
        with contextlib.suppress(ProcessLookupError, OSError):
            status = proc.read_status(int(wanted))
            raise NotQemu(int(wanted), f"it is {status.name}" + (", a zombie" if status.state == "Z" else ""))
    raise NoSuchGuest(wanted, suggestions(wanted, known))


def matching(wanted: str, known: Iterable[Candidate]) -> list[Candidate]:
    """Those whose name, uuid or pid is `wanted`."""
    return [
        c
        for c in known
        if wanted and (wanted == c.name or wanted.lower() in (c.uuid.lower(), str(c.process.pid)))
    ]


def suggestions(wanted: str, known: Sequence[Candidate]) -> list[str]:
    """Guests that may have been meant; where none is similar, all (the first twenty)."""
    names = [c.name for c in known if c.name]
    near = {n for n in names if n.startswith(wanted)} | set(difflib.get_close_matches(wanted, names))
    return [_label(c) for c in known if not near or c.name in near][:20]


def _label(found: Candidate) -> str:
    return f"{found.name} (pid {found.process.pid})" if found.name else f"pid {found.process.pid}"


# -- which processes


def is_qemu(entry: ProcessEntry) -> bool:
    """Whether a process runs a QEMU system emulator, as a guest would."""
    if entry.zombie or entry.comm.startswith("cleanup/") or not entry.argv:
        return False
    program = os.path.basename((entry.exe or entry.argv[0]).removesuffix(" (deleted)"))
    if not PROGRAM.fullmatch(program):
        return False
    try:
        command = cl.CommandLine.parse(entry.argv)
    except cl.CommandLineError:
        return True  # an option that we do not know does not make it less of a guest
    return cl.machine(command).type != "none" and not _only_tells(command)


def _only_tells(command: cl.CommandLine) -> bool:
    return command.has("version", "help") or any(o.value in ("help", "?") for o in command.options)


def is_waiting_parent(entry: ProcessEntry) -> bool:
    """With -daemonize the first process waits until the guest is up (os-posix.c os_daemonize).

    The one that stays has gone through setsid and a second fork: it is alone in its session, whose leader is gone, or a
    zombie of an init that takes its time (the kernel gives that pid to nobody else as long as the session exists). The
    one that waits is in the session of whoever started it; 0 is a session from outside our pid namespace.
    """
    try:
        if not cl.CommandLine.parse(entry.argv).has("daemonize"):
            return False
    except cl.CommandLineError:
        return False
    try:
        session = os.getsid(entry.pid)
        return session == 0 or _runs(session) or _session(entry.ppid) == session
    except OSError:
        return False


def _runs(pid: int) -> bool:
    try:
        return not proc.is_zombie(pid)
    except OSError:
        return False


def _session(pid: int) -> int:
    """0: it is gone, or outside our pid namespace."""
    try:
        return os.getsid(pid) if pid else 0
    except OSError:
        return 0


def environ_of(pid: int) -> dict[str, str] | None:
    """None where it may not be read."""
    try:
        return dict(proc.read_environ(pid))
    except PermissionError:
        return None


def is_uncommitted(entry: ProcessEntry, environ: Mapping[str, str] | None, started: Mapping[int, int]) -> bool:
    """A rehearsal, or the new QEMU of an update whose old one still lives.

    `started` has the start times of all QEMUs. A pid that the kernel has given to somebody else since has a later start
    time than the new QEMU, for the old one lived when that was started.
    """
    if not environ:
        return False
    if environ.get(PENDING):
        return True
    old = environ.get(RUN, "").rpartition("/")[2]
    return old.isdigit() and int(old) != entry.pid and started.get(int(old), entry.start_time + 1) <= entry.start_time


# -- what /proc says of one


def _candidate(entry: ProcessEntry, secret: bool) -> Candidate | None:
    unreadable = [f"/proc/{entry.pid}/environ"] if secret else []
    command = command_line(entry.pid, entry.argv, unreadable)
    settings = cl.settings(command) if command is not None else None
    try:
        table: tuple[Endpoint, ...] | None = sockets.endpoints(entry.pid, socket_descriptors(entry.pid))
    except PermissionError:
        unreadable.append(f"/proc/{entry.pid}/fd")
        table = None
    binary = binary_of(entry.pid, entry.exe or entry.argv[0], unreadable)
    if proc.process_start_time(entry.pid) != entry.start_time:
        return None
    return Candidate(
        process=ProcessId(entry.pid, entry.start_time),
        argv=entry.argv,
        name=(settings.name or "") if settings else "",
        uuid=(settings.uuid or "").lower() if settings else "",
        binary=binary,
        monitors=reachable(monitor_addresses(command, table), entry.pid) if command is not None else (),
        unreadable=tuple(unreadable),
    )


def command_line(pid: int, argv: Sequence[str], unreadable: list[str]) -> cl.CommandLine | None:
    """argv parsed, with -readconfig files written out; None where it cannot be understood."""
    try:
        command = cl.CommandLine.parse(argv)
        if not command.has("readconfig"):
            return command
        texts = config_texts(pid, command)
        return inline_readconfig(command, lambda path: texts[path])
    except KeyError as error:
        unreadable.append(str(error.args[0]))
        return command
    except cl.CommandLineError:
        return None


def config_texts(pid: int, command: cl.CommandLine) -> dict[str, str]:
    """The texts of -readconfig files that can be read, looked up in the guest's root and directory."""
    texts = {}
    for _, option in command.find("readconfig"):
        path = option.value or ""
        prefix = f"/proc/{pid}/root" if path.startswith("/") else f"/proc/{pid}/cwd/"
        for place in (prefix + path, path) if path.startswith("/") else (prefix + path,):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                if os.path.isfile(place):
                    with open(place) as file:
                        texts[path] = file.read()
                    break
    return texts


def binary_of(pid: int, path: str, unreadable: list[str]) -> Binary:
    """The program that a process runs, through /proc/PID/exe."""
    path = path.removesuffix(" (deleted)")
    try:
        running = proc.exe(pid)
    except PermissionError:
        unreadable.append(f"/proc/{pid}/exe")
        return Binary(path=path)
    there = _file_at(pid, running.path)
    return Binary(
        path=running.path,
        device=running.device,
        inode=running.inode,
        build_id=build_id(f"/proc/{pid}/exe"),
        deleted=there is None,
        replaced=there is not None and there != running.identity,
    )


def _file_at(pid: int, path: str) -> tuple[int, int] | None:
    """(device, inode) of what stands at a path, as the process sees it; None where there is nothing."""
    try:
        status = os.stat(f"/proc/{pid}/root{path}")
    except PermissionError:
        try:
            status = os.stat(path)
        except OSError:
            return None
    except OSError:
        return None
    return status.st_dev, status.st_ino


def build_id(path: str) -> str | None:
    try:
        return elf.elf_facts(path).build_id
    except (OSError, elf.NotElf):
        return None


def reachable(addresses: tuple[MonitorAddress, ...], pid: int) -> tuple[MonitorAddress, ...]:
    """Those that lead to this process: ports and abstract names of another network namespace are not ours to reach."""
    try:
        theirs, ours = os.stat(f"/proc/{pid}/ns/net"), os.stat("/proc/self/ns/net")
    except OSError:
        return addresses
    if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino):
        return addresses
    return tuple(a for a in addresses if a.path and not a.path.startswith("@"))


def monitor_addresses(command: cl.CommandLine, table: Collection[Endpoint] | None) -> tuple[MonitorAddress, ...]:
    """Where QMP servers of the command line listen, as far as the listening socket is the process's own.

    `table` None: its descriptors may not be read; then argv is believed.
    """
    found = []
    for monitor in cl.monitors(command):
        given = monitor.chardev.socket if monitor.chardev is not None else None
        if monitor.mode != "control" or given is None or not given.server:
            continue
        if given.telnet or given.tn3270 or given.websocket or given.tls_creds:
            continue
        address = _address(monitor.label, given, table)
        if address is not None:
            found.append(address)
    return tuple(found)


def _address(label: str, given: Socket, table: Collection[Endpoint] | None) -> MonitorAddress | None:
    path = (f"@{given.path}" if given.abstract else given.path) if given.kind == "unix" and given.path else ""
    port = int(given.port) if given.port and given.port.isdigit() else 0
    if table is None:
        if path:
            return MonitorAddress(label=label, path=path)
        host = given.host or ""
        return MonitorAddress(label=label, host=LOCALHOST.get(host, host), port=port) if port else None
    if given.kind == "fd":
        number = given.fd or ""
        listener = next((e for e in table if number.isdigit() and e.number == int(number) and e.listening), None)
    elif path:
        listener = sockets.unix_listener(table, path)
    else:
        listener = _tcp_listener(given, port, table)
    if listener is None:
        return None
    if listener.path:
        return MonitorAddress(label=label, path=listener.path)
    host, port = listener.local
    return MonitorAddress(label=label, host=LOCALHOST.get(host, host), port=port) if port else None


def _tcp_listener(given: Socket, port: int, table: Collection[Endpoint]) -> Endpoint | None:
    """With `to=` QEMU takes the first free port from `port` on; with port 0 any."""
    for number in range(port, (given.to or port) + 1):
        listener = sockets.tcp_listener(table, given.host or "", number) if number else None
        if listener is not None:
            return listener
    return None
