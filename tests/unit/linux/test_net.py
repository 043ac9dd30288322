"""Socket tables, and answers of unix_diag."""

from __future__ import annotations

import socket
import struct

import pytest

from cpr.linux.net import UnixSocket, parse_net_tcp, parse_net_unix
from cpr.linux.sockdiag import parse_unix_diag

UNIX = """\
Num       RefCount Protocol Flags    Type St Inode Path
00000000f1e4ad7b: 00000002 00000000 00010000 0001 01 21001 /run/vm/my qmp.sock
0000000012345678: 00000003 00000000 00000000 0001 03 21002 /run/vm/my qmp.sock
0000000012345679: 00000003 00000000 00000000 0001 03 21003
000000001234567a: 00000002 00000000 00010000 0005 01 21004 @/containerd@
000000001234567b: 00000002 00000000 00000000 0002 01 21005 /run/systemd/notify
"""


def test_unix() -> None:
    listener, accepted, pair, abstract, datagram = parse_net_unix(UNIX)
    path = "/run/vm/my qmp.sock"
    assert listener == UnixSocket(inode=21001, path=path, type="stream", listening=True, connected=False)
    assert (accepted.path, accepted.listening, accepted.connected) == (path, False, True)
    assert (pair.path, pair.connected) == ("", True)
    assert (abstract.path, abstract.type) == ("@/containerd@", "seqpacket")
    assert datagram.type == "dgram"


def test_unix_with_hostile_names() -> None:
    """A name may contain a newline, and what looks like a line: the true line is still there to be compared."""
    forged = "0000000012345678: 00000002 00000000 00010000 0001 01 21001 /evil"
    found = parse_net_unix(
        UNIX + f"000000001234567c: 00000002 00000000 00010000 0001 01 21006 /x\n{forged}\n\nrest of it\n"
    )
    assert [s.path for s in found if s.inode == 21001] == ["/run/vm/my qmp.sock", "/evil"]
    assert [s.path for s in found if s.inode == 21006] == ["/x"]
    assert parse_net_unix("") == []
    assert parse_net_unix(UNIX[:90]) == []
    assert parse_net_unix("a: b c zz 0001 01 5 /x\n") == []


TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:170C 00000000:0000 0A 00000000:00000002 00:00000000 00000000   107        0 31001 2 0 100 0 0 10 0
   1: 0100007F:170C 0100007F:A5B2 01 00000000:00000009 00:00000000 00000000   107        0 31002 1 0 20 4 30 10 -1
   2: nonsense
"""
TCP6 = """\
   0: 00000000000000000000000001000000:170C 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 31003 1
   1: 0000000000000000FFFF00000100007F:0050 0000000000000000FFFF00000100007F:1234 63 00000000:00000000 00:00000000 00000000 0 0 31004 1
   2: 0000:170C 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 31005 1
"""  # noqa: E501

little = pytest.mark.skipif(struct.pack("=H", 1) != b"\1\0", reason="recorded on a little-endian host")


@little
def test_tcp() -> None:
    listener, established = parse_net_tcp(TCP, socket.AF_INET)
    assert (listener.local, listener.state, listener.backlog, listener.uid) == (
        ("127.0.0.1", 5900),
        "LISTEN",
        2,
        107,
    )
    assert (established.remote, established.state, established.backlog) == (
        ("127.0.0.1", 42418),
        "ESTABLISHED",
        0,
    )


@little
def test_tcp6() -> None:
    loopback, mapped = parse_net_tcp(TCP6, socket.AF_INET6)
    assert loopback.local == ("::1", 5900)
    assert mapped.local == ("::ffff:127.0.0.1", 80)
    assert mapped.state == "99"


def diag(*attributes: tuple[int, bytes]) -> bytes:
    data = struct.pack("=BBBBIII", 1, 1, 10, 0, 777, 0, 0)
    for kind, value in attributes:
        data += struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
    return data


def test_unix_diag() -> None:
    answer = parse_unix_diag(
        diag((0, b"/run/x\0"), (4, struct.pack("=II", 3, 128)), (9, b"abcde"), (2, b"\5\0\0\0"))
    )
    assert (answer.inode, answer.state, answer.name, answer.queue, answer.queue_limit) == (
        777,
        10,
        "/run/x",
        3,
        128,
    )
    assert parse_unix_diag(diag((0, b"\0abc"))).name == "@abc"
    assert parse_unix_diag(diag()).queue == 0


@pytest.mark.parametrize(
    "data", [b"", diag()[:-1], diag((4, bytes(8)))[:-1], diag((4, b"abc")), diag() + b"\0\0\0\0"]
)
def test_unix_diag_damaged(data: bytes) -> None:
    with pytest.raises(ValueError):
        parse_unix_diag(data)
