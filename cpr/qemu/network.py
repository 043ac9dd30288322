"""Network back ends: what HMP `info network` lists today, joined with argv and the tap and vhost descriptors.

QMP has no list of netdevs (as of QEMU 11.1), so the text is read; `info usernet` names the descriptors of user
networking, which is how its sockets are told from strangers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cpr.model import Netdev
from cpr.qemu import cmdline as cl

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from cpr.linux.fds import OpenDescriptor
    from cpr.qemu.answers import Answers
    from cpr.qemu.cmdline.facts import Netdev as Given

TUN = "/dev/net/tun"
VHOST_NET = "/dev/vhost-net"
NO_BACKENDS = frozenset({"nic", "hubport"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One line of `info network`: a queue of a back end."""

    id: str
    name: str
    """As QEMU calls it; differs from `id` where QEMU made it up."""
    type: str
    ifname: str = ""
    number: int | None = None
    """The descriptor it was given by, of a tap."""


def parse_network(printed: str) -> tuple[Listed, ...]:
    r"""Back ends stand alone (`t0: index=0,type=tap,...`), below their NIC (` \ t0: ...`) or on a port of a hub.

    A name that QEMU made up (#net189) is another in every process: it is replaced by one that stays, `#user0`.
    """
    names: dict[str, str] = {}
    found = []
    for line in printed.splitlines():
        match = re.match(r"(?: \\ )?(?:hub\d+port\d+: )?(\S+): index=\d+,type=([\w-]+),?(.*)", line)
        if match and match[2] not in NO_BACKENDS:
            details = dict(part.split("=", 1) for part in match[3].split(",") if "=" in part)
            number = details.get("fd", "")
            made_up = sum(1 for name in names.values() if name.startswith(f"#{match[2]}"))
            stable = f"#{match[2]}{made_up}" if match[1].startswith("#") else match[1]
            found.append(
                Listed(
                    id=names.setdefault(match[1], stable),
                    name=match[1],
                    type=match[2],
                    ifname=details.get("ifname", ""),
                    number=int(number) if number.isdigit() and match[2] == "tap" else None,
                )
            )
    return tuple(found)


def parse_usernet(printed: str) -> tuple[tuple[int, str], ...]:
    """(descriptor, netdev as QEMU calls it) of the sockets that user networking holds."""
    rows = _usernet_rows(printed, r"\s+(?:TCP|UDP|ICMP)\[.+?\]\s+(\d+)\s")
    return tuple((int(row[1]), owner) for owner, row in rows)


def parse_forwards(printed: str) -> tuple[tuple[str, str], ...]:
    """(netdev as QEMU calls it, rule as `hostfwd_add` takes it) of the ports that are forwarded now."""
    found = []
    pattern = r"\s+(TCP|UDP)\[HOST_FORWARD\]\s+-?\d+\s+(\S+)\s+(\d+)\s+(\S+)\s+(\d+)\s"
    for owner, row in _usernet_rows(printed, pattern):
        protocol, here, port, there, guest_port = row.groups()
        here = "" if here == "*" else here
        found.append((owner, f"{protocol.lower()}:{here}:{port}-{there}:{guest_port}"))
    return tuple(reversed(found))  # the last one that was added is printed first


def _usernet_rows(printed: str, pattern: str) -> Iterator[tuple[str, re.Match[str]]]:
    """Of `info usernet`: (netdev, the match) of each line that matches."""
    owner = ""
    for line in printed.splitlines():
        head = re.match(r"Hub -?\d+ \((.+)\):", line)
        if head:
            owner = head[1]
        row = re.match(pattern, line)
        if row:
            yield owner, row


def netdevs(
    answers: Answers, cmdline: cl.CommandLine | None, table: Sequence[OpenDescriptor]
) -> tuple[tuple[Netdev, ...], tuple[tuple[int, str], ...]]:
    """Every back end there is now, and (descriptor, netdev id) of the sockets of user networking."""
    given = cl.netdevs(cmdline) if cmdline is not None else None
    printed = answers.human("info network")
    listed = parse_network(printed)
    found = join(listed if printed else None, given, table)
    usernet = answers.human("info usernet") if any(n.type == "user" for n in found) else ""
    ids = {entry.name: entry.id for entry in listed}
    if usernet:
        forwards = [(ids.get(name, name), rule) for name, rule in parse_forwards(usernet)]
        found = tuple(replace(n, hostfwd=tuple(rule for name, rule in forwards if name == n.id)) for n in found)
    return found, tuple((number, ids.get(name, name)) for number, name in parse_usernet(usernet))


def join(
    listed: Sequence[Listed] | None, given: Sequence[Given] | None, table: Sequence[OpenDescriptor]
) -> tuple[Netdev, ...]:
    """`listed` None: QEMU could not be asked, argv is taken at its word; `given` None: argv could not be read."""
    queues: dict[str, list[Listed]] = {}
    for entry in listed or ():
        queues.setdefault(entry.id, []).append(entry)
    named = {n.id: n for n in given or () if n.id}
    unnamed = [n for n in given or () if not n.id]
    if listed is None:
        for netdev in given or ():
            name = netdev.id or f"#{netdev.index}"
            queues[name] = [Listed(id=name, name=name, type=netdev.type, ifname=netdev.ifname or "")]
            named[name] = netdev
    free = {d.number: interface_of(d) for d in table if d.target == TUN}
    vhosts = [d.number for d in table if d.target == VHOST_NET]
    found = []
    for name, entries in queues.items():
        argv = named.get(name) or _by_type(unnamed, entries[0])
        if argv is not None and argv in unnamed:
            unnamed.remove(argv)
        fds = _tap_fds(entries, argv, free)
        for number in fds:
            free.pop(number, None)
        vhost_fds: tuple[int, ...] = ()
        if argv is not None and argv.vhost:
            told = tuple(int(n) for n in argv.vhostfds if n.isdigit() and int(n) in vhosts)
            vhost_fds = told or tuple(vhosts[: len(fds)])  # QEMU opens one after each queue's tap, in that order
            vhosts = [n for n in vhosts if n not in vhost_fds]
        found.append(
            Netdev(
                id=name,
                type=entries[0].type,
                ifname=next((interface_of(d) for d in table if d.number in fds), "") or entries[0].ifname,
                fds=fds,
                vhost_fds=vhost_fds,
                vhost=argv is not None and argv.vhost,
                hostfwd=argv.hostfwd if argv is not None else (),
                in_argv=argv is not None or given is None or _made_by_default(name, entries[0], given),
            )
        )
    return tuple(found)


def interface_of(descriptor: OpenDescriptor) -> str:
    """The interface behind a tun descriptor (drivers/net/tun.c tun_chr_show_fdinfo)."""
    return dict(descriptor.extra).get("iff", "")


def _by_type(unnamed: Sequence[Given], entry: Listed) -> Given | None:
    """`-nic` and `-net` without an id: QEMU made one up (#net123); the first of the same type is it."""
    fitting = [n for n in unnamed if n.type == entry.type and (not n.ifname or n.ifname == entry.ifname)]
    return fitting[0] if fitting else None


def _made_by_default(name: str, entry: Listed, given: Collection[Given]) -> bool:
    """Without any -netdev, -nic and -net QEMU makes a NIC with user networking itself (system/vl.c)."""
    return not given and entry.type == "user" and name.startswith("#")


def _tap_fds(entries: Sequence[Listed], argv: Given | None, free: dict[int, str]) -> tuple[int, ...]:
    if entries[0].type != "tap":
        return ()
    numbers = [e.number for e in entries if e.number is not None and e.number in free]
    if numbers:
        return tuple(dict.fromkeys(numbers))
    interface = next((e.ifname for e in entries if e.ifname), "") or (argv.ifname if argv is not None else "")
    if interface:
        return tuple(sorted(n for n, name in free.items() if name == interface))
    names = set(free.values())
    return tuple(sorted(free)) if len(names) == 1 and len(free) == len(entries) else ()  # by a helper: the only one
