"""Candidate -> Guest: every fact read once, from QMP and from /proc. A guest whose monitors are held: lend.py.

The monitor is believed to be this process's only if the vCPU threads that it names are threads of the process. What a
QEMU does not know is skipped; what it answers in the wrong shape is `MonitorError`; a process that vanishes is
`GuestVanished`. Judging the facts is the checks' matter.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from cpr import discover, supervisors, survey_process
from cpr import survey_files as files
from cpr.errors import GuestVanished, MonitorError, MonitorHeld
from cpr.linux import proc, procfile
from cpr.linux.fds import descriptor_table
from cpr.model import Binary, Candidate, Chardev, Guest, MonitorAddress, RamBlock, Vcpu
from cpr.qemu import block, chardevs, clients, cpu, descriptors, devices, memory, network, qmp, sockets
from cpr.qemu import cmdline as cl
from cpr.qemu.answers import Answers, flag, mapping, mappings, text
from cpr.qemu.features import parse_version
from cpr.survey_host import survey_host

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cpr.linux.fds import OpenDescriptor
    from cpr.qemu.qmp import Monitor
    from cpr.qemu.sockets import Endpoint

T = TypeVar("T")

__all__ = ["Lent", "open_monitor", "same_process", "survey", "survey_host"]

QUESTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((f"query-{what}", {}) for what in ("cpus-fast", "chardev", "vnc-servers", "spice", "fdsets", "migrate")),
    *((f"query-{what}", {}) for what in ("name", "uuid", "version", "kvm", "accelerators", "status", "block")),
    *((f"query-{what}", {}) for what in ("iothreads", "jobs", "block-jobs", "migrate-capabilities")),
    ("query-migrate-parameters", {}),
    ("query-named-block-nodes", {"flat": True}),
    *(("qom-list", {"path": path}) for path in ("/objects", devices.PERIPHERAL, devices.PERIPHERAL_ANON)),
    *(("qom-get", {"path": "/machine", "property": name}) for name in ("type", "memory-backend")),
    *(("human-monitor-command", {"command_line": line}) for line in ("info ramblock", "info network")),
)
"""What every survey asks: sent at once, so that QEMU answers while /proc is read."""
PASSING_SECONDS = 0.5
"""How long a client of another monitor is watched: one that hangs up by then has only asked something."""
HELD_SECONDS = 0.3
"""How long a monitor that has a client already is given to become free."""
NIL_UUID = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lent:
    """A client's connection while its session is borrowed: which descriptor of QEMU it was and will be, its inode."""

    number: int
    inode: int


def open_monitor(candidate: Candidate) -> Monitor:
    """The first QMP socket that answers; those that have a client already are tried last, when that has left.

    Raises:
        MonitorHeld: each is held by another client. MonitorError: there is none, or none speaks QMP; all are named.
    """
    pid = candidate.process.pid
    if not candidate.monitors:
        raise MonitorError(
            f"of pid {pid}",
            "no QMP socket that listens is on its command line",
            hint="the guest needs a QMP socket of its own: -qmp unix:PATH,server=on,wait=off",
        )
    held = _held(candidate)
    failures: list[MonitorError] = []
    for address in sorted(candidate.monitors, key=lambda a: a in held):
        timeout = HELD_SECONDS if address in held else qmp.GREETING_SECONDS
        try:
            if _stays(pid, held.get(address, ())):  # who waits in vain stays in QEMU's queue
                raise MonitorHeld(str(address), "another client holds it", hint=HELD_HINT)
            return qmp.connect(address, pid, timeout=timeout)
        except MonitorError as error:
            failures.append(error)
    if len(failures) == 1:
        raise failures[0]
    kind = MonitorHeld if all(isinstance(f, MonitorHeld) for f in failures) else MonitorError
    raise kind(
        ", ".join(f.address for f in failures),
        "; ".join(f"{f.address}: {f.reason}" for f in failures),
        hint=failures[0].hint,
    )


HELD_HINT = "end the other client's session, or give the guest a second QMP socket at its next start"


def _held(candidate: Candidate) -> dict[MonitorAddress, tuple[Endpoint, ...]]:
    """Addresses that have an accepted client now, with its socket; a QEMU monitor serves one at a time."""
    pid = candidate.process.pid
    try:
        table = sockets.endpoints(pid, devices.socket_descriptors(pid))
    except OSError:
        return {}
    found = {a: sockets.clients_of(table, own) for a in candidate.monitors if (own := sockets.listener_at(table, a))}
    return {address: there for address, there in found.items() if there}


def _stays(pid: int, held: Sequence[Endpoint]) -> bool:
    """Whether a client is still there after `HELD_SECONDS`; of one that is put aside, and not served, QEMU tells."""
    if any(client.number >= clients.aside(pid) for client in held):
        return False
    inodes = {client.inode for client in held}
    end = time.monotonic() + HELD_SECONDS
    with contextlib.suppress(OSError):
        while inodes & clients.socket_numbers(pid).keys():
            if time.monotonic() > end:
                return True
            time.sleep(0.01)
    return False


def survey(candidate: Candidate, monitor: Monitor | None = None, lent: Lent | None = None) -> Guest:
    """Everything about one guest. Without `monitor` one is opened, and closed again. `lent`: a client's session is.

    Raises:
        GuestVanished: the process ended meanwhile.
        MonitorError, MonitorHeld: QEMU cannot be asked, answers nonsense, or is another process than the candidate.
    """
    pid = candidate.process.pid
    try:
        if monitor is not None:
            return _Survey(candidate, monitor, lent).guest()
        with open_monitor(candidate) as own:
            return _Survey(candidate, own).guest()
    except ProcessLookupError:
        raise GuestVanished(pid, "it was surveyed") from None
    except MonitorError:
        same_process(candidate)
        raise


def same_process(candidate: Candidate) -> None:
    """Raise GuestVanished where it has ended meanwhile."""
    try:
        there = proc.process_start_time(candidate.process.pid) == candidate.process.start_time
        there = there and not proc.is_zombie(candidate.process.pid)
    except ProcessLookupError:
        there = False
    if not there:
        raise GuestVanished(candidate.process.pid, "it was surveyed") from None


class _Survey:
    """One survey at work; `guest()` is its result."""

    def __init__(self, candidate: Candidate, monitor: Monitor, lent: Lent | None = None) -> None:
        self.candidate = candidate
        self.lent = lent
        self.pid = candidate.process.pid
        self.monitor = monitor
        self.unreadable: list[str] = []
        self.command = discover.command_line(self.pid, candidate.argv, self.unreadable)

    def readable(self, name: str, read: Callable[[], T], default: Any) -> T:
        """What `read` gives, or `default` where it may not be read; that is noted."""
        try:
            return read()
        except PermissionError:
            self.unreadable.append(f"/proc/{self.pid}/{name}")
            return cast("T", default)

    def guest(self) -> Guest:
        pid, candidate, command = self.pid, self.candidate, self.command
        answers = Answers(self.monitor)
        answers.ahead(*QUESTIONS)
        threads = self.readable("task", lambda: proc.thread_ids(pid), {})
        vcpus = self.vcpus(answers, threads)
        status = proc.read_status(pid)
        table: tuple[OpenDescriptor, ...] = self.readable("fd", lambda: descriptor_table(pid), ())
        if self.lent is not None:
            table = as_given_back(table, self.lent)
        endpoints = sockets.endpoints(pid, [(d.number, d.inode) for d in table if d.target.startswith("socket:[")])
        environ: tuple[tuple[str, str], ...] = self.readable("environ", lambda: proc.read_environ(pid), ())
        cwd = self.readable("cwd", lambda: files.working_directory(pid), "")
        ram = self.ram(answers, table)
        plugged = devices.devices(answers)
        nodes = block.nodes(answers)
        connections = chardevs.noted(environ)
        serial = chardevs.chardevs(answers, command, endpoints, pid=pid, noted=connections)
        serial = self.without_passers_by(serial, endpoints)
        vnc = devices.vnc_servers(answers, endpoints)
        spice, spice_places = devices.spice(answers)
        netdevs, usernet = network.netdevs(answers, command, table)
        fdsets = devices.fdsets(answers)
        migration, reasons = answers.read("query-migrate", parse_migrate, ("", ()))
        named = [*descriptors.node_names(nodes), *files.owned_files(command, dict(environ))]
        pidfile = files.pidfile(command, dict(environ))
        guest = Guest(
            process=candidate.process,
            name=answers.read("query-name", lambda r: text(mapping(r).get("name", "")), "") or candidate.name,
            uuid=answers.read("query-uuid", lambda r: text(r["UUID"]), "").replace(NIL_UUID, "") or candidate.uuid,
            binary=self.binary(answers),
            installed=installed(pid, candidate.binary),
            argv=candidate.argv,
            environ=environ,
            cwd=cwd,
            uid=status.uids[1],
            machine=answers.qom_get("/machine", "type", text, "").removesuffix("-machine"),
            accelerator=devices.accelerator(answers),
            runstate=answers.read("query-status", lambda r: text(r["status"]), ""),
            monitor=next((a for a in candidate.monitors if str(a) == self.monitor.address), None),
            ram=ram,
            devices=plugged,
            chains=block.chains(answers),
            nodes=nodes,
            chardevs=serial,
            vnc=vnc,
            spice=spice,
            netdevs=netdevs,
            vcpus=vcpus,
            iothreads=tuple((name, threads.get(tid, tid)) for name, tid in devices.iothreads(answers)),
            open_files=descriptors.open_files(
                table,
                endpoints,
                descriptors.owners(ram, serial, vnc, netdevs, fdsets, usernet),
                ram=ram,
                files=descriptors.named_files(pid, cwd, named),
                ptys=chardevs.pty_numbers(serial),
                spice=spice_places,
            ),
            fdsets=fdsets,
            capabilities=answers.read("query-migrate-capabilities", parse_capabilities, ()),
            parameters=answers.read("query-migrate-parameters", mapping, {}),
            migration=migration,
            blocked_reasons=reasons,
            jobs=devices.jobs(answers),
            supervisors=supervisors.supervisors(supervisors.gather(pid, candidate.argv)),
            namespaces=self.readable("ns", lambda: tuple((n, i) for n, (_, i) in proc.namespaces(pid).items()), ()),
            cgroups=tuple(f"{','.join(entry.controllers)}:{entry.path}" for entry in proc.cgroups(pid)),
            limits=proc.limits(pid),
            memory_room=proc.memory_room(pid),
            pids_room=proc.pids_room(pid),
            resident=status.rss,
            threads=status.threads,
            seccomp=status.seccomp,
            gone_files=files.gone_files(command, pid, cwd),
            pidfile=pidfile,
            pidfile_holds_pid=survey_process.pidfile_holds_pid(pid, pidfile, cwd),
            untraceable=survey_process.untraceable(pid),
            teardown_helpers=survey_process.teardown_helpers(pid),
            seccomp_filters=status.seccomp_filters,
            added_options=files.added_options(candidate.argv, dict(environ)),
            stats_polling=devices.stats_polling(answers, plugged),
            config_files=config_files(pid, candidate.argv),
            generation_id=(
                answers.read("query-vm-generation-id", lambda r: text(mapping(r)["guid"]), "")
                if any(d.type == "vmgenid" for d in plugged)
                else ""
            ),
            cpu_features=cpu.features(answers, command),
            changed_files=files.changed_since(pid, candidate.process.start_time, config_files(pid, candidate.argv)),
            unreadable=tuple(dict.fromkeys((*candidate.unreadable, *self.unreadable))),
            monitor_held=self.lent is not None,
        )
        same_process(candidate)
        return guest

    def vcpus(self, answers: Answers, threads: dict[int, int]) -> tuple[Vcpu, ...]:
        """vCPUs with their thread ids as this host counts; proof that the monitor is this process's.

        Raises:
            MonitorError: the threads that it names are not this process's.
        """
        named = devices.vcpus(answers)
        strangers = [v.thread_id for v in named if v.thread_id not in threads]
        if (strangers or not named) and threads:
            same_process(self.candidate)
            what = f"names vCPU thread {strangers[0]}" if strangers else "names no vCPU"
            raise MonitorError(
                self.monitor.address,
                f"{what}, which is not one of pid {self.pid}: another QEMU answers here",
                hint="is its path used by two guests?",
            )
        return tuple(replace(v, thread_id=threads.get(v.thread_id, v.thread_id)) for v in named)

    def without_passers_by(self, found: tuple[Chardev, ...], endpoints: Sequence[Endpoint]) -> tuple[Chardev, ...]:
        """A client of another monitor that hangs up soon (a tool that asks something) has no session to lose."""
        ours = next((a.label for a in self.candidate.monitors if str(a) == self.monitor.address), "")
        by_number = {e.number: e for e in endpoints}
        asking = [c for c in found if c.monitor and c.label != ours and c.connected and c.listener in by_number]
        staying = {
            c.label: {e.inode for e in sockets.clients_of(endpoints, by_number[c.listener])}
            for c in asking
            if c.listener is not None
        }
        end = time.monotonic() + PASSING_SECONDS
        while any(staying.values()) and time.monotonic() < end:
            there = clients.socket_numbers(self.pid)
            staying = {label: inodes & there.keys() for label, inodes in staying.items()}
            time.sleep(0.01 if any(staying.values()) else 0)
        gone = {label for label, inodes in staying.items() if not inodes}
        return tuple(replace(c, connected=False, client=None) if c.label in gone else c for c in found)

    def ram(self, answers: Answers, table: Sequence[OpenDescriptor]) -> tuple[RamBlock, ...]:
        maps = self.readable("maps", lambda: proc.read_maps(self.pid), [])
        mountinfo = self.readable("mountinfo", lambda: procfile.mountinfo(self.pid), "")
        ids = None
        if self.command is not None:
            ids = {b.id for b in cl.memory_backends(self.command)}
        return memory.ram_blocks(answers, maps, table, pid=self.pid, mountinfo=mountinfo, argv_ids=ids)

    def binary(self, answers: Answers) -> Binary:
        version, package = answers.read("query-version", parse_version, ("", ""))
        return replace(self.candidate.binary, version=version or None, package=package)


def as_given_back(table: Sequence[OpenDescriptor], lent: Lent) -> tuple[OpenDescriptor, ...]:
    """Descriptors as they are when the client has its session back: its connection in the place of who stands in."""
    kept = [d for d in table if d.target == f"socket:[{lent.inode}]"][:1]
    rest = [d for d in table if d.number != lent.number and d.target != f"socket:[{lent.inode}]"]
    return tuple(sorted((*(replace(d, number=lent.number) for d in kept), *rest), key=lambda d: d.number))


def config_files(pid: int, argv: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(-readconfig path, text) of those that can still be read."""
    try:
        return tuple(discover.config_texts(pid, cl.CommandLine.parse(argv)).items())
    except cl.CommandLineError:
        return ()


def installed(pid: int, running: Binary) -> Binary | None:
    """What stands at the binary's path now, else the program of the same name on PATH; None where there is neither."""
    for place, path in (
        (f"/proc/{pid}/root{running.path}", running.path),
        (running.path, running.path),
        *((found, found) for found in [shutil.which(os.path.basename(running.path))] if found),
    ):
        try:
            status = os.stat(place)
        except OSError:
            continue
        same = (status.st_dev, status.st_ino) == running.identity
        return Binary(
            path=path,
            device=status.st_dev,
            inode=status.st_ino,
            build_id=running.build_id if same else discover.build_id(place),
        )
    return None


def parse_migrate(reply: Any) -> tuple[str, tuple[str, ...]]:
    """Status ("" where there never was a migration), and what blocks one (`blocked-reasons`, QEMU 6.0)."""
    data = mapping(reply)
    reasons = data.get("blocked-reasons", [])
    if not isinstance(reasons, list):
        raise TypeError("blocked-reasons is no list")
    return text(data.get("status", "")), tuple(text(reason) for reason in reasons)


def parse_capabilities(reply: Any) -> tuple[tuple[str, bool], ...]:
    return tuple((text(e["capability"]), flag(e["state"])) for e in mappings(reply))

