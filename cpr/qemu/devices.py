"""What is plugged into a guest and what it shows: devices, VNC, jobs, threads; and which sockets a process has.

Facts that come from QMP alone are parsed here; `chardevs`, `network`, `block` and `memory` have the others.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from cpr.errors import CommandFailed
from cpr.model import Device, Vcpu, VncListener, VncServer
from cpr.qemu import sockets
from cpr.qemu.answers import Answers, flag, mapping, mappings, number, text

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from cpr.qemu.sockets import Endpoint

ENDED_JOBS = ("concluded", "null")
PERIPHERAL = "/machine/peripheral"
PERIPHERAL_ANON = "/machine/peripheral-anon"


# -- the guest


def devices(answers: Answers) -> tuple[Device, ...]:
    """Devices of -device and device_add; those with an id first."""
    named = [Device(id=name, type=kind) for name, kind in answers.children(PERIPHERAL)]
    unnamed = [Device(id=name, type=kind, anonymous=True) for name, kind in answers.children(PERIPHERAL_ANON)]
    return (*sorted(named, key=lambda d: d.id), *unnamed)


def accelerator(answers: Answers) -> str:
    """kvm, tcg, ...; `query-accelerators` came with QEMU 11.0."""
    if answers.read("query-kvm", lambda r: flag(r["enabled"]), False):
        return "kvm"
    told = answers.read("query-accelerators", lambda r: text(r["enabled"]), "")
    if told:
        return told
    kinds = dict(answers.children("/machine"))
    return next((k.removesuffix("-accel") for k in kinds.values() if k.endswith("-accel")), "tcg")


def stats_polling(answers: Answers, plugged: Collection[Device]) -> tuple[tuple[str, int], ...]:
    """(QOM path, seconds) of balloons that poll the guest's statistics: set over QMP, argv does not know it."""
    found = []
    for device in plugged:
        if device.type.startswith("virtio-balloon"):
            path = f"{PERIPHERAL_ANON if device.anonymous else PERIPHERAL}/{device.id}"
            seconds = answers.qom_get(path, "guest-stats-polling-interval", number, 0)
            if seconds:
                found.append((path, seconds))
    return tuple(found)


def vcpus(answers: Answers) -> tuple[Vcpu, ...]:
    def parse(reply: Any) -> tuple[Vcpu, ...]:
        return tuple(Vcpu(index=number(e["cpu-index"]), thread_id=number(e["thread-id"])) for e in mappings(reply))

    return answers.read("query-cpus-fast", parse, ())


def iothreads(answers: Answers) -> tuple[tuple[str, int], ...]:
    def parse(reply: Any) -> tuple[tuple[str, int], ...]:
        return tuple((text(e["id"]), number(e["thread-id"])) for e in mappings(reply))

    return answers.read("query-iothreads", parse, ())


def fdsets(answers: Answers) -> tuple[tuple[int, tuple[tuple[int, str], ...]], ...]:
    def parse(reply: Any) -> tuple[tuple[int, tuple[tuple[int, str], ...]], ...]:
        return tuple(
            (number(e["fdset-id"]), tuple((number(m["fd"]), text(m.get("opaque", ""))) for m in mappings(e["fds"])))
            for e in mappings(reply)
        )

    return tuple(sorted(answers.read("query-fdsets", parse, ())))


def jobs(answers: Answers) -> tuple[str, ...]:
    """Jobs that are not through: `TYPE ID`."""

    def parse_jobs(reply: Any) -> list[str]:
        return [f"{text(e['type'])} {text(e['id'])}" for e in mappings(reply) if text(e["status"]) not in ENDED_JOBS]

    def parse_block_jobs(reply: Any) -> list[str]:
        return [
            f"{text(e['type'])} {text(e['device'])}" for e in mappings(reply) if e.get("status") not in ENDED_JOBS
        ]

    found = answers.read("query-jobs", parse_jobs, []) + answers.read("query-block-jobs", parse_block_jobs, [])
    return tuple(dict.fromkeys(found))


# -- displays


def vnc_servers(answers: Answers, table: Collection[Endpoint]) -> tuple[VncServer, ...]:
    """VNC displays with the descriptors that listen for them. A QEMU built without VNC has none."""
    try:
        return answers.read("query-vnc-servers", lambda reply: parse_vnc(reply, table), ())
    except CommandFailed:
        return ()


def parse_vnc(reply: Any, table: Collection[Endpoint] = ()) -> tuple[VncServer, ...]:
    return tuple(_vnc(entry, table) for entry in mappings(reply))


def _vnc(entry: dict[str, Any], table: Collection[Endpoint]) -> VncServer:
    listeners: list[VncListener] = []
    for server in mappings(entry.get("server", [])):
        family, host, service = text(server["family"]), text(server["host"]), text(server["service"])
        if family == "unix":
            host, service = host or service, ""  # QEMU gives the path as the service (ui/vnc.c vnc_init_basic_info)
            endpoint = sockets.unix_listener(table, host)
        else:
            endpoint = sockets.tcp_listener(table, host, int(service)) if service.isdigit() else None
        number = endpoint.number if endpoint else None
        listeners.append(VncListener(family, host, service, number, flag(server.get("websocket", False))))
    return VncServer(
        id=text(entry["id"]),
        auth=text(entry["auth"]),
        listeners=tuple(listeners),
        clients=len(list(mappings(entry.get("clients", [])))),
    )


def spice(answers: Answers) -> tuple[str, frozenset[int | str]]:
    """As `parse_spice`. A QEMU built without SPICE has none."""
    try:
        return answers.read("query-spice", parse_spice, ("", frozenset()))
    except CommandFailed:
        return "", frozenset()


def parse_spice(reply: Any) -> tuple[str, frozenset[int | str]]:
    """How clients of SPICE log in, "" where it is off; and its ports, or the path of its UNIX socket."""
    reply = mapping(reply)
    if not flag(reply["enabled"]):
        return "", frozenset()
    places: set[int | str] = {reply[key] for key in ("port", "tls-port") if isinstance(reply.get(key), int)}
    return text(reply.get("auth", "")) or "unknown", frozenset(places or {text(reply.get("host", ""))}) - {""}


# -- sockets


def socket_descriptors(pid: int) -> list[tuple[int, int]]:
    """(number, inode) of the sockets of a process.

    Raises:
        ProcessLookupError: it is gone.
    """
    try:
        return list(_socket_descriptors(f"/proc/{pid}/fd"))
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None


def _socket_descriptors(directory: str) -> Iterator[tuple[int, int]]:
    for name in os.listdir(directory):
        try:
            target = os.readlink(f"{directory}/{name}")
        except FileNotFoundError:
            continue  # closed meanwhile
        if target.startswith("socket:["):
            yield int(name), int(target[8:-1])
