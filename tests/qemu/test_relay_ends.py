"""What may end while a monitor is borrowed: its client, QEMU's program, or we."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cpr.engines import graft
from cpr.engines.mend import open_session, repair
from cpr.errors import MonitorError, StepFailed
from cpr.linux import proc
from cpr.linux.tracer import Tracer
from cpr.model import MonitorAddress
from cpr.qemu import clients
from tests.qemu.managers import Client, Flood, held
from tests.qemu.reexecuting import reexecuted
from tests.qemu.surveying import KEYS, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab
    from tests.qemu.managers import Held

    Builds = Callable[[str], QemuBuild]

full = pytest.mark.full
NEWEST = KEYS[-1]
every = pytest.mark.parametrize("key", [pytest.param(k, marks=() if k == NEWEST else full) for k in KEYS])


@every
def test_a_client_that_hangs_up(lab: Lab, builds: Builds, key: str) -> None:
    with held(lab, builds(key), Client) as (guest, client), guest.borrow() as relay:
        client.close()
        until(lambda: relay.client_gone)
        assert relay.monitor.execute("query-name") == {"name": "guest"}
        assert relay.quiesce(5)
        relay.give_back(guest.tracer)
        other = Client(guest.address)
        assert other.ask("query-name") == {"name": "guest"}
        other.close()


def test_a_client_that_hangs_up_in_the_middle_of_a_long_command(lab: Lab, builds: Builds) -> None:
    with held(lab, builds(NEWEST), Client) as (guest, client), guest.borrow() as relay:
        client.write(b'{"execute": "query-name"}{"execute": "' + b"x" * 50_000)
        assert client.message() == {"return": {"name": "guest"}}
        assert not relay.quiesce(0.2)
        client.close()
        until(lambda: relay.client_gone)
        relay.give_back(guest.tracer)
        other = Client(guest.address)
        assert other.ask("query-name") == {"name": "guest"}
        other.close()


@every
def test_a_client_that_does_not_read(
    lab: Lab, builds: Builds, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU's words are cut by the end of its room when we come, and wait with us while we are there."""
    with held(lab, builds(key), Client) as (guest, client):
        ask = b'{"execute": "query-commands", "id": %d}'
        client.write(b"".join(ask % number for number in range(40)))
        until(lambda: guest.unread() == 0)
        relay = guest.borrow()
        client.write(b"".join(ask % number for number in range(40, 60)))
        assert relay.quiesce(10)
        assert relay.undelivered > 0
        with monkeypatch.context() as patch:
            patch.setattr(clients, "widen", lambda _: False)
            with pytest.raises(TimeoutError, match="does not read"):
                relay.give_back(guest.tracer, timeout=0.3)
        assert relay.monitor.execute("query-name") == {"name": "guest"}
        client.write(ask % 60)
        until(lambda: relay.passed == 21)
        relay.give_back(guest.tracer)
        client.write(ask % 61)
        replies = [client.message() for _ in range(62)]
        assert [reply["id"] for reply in replies] == list(range(62))
        assert len({json.dumps(reply["return"]) for reply in replies}) == 1


@every
@pytest.mark.parametrize("through_us", [True, False])
def test_qemu_is_replaced_in_place(lab: Lab, builds: Builds, key: str, through_us: bool) -> None:
    """What the client says meanwhile is answered by the new QEMU."""
    with held(lab, builds(key), Flood) as (guest, flood):
        with flood:
            relay = guest.borrow()
            assert relay.quiesce(5)
            already = flood.answered
            with reexecuted(guest, relay.kept) as (anew, sock):
                assert relay.kept.holds(guest.process.pid)
                assert flood.answered == already
                if through_us:
                    relay.reconnect(sock)
                    relay.release()
                    assert relay.monitor.execute("query-status")["status"] == "prelaunch"
                else:
                    open_session(sock, "new", timeout=10)
                relay.give_back(anew.tracer, anew.number)
            until(lambda: flood.answered > already + 5)
        flood.check()


@full
def test_qemu_is_replaced_while_the_client_does_not_read(lab: Lab, builds: Builds) -> None:
    with held(lab, builds(NEWEST), Client) as (guest, client):
        ask = b'{"execute": "query-commands", "id": %d}'
        client.write(b"".join(ask % number for number in range(60)))
        relay = guest.borrow()
        until(lambda: relay.undelivered > 0)
        assert relay.quiesce(10)
        client.write(ask % 60)
        with reexecuted(guest, relay.kept) as (anew, sock):
            open_session(sock, "new", timeout=10)
            relay.give_back(anew.tracer, anew.number)
        assert [client.message()["id"] for _ in range(61)] == list(range(61))


def test_out_of_band_execution_stays_negotiated(lab: Lab, builds: Builds) -> None:
    oob = {"exec-oob": "migrate-pause", "id": "oob"}
    with held(lab, builds(NEWEST), lambda address: Client(address, oob=True)) as (guest, client):
        with guest.borrow() as relay:
            assert relay.oob
            client.send(oob)
            first = client.message()
            assert relay.quiesce(5)
            with reexecuted(guest, relay.kept) as (anew, sock):
                relay.reconnect(sock)
                relay.give_back(anew.tracer, anew.number)
        client.send(oob)
        assert client.message() == first
        assert "QMP input" not in str(first)


BORROW = """
import sys, time
from cpr.engines.relay import Relay
from cpr.linux.process import open_process
from cpr.linux.tracer import Tracer
pid, number = map(int, sys.argv[1:])
with open_process(pid) as process, Tracer.start(process) as tracer:
    print("ready", flush=True)
    sys.stdin.readline()
    relay = Relay.borrow(process, tracer, number, until=time.monotonic() + 10)
    print(relay.kept.number, relay.kept.inode, flush=True)
    time.sleep(100)
"""


@contextlib.contextmanager
def borrower(guest: Held) -> Iterator[subprocess.Popen[str]]:
    """Another process that borrows when it is told to, and is killed at the end."""
    call = [sys.executable, "-c", BORROW, str(guest.process.pid), str(guest.number)]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as popen:
        try:
            assert popen.stdout is not None
            assert popen.stdout.readline() == "ready\n"
            yield popen
        finally:
            popen.kill()


def go(popen: subprocess.Popen[str]) -> None:
    assert popen.stdin is not None
    popen.stdin.write("go\n")
    popen.stdin.flush()


@every
def test_we_die_and_the_client_gets_its_session_back(lab: Lab, builds: Builds, key: str) -> None:
    with held(lab, builds(key), Client) as (guest, client):
        before = guest.sockets()
        with borrower(guest) as popen:
            go(popen)
            assert popen.stdout is not None
            number, inode = map(int, popen.stdout.readline().split())
            assert client.ask("query-name") == {"name": "guest"}
        client.send({"execute": "query-name", "id": "meanwhile"})
        kept = graft.Kept(number=number, inode=inode)
        repair(guest.process, guest.tracer, MonitorAddress(label="qmp", path=str(guest.address)), kept)
        assert client.message()["id"] == "meanwhile"
        assert client.ask("query-status")["running"] is False
        assert len(guest.sockets()) == len(before)
        assert not kept.holds(guest.process.pid)
        with pytest.raises(StepFailed):
            stray = graft.Kept(number=number, inode=1)
            graft.put_back(guest.process, guest.tracer, stray, guest.number, lambda: True, time.monotonic())


@pytest.mark.parametrize("times", [3, pytest.param(40, marks=full)])
def test_we_die_at_any_moment(lab: Lab, builds: Builds, times: int) -> None:
    """Either the client has its session, or its connection is kept and it can be given back."""
    moments = random.Random(times)  # noqa: S311
    with held(lab, builds(NEWEST), Client) as (guest, client):
        for _ in range(times):
            inode = graft.socket_inode(guest.process.pid, guest.number)
            with borrower(guest) as popen:
                go(popen)
                time.sleep(moments.uniform(0, 0.05))
            until(lambda: proc.read_status(guest.process.pid).tracer == 0)  # noqa: B023
            kept = graft.find_kept(guest.process.pid, guest.number, inode)
            if kept is not None:
                until(lambda: waits(guest))  # noqa: B023
                repair(guest.process, guest.tracer, MonitorAddress(label="qmp", path=str(guest.address)), kept)
                (number,) = [n for n, target in guest.sockets() if target == f"socket:[{inode}]"]
                guest = replace(guest, number=number)
            assert client.ask("query-name") == {"name": "guest"}


@pytest.mark.parametrize("times", [3, pytest.param(60, marks=full)])
def test_the_tracer_dies_at_any_moment(lab: Lab, builds: Builds, times: int) -> None:
    """Either the monitor is borrowed all the same, or its client has it; and it is given back by another tracer."""
    moments = random.Random(times)  # noqa: S311
    borrowed = 0
    with held(lab, builds(NEWEST), Client) as (guest, client):
        for _ in range(times):
            with Tracer.start(guest.process) as tracer:
                dying = threading.Timer(moments.uniform(0, 0.02), os.kill, (tracer.pid, signal.SIGKILL))
                dying.start()
                relay = None
                with contextlib.suppress(ConnectionError):
                    relay = replace(guest, tracer=tracer).borrow(settle=0.0)
                dying.join()
                if relay is not None:
                    borrowed += 1
                    client.send({"execute": "query-name", "id": "mine"})
                    assert relay.monitor.execute("query-name") == {"name": "guest"}
                    assert client.message()["id"] == "mine"
                    relay.give_back(tracer)
            assert client.ask("query-name") == {"name": "guest"}
    assert times < 10 or 0 < borrowed < times


def test_a_qemu_that_hangs(lab: Lab, builds: Builds) -> None:
    """Nothing that we said to it is left when it goes on."""
    with held(lab, builds(NEWEST), Client) as (guest, client):
        guest.process.signal(signal.SIGSTOP)
        until(lambda: proc.is_stopped(guest.process.pid))
        client.send({"execute": "query-name", "id": "before"})
        with pytest.raises(MonitorError, match="no answer"):
            guest.borrow(0.1)
        guest.process.signal(signal.SIGCONT)
        assert client.message()["id"] == "before"
        assert client.ask("query-name") == {"name": "guest"}


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=full)])
def test_a_qemu_that_stops_in_the_middle_of_a_command(lab: Lab, builds: Builds, times: int) -> None:
    with held(lab, builds(NEWEST), Flood) as (guest, flood):
        with flood:
            for _ in range(times):
                already = flood.answered
                until(lambda already=already: flood.answered > already + 5)  # type: ignore[misc]
                guest.process.signal(signal.SIGSTOP)
                until(lambda: proc.is_stopped(guest.process.pid))
                with pytest.raises((MonitorError, TimeoutError)):
                    guest.borrow(0.05)
                guest.process.signal(signal.SIGCONT)
        flood.check()


def waits(guest: Held) -> bool:
    """QEMU has noticed that its client, which we were, is gone."""
    return guest.number not in dict(guest.sockets())
