"""A new program gets listeners that are there already when it binds their addresses: a program and sockets of ours."""

from __future__ import annotations

import fcntl
import os
import socket
import sys

import pytest

from cpr.linux import stub
from cpr.linux.births import FIRST, Birth
from cpr.linux.proc import read_argv
from cpr.linux.process import open_process
from cpr.linux.rebind import address_of, parse_address
from cpr.linux.tracee import Call
from cpr.linux.tracer import Attach, Batch, Exec, Follow, Keep, Tracer
from tests.kernel.support import FOREVER, can, child, free_id, trace_a_child

PROGRAM = """
import socket, sys, threading
threading.Thread(target=int).start()
for word in sys.argv[1:]:
    family, host, port = word.split(",")
    listener = socket.socket(int(family))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, int(port)))
        listener.listen(3)
        listener.settimeout(1)
        client = listener.accept()[0]
        client.sendall(repr(listener.getsockname()[:2]).encode())
    except TimeoutError:
        print("nobody", flush=True)
    except OSError as error:
        print(error.errno, flush=True)
print("done", flush=True)
sys.stdin.read()
"""

pytestmark = [
    pytest.mark.skipif(stub.architecture() is None, reason="not on this architecture"),
    pytest.mark.skipif(not can(trace_a_child), reason="cannot trace here"),
]


def listener(family: socket.AddressFamily) -> socket.socket:
    """On loopback, at a port that is free."""
    sock = socket.socket(family)
    try:
        sock.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
    except OSError as error:
        sock.close()
        pytest.skip(f"no {family.name}: {error}")
    sock.listen(5)
    return sock


def run(listeners: list[socket.socket], kept: list[socket.socket] | None = None, *, kill: str = "") -> str:
    """What the program prints, which binds the addresses of these listeners.

    kept: those that are kept for it.  kill: the tracer, or `all` who have the listeners.
    """
    words = [",".join(map(str, address_of(sock) or ())) for sock in listeners]
    numbers = tuple(sock.fileno() for sock in (listeners if kept is None else kept))
    out, into = os.pipe()

    def keep() -> None:
        os.dup2(into, 1)
        for sock in (*listeners, *(kept or ())):
            os.set_inheritable(sock.fileno(), True)

    with os.fdopen(out, "rb", buffering=0) as said, child(prepare=keep, close_fds=False) as pid:
        os.close(into)
        with open_process(pid) as process, Tracer.start(process) as tracer:
            argv = (sys.executable, "-S", "-c", PROGRAM, *words)
            follow = Follow({FIRST: Birth(free_id(), "python")})
            calls = tuple(Call("fcntl", (n, fcntl.F_SETFD, fcntl.FD_CLOEXEC)) for n in numbers)
            tracer.run(Attach(), Batch(calls), Keep(numbers), Exec(argv[0], argv, ("LC_ALL=C",)))
            if kill:
                for sock in listeners if kill == "all" else ():
                    sock.close()
                tracer.kill()
            else:
                tracer.run(follow)
            text = b""
            while not text.endswith(b"done\n") and (more := said.read(4096)):
                text += more
    return text.decode()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=str)
def test_those_who_wait_are_served(family: socket.AddressFamily) -> None:
    with listener(family) as first, listener(family) as second:
        clients = [socket.create_connection(sock.getsockname()[:2]) for sock in (first, second)]
        assert run([first, second]) == "done\n"
        for client, sock in zip(clients, (first, second), strict=True):
            with client:
                client.settimeout(5)
                assert client.recv(100).decode() == repr(sock.getsockname()[:2])


def test_where_nobody_follows_the_address_is_taken() -> None:
    """By us, who have the listener yet; so the tests above could fail."""
    with listener(socket.AF_INET) as sock:
        assert run([sock], kill="tracer") == "98\ndone\n"


def test_where_nobody_is_left_the_program_binds_it() -> None:
    """All are dead who had the listener."""
    with listener(socket.AF_INET) as sock:
        assert run([sock], kill="all") == "nobody\ndone\n"


def test_other_addresses_are_its_own() -> None:
    with listener(socket.AF_INET) as sock, listener(socket.AF_INET) as other:
        assert run([sock], [other]) == "98\ndone\n"


def test_a_descriptor_that_is_not_there() -> None:
    """It is said before the program is executed."""
    with child() as pid, open_process(pid) as process, Tracer.start(process) as tracer:
        with pytest.raises(OSError, match="Bad file descriptor"):
            tracer.run(Attach(), Keep((999,)), Exec("/bin/true", ("true",), ()))
        assert process.alive()
        assert read_argv(pid) == FOREVER


def test_addresses() -> None:
    assert parse_address(b"\x02\x00\x16\x76\x7f\x00\x00\x01" + bytes(8)) == (socket.AF_INET, "127.0.0.1", 5750)
    v6 = b"\x0a\x00\x16\x76" + bytes(4) + bytes(15) + b"\x01" + bytes(4)
    assert parse_address(v6) == (socket.AF_INET6, "::1", 5750)
    for cut in (b"", b"\x02", b"\x02\x00\x16", v6[:20], b"\x01\x00/run/x\0"):
        assert parse_address(cut) is None
    with socket.socket(socket.AF_UNIX) as sock:
        assert address_of(sock) is None
