"""Devices, drives, chardevs, network and descriptors from recorded replies."""

from __future__ import annotations

import socket
import stat
from typing import Any

import pytest

from cpr.linux.fds import OpenDescriptor
from cpr.model import BlockChain, Chardev, VncListener
from cpr.qemu import block, chardevs, cpu, descriptors, devices, network, sockets
from cpr.qemu import cmdline as cl
from cpr.qemu.answers import NONSENSE
from cpr.qemu.chardevs import Described
from cpr.qemu.sockets import Endpoint

ANY = "0.0.0.0"  # noqa: S104 (nothing is bound)

# -- chardevs


@pytest.mark.parametrize(
    ("filename", "described"),
    [
        ("unix:/run/a.sock,server=on", Described(protocol="unix", address="/run/a.sock", server=True)),
        (
            "disconnected:unix:/run/a,b.sock,server=on",
            Described(protocol="unix", address="/run/a,b.sock", server=True, connected=False),
        ),
        ("unix:", Described(protocol="unix")),
        (
            "tcp:127.0.0.1:4444,server=on <-> 127.0.0.1:51234",
            Described(protocol="tcp", address="127.0.0.1:4444", peer="127.0.0.1:51234", server=True),
        ),
        (
            "disconnected:telnet:[::1]:4444,server=on",
            Described(protocol="telnet", address="[::1]:4444", server=True, connected=False),
        ),
        ("tcp:10.0.0.1:55000 <-> 10.0.0.2:80", Described(protocol="tcp", address="10.0.0.1:55000", peer="10.0.0.2:80")),
        ("disconnected:fd:33,server=on", Described(protocol="fd", address="33", server=True, connected=False)),
        ("pty:/dev/pts/3", Described(protocol="pty", address="/dev/pts/3")),
        ("vc", Described(protocol="vc")),
        ("", Described(protocol="")),
    ],
)
def test_parse_filename(filename: str, described: Described) -> None:
    assert chardevs.parse_filename(filename) == described


def unix(number: int, path: str, *, listening: bool = False, inode: int | None = None) -> Endpoint:
    return Endpoint(
        number=number,
        inode=inode or 1000 + number,
        family=socket.AF_UNIX,
        path=path,
        listening=listening,
        connected=not listening,
    )


def tcp(number: int, local: tuple[str, int], remote: tuple[str, int] | None = None, backlog: int = 0) -> Endpoint:
    return Endpoint(
        number=number,
        inode=1000 + number,
        family=socket.AF_INET,
        local=local,
        remote=remote or (ANY, 0),
        listening=remote is None,
        connected=remote is not None,
        backlog=backlog,
    )


def joined(
    argv: str, listed: list[tuple[str, str]], table: list[Endpoint], note: str = "{}"
) -> dict[str, Chardev]:
    command = cl.CommandLine.parse(["qemu", "-nodefaults", *argv.split()])
    rows = [(label, filename, True) for label, filename in listed]
    known = chardevs.noted([(chardevs.NOTE, note)])
    return {c.label: c for c in chardevs.join(rows, command, {}, table, pid=1, noted=known)}


def test_tcp_clients_are_told_by_their_peer() -> None:
    """A gone client whose socket is still there, and a connection of user networking from the same port number."""
    table = [
        tcp(5, (ANY, 4444), backlog=2),
        tcp(6, ("127.0.0.1", 4444), ("127.0.0.1", 50001)),
        tcp(7, ("127.0.0.1", 4444), ("127.0.0.1", 50002)),
    ]
    found = joined(
        "-chardev socket,id=a,host=0.0.0.0,port=4444,server=on,wait=off",
        [("a", "tcp:127.0.0.1:4444,server=on <-> 127.0.0.1:50002")],
        table,
    )["a"]
    assert (found.listener, found.client, found.queued, found.connected) == (5, 7, 2, True)


def test_a_number_in_argv_that_is_something_else_by_now_is_not_believed() -> None:
    found = joined(
        "-chardev socket,id=a,fd=9,server=on,wait=off",
        [("a", "disconnected:fd:9,server=on")],
        [unix(9, "", listening=False), unix(8, "/run/x", listening=True)],
    )["a"]
    assert (found.listener, found.client, found.connected) == (None, None, False)


@pytest.mark.parametrize(
    ("note", "client"),
    [
        ('{"a": 1012}', 12),
        ('{"b": 1012}', 9),
        ('{"a": 77}', None),  # it has gone
        ('{"a": 1008}', None),  # that listens
        ('{"a": "12"}', 9),
        ('{"a"', 9),
        ("[1012]", 9),
    ],
)
def test_a_connection_that_an_update_has_put_elsewhere_is_known_by_its_inode(note: str, client: int | None) -> None:
    table = [unix(9, ""), unix(12, ""), unix(8, "/run/x", listening=True)]
    found = joined("-chardev socket,id=a,fd=9", [("a", "unix:")], table, note)["a"]
    assert (found.server, found.client) == (False, client)


def test_chardevs_that_argv_does_not_name() -> None:
    listed = [("late", "disconnected:unix:/run/l,server=on"), ("odd", "")]
    found = joined("", listed, [unix(4, "/run/l", listening=True)])
    assert (found["late"].in_argv, found["late"].backend, found["late"].listener) == (False, "socket", 4)
    assert found["odd"].backend == "unknown"


def test_labels_that_qemu_makes_up_stay_the_same() -> None:
    reply = [{"label": "#chr030", "filename": "gdb", "frontend-open": True}]
    assert chardevs.parse_chardevs(reply) == (("#chr0", "gdb", True),)


# -- sockets


def test_join_leaves_a_socket_that_nobody_lists_without_a_kind() -> None:
    listed = [unix(-1, "/run/a", listening=True, inode=5), unix(-1, "/run/b", inode=0)]
    one, two = sockets.join([(3, 5), (4, 6)], listed)
    assert (one.number, one.path) == (3, "/run/a")
    assert (two.number, two.family, two.listening) == (4, 0, False)


def test_listeners() -> None:
    table = [unix(3, "@name@@", listening=True), unix(4, "/a", listening=True), unix(5, "/a")]
    table += [tcp(6, (ANY, 80)), tcp(7, ("127.0.0.1", 80)), tcp(8, ("10.0.0.1", 81))]
    assert [e and e.number for e in (sockets.unix_listener(table, p) for p in ("@name", "/a", "/b", ""))] == [
        3, 4, None, None,
    ]  # fmt: skip
    assert [
        e and e.number
        for e in (
            sockets.tcp_listener(table, "127.0.0.1", 80),
            sockets.tcp_listener(table, "10.9.9.9", 80),
            sockets.tcp_listener(table, "localhost", 81),
            sockets.tcp_listener(table, "", 82),
        )
    ] == [7, 6, 8, None]


# -- drives


def inserted(name: str, **more: Any) -> dict[str, Any]:
    image: dict[str, Any] = {"filename": name, "virtual-size": 1024, "format": "raw"}
    return {"node-name": "n", "ro": False, "image": image, "drv": "raw", **more}


def test_parse_chains() -> None:
    backing = {"filename": "/base", "virtual-size": 1024}
    top = inserted("/top", iops=100, bps_rd_max=5, bps=0)
    top["image"]["backing-image"] = backing
    top["image"]["format-specific"] = {"type": "qcow2", "data": {"data-file": "/data"}}
    reply = [
        {"device": "", "qdev": "/machine/peripheral/vd0/virtio-backend", "inserted": top},
        {"device": "cd", "qdev": "/machine/peripheral-anon/device[1]"},
        {"device": "sd0"},
        {"device": "free", "inserted": inserted("/free")},
    ]
    assert block.parse_chains(reply) == (
        BlockChain(
            device="vd0",
            node="n",
            files=("/top", "/data", "/base"),
            read_only=False,
            size=1024,
            throttle=(("bps_rd_max", 5), ("iops", 100)),
        ),
        BlockChain(device="/machine/peripheral-anon/device[1]", drive="cd", node="", files=(), read_only=False),
        BlockChain(device="free", drive="free", node="n", files=("/free",), read_only=False, size=1024),
    )


@pytest.mark.parametrize("reply", [None, {}, [None], [{"device": 5, "qdev": "x"}], [{"qdev": "x", "inserted": {}}]])
def test_nonsense_about_drives(reply: Any) -> None:
    with pytest.raises((KeyError, TypeError)):
        block.parse_chains(reply)


# -- network

NETWORK = """\
hub 0\r
 \\ hub0port1: #net189: index=0,type=user,net=10.0.2.0,restrict=off\r
 \\ hub0port0: e1000.0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:56\r
virtio-net-pci.1: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:57\r
 \\ t0: index=0,type=tap,ifname=tap7,script=no,downscript=no\r
virtio-net-pci.2: index=1,type=nic,\r
 \\ t0: index=1,type=tap,ifname=tap7,script=no,downscript=no\r
 \\ t1: index=0,type=tap,fd=30\r
u1: index=0,type=user,net=10.0.2.0,restrict=off\r
"""


def tun(number: int, interface: str) -> OpenDescriptor:
    return descriptor(number, "/dev/net/tun", mode=stat.S_IFCHR, extra=(("iff", interface),))


def descriptor(
    number: int, target: str, *, mode: int = stat.S_IFREG, extra: tuple[tuple[str, str], ...] = (), inode: int = 0
) -> OpenDescriptor:
    return OpenDescriptor(
        number=number,
        target=target,
        device=1,
        inode=inode or 500 + number,
        mode=mode,
        position=0,
        flags=2,
        mount_id=0,
        extra=extra,
    )


def test_netdevs_and_their_queues() -> None:
    command = cl.CommandLine.parse(
        [
            *("qemu", "-net", "nic", "-net", "user"),
            *("-netdev", "tap,id=t0,ifname=tap7,queues=2,vhost=on", "-netdev", "tap,id=t1,fd=30"),
        ]
    )
    table = [tun(18, "tap7"), tun(19, "tap7"), tun(30, "tap9")]
    table += [descriptor(n, "/dev/vhost-net", mode=stat.S_IFCHR) for n in (20, 21)]
    found = {n.id: n for n in network.join(network.parse_network(NETWORK), cl.netdevs(command), table)}
    assert set(found) == {"#user0", "t0", "t1", "u1"}
    assert (found["t0"].fds, found["t0"].vhost_fds, found["t0"].vhost) == ((18, 19), (20, 21), True)
    assert (found["t1"].fds, found["t1"].ifname, found["t1"].vhost_fds) == ((30,), "tap9", ())
    assert {n.id: n.in_argv for n in found.values()} == {"#user0": True, "t0": True, "t1": True, "u1": False}


def test_a_tap_from_a_helper_is_the_only_one_left() -> None:
    command = cl.CommandLine.parse(["qemu", "-netdev", "bridge,id=b,br=br0"])
    listed = network.parse_network("b: index=0,type=tap,helper=/usr/lib/qemu/qemu-bridge-helper,br=br0\n")
    (found,) = network.join(listed, cl.netdevs(command), [tun(9, "tap0")])
    assert (found.fds, found.ifname) == ((9,), "tap0")
    (unsure,) = network.join(listed, cl.netdevs(command), [tun(9, "tap0"), tun(10, "tap1")])
    assert unsure.fds == ()


def test_argv_is_believed_where_qemu_cannot_be_asked() -> None:
    command = cl.CommandLine.parse(["qemu", "-netdev", "tap,id=t,ifname=tap7"])
    (found,) = network.join(None, cl.netdevs(command), [tun(4, "tap7")])
    assert (found.id, found.fds, found.in_argv) == ("t", (4,), True)


def test_parse_usernet() -> None:
    printed = (
        "Hub -1 (u0):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n"
        "  TCP[HOST_FORWARD]  17       127.0.0.1 36339       10.0.2.15    22     0     0\r\n"
        "  UDP[236 sec]       40       10.0.2.15 49173     192.168.0.1    53     0     0\r\n"
        "Hub 0 (#net189):\r\n  TCP[ESTABLISHED]   41       10.0.2.15 36338     192.168.0.1    80     0     0\r\n"
    )
    assert network.parse_usernet(printed) == ((17, "u0"), (40, "u0"), (41, "#net189"))


def test_parse_forwards() -> None:
    printed = (
        "Hub -1 (u0):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n"
        "  TCP[HOST_FORWARD]  19       127.0.0.1 44551       10.0.2.15    22     0     0\r\n"
        "  TCP[ESTABLISHED]   41       10.0.2.15 36338     192.168.0.1    80     0     0\r\n"
        "  TCP[HOST_FORWARD]  11               * 39311       10.0.2.15    22     0     0\r\n"
        "Hub -1 (#net036):\r\n  UDP[HOST_FORWARD]  10       127.0.0.1 40669        10.0.2.9    53     0     0\r\n"
    )
    assert network.parse_forwards(printed) == (
        ("#net036", "udp:127.0.0.1:40669-10.0.2.9:53"),
        ("u0", "tcp::39311-10.0.2.15:22"),
        ("u0", "tcp:127.0.0.1:44551-10.0.2.15:22"),
    )


@pytest.mark.parametrize(
    ("described", "device"),
    [
        ("disconnected:tcp:127.0.0.1:1234,server=on", "tcp:127.0.0.1:1234"),
        ("tcp:0.0.0.0:1234,server=on <-> 127.0.0.1:51234", "tcp:0.0.0.0:1234"),
        ("disconnected:unix:/run/g,server=on", "unix:/run/g,server=on,wait=off"),
        ("unix:/run/g,server=on", "unix:/run/g,server=on,wait=off"),
    ],
)
def test_how_a_gdb_stub_is_opened_again(described: str, device: str) -> None:
    assert chardevs.gdb_device(described) == device


# -- displays, jobs


def test_parse_vnc() -> None:
    reply = [
        {
            "id": "default",
            "auth": "none",
            "clients": [{"host": "127.0.0.1"}],
            "server": [
                {"host": "127.0.0.1", "service": "5901", "family": "ipv4", "websocket": False, "auth": "none"},
                {"host": "127.0.0.1", "service": "5701", "family": "ipv4", "websocket": True, "auth": "none"},
                {"host": "", "service": "/run/vnc", "family": "unix", "websocket": False, "auth": "none"},
            ],
        },
        {"id": "second", "auth": "vnc", "clients": []},
    ]
    table = [tcp(9, ("127.0.0.1", 5901)), unix(10, "/run/vnc", listening=True)]
    first, second = devices.parse_vnc(reply, table)
    assert first.listeners == (
        VncListener("ipv4", "127.0.0.1", "5901", 9),
        VncListener("ipv4", "127.0.0.1", "5701", None, websocket=True),
        VncListener("unix", "/run/vnc", "", 10),
    )
    assert (first.websocket, first.clients) == (True, 1)
    assert (second.id, second.listeners, second.clients) == ("second", (), 0)


@pytest.mark.parametrize(
    ("reply", "spice"),
    [
        ({"enabled": False}, ("", set())),
        ({"enabled": True, "auth": "none", "port": 5930, "tls-port": 5931, "host": "::"}, ("none", {5930, 5931})),
        ({"enabled": True, "auth": "spice", "host": "/run/spice"}, ("spice", {"/run/spice"})),
        ({"enabled": True}, ("unknown", set())),
    ],
)
def test_parse_spice(reply: Any, spice: tuple[str, set[int | str]]) -> None:
    assert devices.parse_spice(reply) == (spice[0], frozenset(spice[1]))


@pytest.mark.parametrize("reply", [None, [], {}, {"enabled": 1}, {"enabled": True, "auth": 7}])
def test_nonsense_about_spice(reply: Any) -> None:
    with pytest.raises(NONSENSE):
        devices.parse_spice(reply)


# -- descriptors


@pytest.mark.parametrize(
    ("target", "mode", "kind"),
    [
        ("anon_inode:[eventfd]", 0, "eventfd"),
        ("anon_inode:[eventpoll]", 0, "epoll"),
        ("anon_inode:[signalfd]", 0, "anon"),
        ("anon_inode:kvm-vcpu:0", 0, "kvm"),
        ("anon_inode:[vfio-device]", 0, "vfio"),
        ("/dev/vfio/12", stat.S_IFCHR, "vfio"),
        ("/dev/iommu", stat.S_IFCHR, "vfio"),
        ("/dev/kvm", stat.S_IFCHR, "kvm"),
        ("/dev/vhost-net", stat.S_IFCHR, "vhost"),
        ("/dev/vhost-vsock", stat.S_IFCHR, "vhost"),
        ("/dev/net/tun", stat.S_IFCHR, "tap"),
        ("/dev/ptmx", stat.S_IFCHR, "pty"),
        ("/dev/sda", stat.S_IFBLK, "device"),
        ("/memfd:x (deleted)", stat.S_IFREG, "memfd"),
        ("pipe:[5]", stat.S_IFIFO, "pipe"),
        ("socket:[5]", stat.S_IFSOCK, "socket"),
        ("/var/lib/a.img", stat.S_IFREG, "file"),
    ],
)
def test_kinds(target: str, mode: int, kind: str) -> None:
    assert descriptors.kind_of(descriptor(5, target, mode=mode)) == kind


def test_owners_of_what_nobody_has_a_number_for() -> None:
    table = [
        descriptor(0, "/dev/null", mode=stat.S_IFCHR),
        descriptor(3, "/dev/ptmx", mode=stat.S_IFCHR, extra=(("tty-index", "7"),)),
        descriptor(4, "/dev/ptmx", mode=stat.S_IFCHR, extra=(("tty-index", "8"),)),
        descriptor(5, "/img", inode=77),
        descriptor(6, "/strange", inode=78),
        descriptor(7, "socket:[1007]", inode=1007),
        descriptor(8, "socket:[1008]", inode=1008),
        descriptor(9, "socket:[1009]", inode=1009),
    ]
    vnc, viewer, unknown = tcp(7, (ANY, 5900)), tcp(8, ("10.0.0.1", 5900), ("10.0.0.2", 4)), tcp(9, ("::", 99))
    found = descriptors.open_files(
        table, [vnc, viewer, unknown], {7: "vnc:default"}, ram=(), files={(1, 77): "node:d"}, ptys={7: "p0"}
    )
    assert {f.number: f.owner for f in found} == {
        0: "stdio",
        3: "chardev:p0",
        4: "",
        5: "node:d",
        6: "",
        7: "vnc:default",
        8: "vnc:default",
        9: "",
    }
    assert [f.kind for f in found if f.number in (7, 8, 9)] == ["listener", "socket", "listener"]


# -- CPU


def test_parse_cpu() -> None:
    assert cpu.parse_cpu("qemu64,+avx2,-sse4a,pmu=on,phys-bits=40,check,vendor=AuthenticAMD,foo_bar=off") == (
        "qemu64",
        {"avx2": True, "sse4a": False, "pmu": True, "phys-bits": 40, "vendor": "AuthenticAMD", "foo-bar": False},
    )
    assert cpu.parse_cpu("host") == ("host", {})


def test_cpu_differences() -> None:
    before = {"avx2": True, "sse4.1": True, "sse4-1": True, "sse4_1": True, "old": True, "same": True}
    after = {"avx2": True, "sse4.1": False, "sse4-1": False, "sse4_1": False, "new": True, "same": True}
    assert cpu.differences(before, after) == ("sse4-1 is on and would be off",)
    assert cpu.differences(after, before) == ("sse4-1 is off and would be on",)
