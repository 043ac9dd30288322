"""A monitor that its client holds is borrowed and given back: every command is answered once, in order."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from cpr.engines import graft
from cpr.engines.mend import repair
from cpr.errors import MonitorError
from cpr.model import MonitorAddress
from tests.qemu.managers import WINDOW, Client, Flood, held
from tests.qemu.parties import Wire, descriptors, free_port
from tests.qemu.surveying import KEYS, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.engines.relay import Relay
    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab
    from tests.qemu.managers import Held

    Builds = Callable[[str], QemuBuild]

full = pytest.mark.full
NEWEST = KEYS[-1]
every = pytest.mark.parametrize("key", [pytest.param(k, marks=() if k == NEWEST else full) for k in KEYS])


def flooded(guest: Held, flood: Flood, times: int) -> list[Relay]:
    """Borrow and give back so often, with commands of ours in between."""
    relays = []
    for _ in range(times):
        relay = guest.borrow()
        relays.append(relay)
        already = flood.answered
        assert relay.monitor.execute("query-status")["running"] is False
        relay.monitor.execute("cont")
        relay.monitor.execute("stop")
        until(lambda already=already: flood.answered > already + 5)  # type: ignore[misc]
        assert relay.quiesce(5)
        assert 0 <= relay.answered - relay.passed <= WINDOW  # what was under way when we came is answered through us
        relay.release()
        relay.give_back(guest.tracer)
        already = flood.answered
        until(lambda already=already: flood.answered > already + 5)  # type: ignore[misc]
    return relays


@pytest.mark.parametrize(
    ("key", "times"), [(KEYS[0], 2), (NEWEST, 2), *(pytest.param(k, 30, marks=full) for k in KEYS)]
)
def test_under_a_flood_each_command_is_answered_once_in_order(
    lab: Lab, builds: Builds, key: str, times: int
) -> None:
    with held(lab, builds(key), Flood) as (guest, flood):
        before = guest.sockets()
        with flood:
            relays = flooded(guest, flood, times)
            assert guest.sockets() == before
        flood.check()
        assert flood.events == []
        assert [r.hidden() for r in relays] == [{"STOP": 1, "RESUME": 1}] * times


@every
def test_descriptors_come_with_their_command(lab: Lab, builds: Builds, key: str) -> None:
    """Whatever is written in one go, in pieces, with blanks, behind other commands or with ours in between."""
    files = [open(lab.directory / f"file{number}", "w") for number in range(5)]
    add = b'{"execute": "add-fd", "arguments": {"opaque": "%d"}, "id": "mine"}'
    with held(lab, builds(key), Client) as (guest, client), guest.borrow() as relay:
        assert relay.quiesce(5)
        numbers = [file.fileno() for file in files]
        client.write(b'{"execute": "query-name", "id": "mine"} ' + add % 0, numbers[0])
        client.write(b'{"execute": "query-name", "id": "mine"}')
        client.write(add[:20], numbers[1])
        client.write(add[20:] % 1)
        client.write(b" ", numbers[2])
        client.write(add % 2)
        client.write(add % 3, numbers[3])
        relay.monitor.send_fd("ours", numbers[0])
        relay.release()
        client.write(add % 4, numbers[4])
        relay.monitor.send_fd("ours", numbers[0])
        replies = [client.message() for _ in range(7)]
        for file, reply in zip(files, (r for r in replies if "fd" in r["return"]), strict=True):
            assert descriptors(guest.process.pid)[reply["return"]["fd"]] == file.name
        relay.give_back(guest.tracer)
        client.write(add % 5, numbers[0])
        number = client.message()["return"]["fd"]
        assert descriptors(guest.process.pid)[number] == files[0].name
    for file in files:
        file.close()


@every
def test_events_are_hidden_or_shown(lab: Lab, builds: Builds, key: str) -> None:
    with held(lab, builds(key), Client) as (guest, client):
        with guest.borrow(hide={"RESUME"}) as relay:
            relay.monitor.execute("cont")
            relay.monitor.execute("stop")
            assert relay.quiesce(5)
            assert client.saw() == ["STOP"]
            relay.hide(())
            relay.monitor.execute("cont")
            assert relay.quiesce(5)
            assert client.saw() == ["STOP", "RESUME"]
            assert relay.hidden() == {"RESUME": 1}
            assert [e.name for e in relay.monitor.events()] == ["RESUME", "STOP", "RESUME"]
            relay.give_back(guest.tracer)
        client.ask("stop")
        assert client.saw() == ["STOP", "RESUME", "STOP"]


@every
def test_whatever_a_client_says_is_answered_as_without_us(lab: Lab, builds: Builds, key: str) -> None:
    hostile = [
        b"hello",
        b"{]",
        b"]]",
        b'{"execute": "\n"}',
        b'{"execute": "query-\xff',
        b'{"execute": "no-such-command", "id": {"a": [1]}}',
        b"{'execute': 'query-name', 'id': \"it's\"}",
        b"[1, 2] 3 null",
        b'{"execute": "query-name", "id": "cpr-1"}',
        b'{"execute": "query-name", "id": "__qmp#00000"}',
        b'{"id": 1}',
        b'\xff{"execute": "query-name"}',
        b'{"execute": "qmp_capabilities"}',
        b'{"execute": "query-name", "id": "' + b"x" * 50_000 + b'"}',
        b'{"execute": "query-name"}' * 50,
    ]

    def answers(client: Client) -> list[bytes]:  # without the line and column that QEMU counts from its start
        client.write(b"".join(h + b'\r\n{"execute": "query-name", "id": "next"}' for h in hostile))
        said: list[bytes] = []
        while said.count(NEXT) < len(hostile):
            said.append(re.sub(rb'"\d+:\d+: ', b'"', client.line()))
        return said

    with held(lab, builds(key), Client) as (guest, client):
        without = answers(client)
        with guest.borrow() as relay:
            assert answers(client) == without
            assert relay.monitor.execute("query-name") == {"name": "guest"}
            relay.give_back(guest.tracer)
        assert answers(client) == without


NEXT = b'{"return": {"name": "guest"}, "id": "next"}\r'


def test_a_command_begun_before_we_come(lab: Lab, builds: Builds) -> None:
    """Its client goes on with it: it gets its connection back, and it is tried again."""
    with held(lab, builds(NEWEST), Client) as (guest, client):
        began = guest.sockets()
        client.write(b'{"execute": "query-name", "id": "cu')
        with ThreadPoolExecutor(1) as pool:
            until(lambda: guest.unread() == 0)
            borrowing = pool.submit(guest.borrow, settle=1.0)
            until(lambda: guest.sockets() != began)
            client.write(b't"}')
            assert client.message() == {"return": {"name": "guest"}, "id": "cut"}
            client.write(b'{"execute": "query-name", "id": "whole"}')
            relay = borrowing.result()
        with relay:
            assert client.message()["id"] == "whole"
            assert relay.backed_out == 1
            assert relay.monitor.execute("query-name") == {"name": "guest"}
            relay.give_back(guest.tracer)
        assert client.ask("query-name") == {"name": "guest"}
        assert guest.sockets() == began


def test_what_is_taken_in_parts_is_followed_by_what_waits(lab: Lab, builds: Builds) -> None:
    """Nothing tells us of it a second time."""
    with held(lab, builds(NEWEST), Client) as (guest, client), guest.borrow() as relay:
        assert relay.quiesce(5)
        with open("/dev/null") as file:
            client.write(b" ", file.fileno())
        client.write(b'{"execute": "query-name", "id": 1}')
        relay.release()
        assert client.message()["id"] == 1
        relay.give_back(guest.tracer)


def test_a_session_that_is_not_negotiated(lab: Lab, builds: Builds) -> None:
    """It goes on as if nothing had been."""
    with held(lab, builds(NEWEST), Wire) as (guest, wire):
        with wire:
            until(lambda: wire.received.endswith(b"\n"))
            already = len(wire.received)
            with pytest.raises(MonitorError, match="negotiated"):
                guest.borrow()
            wire.send(b'{"execute": "qmp_capabilities"}{"execute": "query-name"}')
            until(lambda: wire.received[already:].count(b"\n") == 2)
            assert wire.received[already:] == b'{"return": {}}\r\n{"return": {"name": "guest"}}\r\n'


@pytest.mark.parametrize("padding", [b"", b" " * 50_000])
def test_a_command_begun_while_we_are_there(lab: Lab, builds: Builds, padding: bytes) -> None:
    """It is QEMU's when the rest of it comes, whoever passes that on."""
    begun = b'{"execute": "query-name", %s "id": "cu' % padding
    with held(lab, builds(NEWEST), Client) as (guest, client):
        relay = guest.borrow()
        client.write(begun)
        assert relay.monitor.execute("query-name") == {"name": "guest"}
        client.write(b't"}')
        assert client.message()["id"] == "cut"
        client.write(begun)
        if padding:  # it has to be taken in parts
            until(lambda: relay.begun)
            assert not relay.quiesce(0.2)
            client.write(b't"}')
            assert client.message()["id"] == "cut"
        assert relay.quiesce(5)
        relay.give_back(guest.tracer)
        if not padding:
            client.write(b't"}')
            assert client.message()["id"] == "cut"
        assert client.ask("query-name") == {"name": "guest"}


@pytest.mark.parametrize("key", [NEWEST, pytest.param(KEYS[0], marks=full)])
def test_over_tcp(lab: Lab, builds: Builds, key: str) -> None:
    port = free_port()
    words = ("-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off")
    with held(lab, builds(key), Flood, *words, address=("127.0.0.1", port)) as (guest, flood):
        with flood:
            flooded(guest, flood, 1)
            relay = guest.borrow()
            assert relay.quiesce(5)
            relay.close()  # as if we died
            until(lambda: not graft.socket_inode(guest.process.pid, guest.number))
            address = MonitorAddress(label="qmp", host="127.0.0.1", port=port)
            repair(guest.process, guest.tracer, address, relay.kept)
            already = flood.answered
            until(lambda: flood.answered > already + 5)
        flood.check()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may suspend a seccomp filter")
def test_a_qemu_in_its_sandbox(lab: Lab, builds: Builds) -> None:
    words = ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    with held(lab, builds(NEWEST), Flood, *words) as (guest, flood):
        with flood:
            flooded(guest, flood, 1)
        flood.check()


def test_lines_that_are_set_prettily(lab: Lab, builds: Builds) -> None:
    """With pretty=on a message has many lines."""
    path = lab.directory / "pretty"
    words = f"-chardev socket,id=a,path={path},server=on,wait=off -mon chardev=a,mode=control,pretty=on".split()
    with held(lab, builds(NEWEST), Wire, *words, address=path) as (guest, wire):
        with wire:
            query = b'{"execute": "query-name", "id": 1}'
            reply = b'{\r\n    "return": {\r\n        "name": "guest"\r\n    },\r\n    "id": 1\r\n}\r\n'
            wire.send(b'{"execute": "qmp_capabilities"}' + query)
            until(lambda: wire.received.endswith(reply))
            already = len(wire.received)
            with guest.borrow() as relay:
                assert relay.monitor.execute("query-name") == {"name": "guest"}
                relay.monitor.execute("cont")
                relay.monitor.execute("stop")
                wire.send(query)
                assert relay.quiesce(5)
                relay.give_back(guest.tracer)
            wire.send(query)
            until(lambda: wire.received[already:] == reply + reply)
