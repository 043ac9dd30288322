"""Whoever is connected to a guest stays connected, and whoever comes meanwhile is served: every byte is compared."""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.qemu.conftest import BOTH_ENGINES, qemus_of
from tests.qemu.parties import (
    Knocker,
    Poller,
    Qmp,
    Typist,
    Wire,
    connected,
    counted,
    free_port,
    unique,
    words_of,
)
from tests.qemu.surveying import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab
    from tests.qemu.conftest import Command, Result
    from tests.qemu.parties import Address, Counted

    Builds = Callable[[str], QemuBuild]

full = pytest.mark.full
pytestmark = BOTH_ENGINES


def address_of(lab: Lab, kind: str, name: str = "con") -> Address:
    return lab.directory / name if kind == "unix" else ("127.0.0.1", free_port())


def server(label: str, address: Address) -> str:
    return f"socket,id={label},{words_of(address)},server=on,wait=off"


def checks(result: Result) -> set[str]:
    """Ids of the findings of an update's document."""
    return {f["check"] for f in result.guest["findings"]}


# -- consoles


@contextlib.contextmanager
def typing(guest: Counted, interval: float = 0.005) -> Iterator[Typist]:
    """Bytes are typed before, during and after; each is echoed exactly once, in order."""
    already = len(guest.log.echoed)
    with Typist(guest.wire, interval) as typist:
        guest.log.wait(lambda: len(guest.log.echoed) > already + 20, 10, "no echo")
        yield typist
        mark = already + len(typist.typed)
        guest.log.wait(lambda: len(guest.log.echoed) > mark + 20, 20, "no echo after the update")
    guest.log.wait(lambda: len(guest.log.echoed) >= already + len(typist.typed), 20, "not everything is echoed")
    assert bytes(guest.log.echoed[already:]) == bytes(typist.typed)


@pytest.mark.parametrize(
    ("kind", "route"),
    [
        ("unix", "7.2 11.1.a"),
        pytest.param("tcp", "7.2 11.1.a", marks=full),
        pytest.param("unix", "10.0 11.1.b", marks=full),
        pytest.param("tcp", "11.1.a 11.1.b 11.1.a", marks=full),
        pytest.param("unix", "7.2 10.0 10.0", marks=full),
    ],
)
def test_a_console_client_stays_connected_and_loses_no_byte(
    lab: Lab, cpr: Command, builds: Builds, kind: str, route: str
) -> None:
    first, *rest = route.split()
    with counted(lab, builds(first), console=address_of(lab, kind)) as guest:
        for key in rest:
            with typing(guest):
                result = cpr.update(guest.name, builds(key))
                assert result.code == 0, str(result)
        guest.check()
        assert len(qemus_of(lab)) == 1


@full
@pytest.mark.parametrize("route", ["7.2 7.2 7.2 10.0 10.0 11.1.a 11.1.b 11.1.a 11.1.b 11.1.a 11.1.b"])
def test_what_is_typed_in_the_very_moment_is_not_lost(lab: Lab, cpr: Command, builds: Builds, route: str) -> None:
    """Several bytes come within the pause, whoever reads them."""
    first, *rest = route.split()
    with counted(lab, builds(first)) as guest:
        for key in rest:
            with typing(guest, 0.0005):
                result = cpr.update(guest.name, builds(key))
                assert result.code == 0, str(result)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a network namespace")
def test_a_console_client_from_another_network_namespace(lab: Lab, cpr: Command, builds: Builds) -> None:
    with counted(lab, builds("7.2"), elsewhere=True) as guest, typing(guest):
        result = cpr.update(guest.name, builds("11.1.a"))
        assert result.code == 0, str(result)
        assert [f for f in result.guest["findings"] if f["severity"] != "note"] == []


@pytest.mark.parametrize("kind", ["unix", pytest.param("tcp", marks=full)])
def test_an_idle_chardev_never_refuses_a_client(lab: Lab, cpr: Command, builds: Builds, kind: str) -> None:
    """Nobody is connected to it when the update begins; somebody comes and goes every few milliseconds."""
    idle = address_of(lab, kind, "idle")
    extra = ("-chardev", server("idle", idle), "-serial", "chardev:idle")
    with counted(lab, builds("7.2"), *extra) as guest, Knocker(idle) as knocker:
        result = cpr.update(guest.name, builds("11.1.a"))
        assert result.code == 0, str(result)
        had = knocker.had
        until(lambda: knocker.had > had + 5)
        guest.log.wait_ticks(20)
        guest.check(rounds=0)
    assert knocker.missed == []
    assert knocker.had > 50


PORTS = 18
SPACING = 0.012


@full
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_client_that_comes_at_any_moment_loses_nothing(lab: Lab, cpr: Command, builds: Builds, kind: str) -> None:
    """One after the other connects while the new QEMU is started, gets the guest, and afterwards; each says something
    at once, is echoed, and stays."""
    addresses = [address_of(lab, kind, f"p{n}") for n in range(PORTS)]
    extra = ["-name", unique(lab)]
    for n, address in enumerate(addresses):
        if n % 6 == 0:
            extra += ["-device", f"virtio-serial-pci,id=vs{n // 6}"]
        extra += ["-chardev", server(f"p{n}", address)]
        extra += ["-device", f"virtserialport,bus=vs{n // 6}.0,chardev=p{n},name=cpr.echo.{n}"]
    guest = lab.linux(builds("7.2"), *extra)
    with contextlib.ExitStack() as stack:
        for address in addresses:  # all of them answer, then nobody is connected
            with Wire(address) as wire:
                wire.send(b"are you there\n")
                wire.log.wait(lambda w=wire: w.received == b"are you there\n", 30)  # type: ignore[misc]
        events = lab.directory / "events"
        events.touch()
        run = stack.enter_context(
            cpr.start("update", guest.pid, "--qemu", builds("11.1.a").binary, "-y", "--json", "--events", events)
        )
        wires: list[Wire] = []

        def come(number: int) -> None:
            wires.append(stack.enter_context(Wire(addresses[number])))
            wires[-1].send(b"line %d\n" % number)
            time.sleep(SPACING)

        until(lambda: begun(events, "StartNew") or run.poll() is not None)
        while len(wires) < PORTS // 2:
            come(len(wires))
        until(lambda: begun(events, "PrepareStream") or run.poll() is not None)
        while len(wires) < PORTS:
            come(len(wires))
        out, err = run.communicate(timeout=60)
        (outcome,) = json.loads(out)["guests"]
        lab.adopt(outcome["pid_after"])
        assert run.returncode == 0, (out, err)
        for number, wire in enumerate(wires):
            if not wire.ended:
                wire.send(b"after %d\n" % number)
        with contextlib.suppress(TimeoutError):
            for wire in wires:
                wire.log.wait(lambda w=wire: w.ended or w.received.count(b"\n") >= 2, 20)  # type: ignore[misc]
        said = [(wire.received.decode(), wire.ended) for wire in wires]
        assert said == [(f"line {n}\nafter {n}\n", "") for n in range(PORTS)]
    assert guest.log.sound, guest.log.problems()


def begun(events: Any, step: str) -> bool:
    return any(json.loads(line).get("step") == step for line in events.read_text().splitlines() if line.endswith("}"))


@full
def test_the_guest_agent_answers_on_the_same_connection(lab: Lab, cpr: Command, builds: Builds) -> None:
    """With a console and an echoing port beside it: three connections, on three kinds of device ports."""
    more = address_of(lab, "tcp")
    extra = [
        *("-name", unique(lab), "-device", "virtio-serial-pci,id=second"),
        *("-chardev", server("more", more)),
        *("-device", "virtserialport,bus=second.0,chardev=more,name=cpr.echo.more"),
    ]
    guest = lab.linux(builds("7.2"), *extra, agent=True)
    pid = guest.pid
    with Wire(lab.directory / "guest.agent") as agent, Wire(more) as echo:

        def answers() -> int:
            return agent.received.count(b"\n")

        def ask(*commands: str) -> int:
            for command in commands:
                agent.send(json.dumps({"execute": command}).encode() + b"\n")
            return answers() + len(commands)

        def answered(count: int) -> None:
            agent.log.wait(lambda: answers() >= count, 30, "the agent does not answer")
            assert answers() == count
            assert all("return" in json.loads(line) for line in agent.received.splitlines())

        answered(ask("guest-ping"))
        echo.send(b"before\n")
        echo.log.wait(lambda: echo.received == b"before\n", 30)
        for key in ("11.1.a", "11.1.b"):
            expected = ask(*["guest-info"] * 20)  # some of them are under way when the guest stops
            result = cpr.update(pid, builds(key))
            assert result.code == 0, str(result)
            pid = result.guest["pid_after"]
            answered(expected)
            answered(ask("guest-ping"))
        echo.send(b"after\n")
        echo.log.wait(lambda: echo.received == b"before\nafter\n", 30)
        assert not agent.ended
        assert not echo.ended
        guest.console.send(b"typed\n")
        guest.log.wait(lambda: guest.log.echoed == ["typed"], 20)
    assert guest.log.sound, guest.log.problems()


def test_a_second_client_that_waits_is_named_and_nobody_loses_anything(
    lab: Lab, cpr: Command, builds: Builds
) -> None:
    with counted(lab, builds("7.2")) as guest, connected(lab.directory / f"{guest.name}.con"):
        result = cpr.update(guest.name, builds("11.1.a"))
        assert result.code == 3, str(result)
        assert checks(result) == {"client-queued"}
        guest.log.wait_ticks(20)
        guest.check(rounds=0)
        assert guest.process.alive


@full
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_second_clients_that_come_and_go_behind_a_connected_one(
    lab: Lab, cpr: Command, builds: Builds, kind: str
) -> None:
    """Refused, undone or done: who is connected keeps the place and every byte, and nobody is refused."""
    console = address_of(lab, kind)
    with counted(lab, builds("7.2"), console=console) as guest, typing(guest):
        with Knocker(console, pause=0.3, stay=0.3) as knocker:
            for _ in range(3):
                (pid,) = qemus_of(lab)
                result = cpr.update(pid, builds("11.1.a"))
                assert result.code in (0, 3, 6), str(result)
                assert result.code != 6 or "console" in result.guest["error"], str(result)
                assert len(qemus_of(lab)) == 1
        assert knocker.had > 0
        assert [m for m in knocker.missed if m.why in ("ECONNREFUSED", "ENOENT", "ECONNRESET")] == []
        guest.check(rounds=0)


# -- monitors


def polled(lab: Lab, cpr: Command, builds: Builds, route: list[str], pollers: list[Poller], guest: Counted) -> None:
    """Updates while tools poll; none is refused, and what they are told is told by the guest."""
    with contextlib.ExitStack() as stack:
        for poller in pollers:
            stack.enter_context(poller)
        for key in route:
            result = cpr.update(guest.name, builds(key))
            assert result.code == 0, str(result)
            for poller in pollers:
                until_told(poller, 3)
        for poller in pollers:
            assert poller.missed == []
            assert poller.states == {"running"}
            assert poller.versions[0] == builds("7.2").version
            assert poller.versions[-1] == builds(route[-1]).version
    guest.check(rounds=0)


def until_told(poller: Poller, more: int) -> None:
    end, wanted = time.monotonic() + 30, len(poller.told) + more
    while len(poller.told) < wanted:
        assert time.monotonic() < end, f"no answers any more; missed: {poller.missed[-3:]}"
        time.sleep(0.01)


def test_a_polling_tool_is_never_refused_and_never_told_nonsense(lab: Lab, cpr: Command, builds: Builds) -> None:
    with counted(lab, builds("7.2")) as guest:
        polled(lab, cpr, builds, ["11.1.a"], [Poller(guest.qmp)], guest)


@full
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_polling_tools_over_ten_updates(lab: Lab, cpr: Command, builds: Builds, kind: str) -> None:
    """Three of them, two on the guest's own socket and one on a second."""
    second = address_of(lab, kind, "second")
    with counted(lab, builds("7.2"), "-chardev", server("q2", second), "-mon", "q2,mode=control") as guest:
        pollers = [Poller(guest.qmp), Poller(guest.qmp, 0.03, impatient=True), Poller(second)]
        polled(lab, cpr, builds, ["11.1.a", "11.1.b"] * 5, pollers, guest)


def test_a_held_monitor_is_named(lab: Lab, cpr: Command, builds: Builds) -> None:
    with counted(lab, builds("7.2")) as guest:
        with Qmp(guest.qmp) as holder:
            result = cpr.update(guest.name, builds("11.1.a"))
            assert result.code == 3, str(result)
            assert checks(result) == {"monitor-held"}
            assert str(guest.qmp) in result.guest["error"]
            assert holder.execute("query-status")["status"] == "running"
        result = cpr.update(guest.name, builds("11.1.a"))
        assert result.code == 0, str(result)
        guest.check(rounds=0)


@full
@pytest.mark.parametrize("ignored", [False, True])
def test_two_qmp_sockets_one_of_them_held(lab: Lab, cpr: Command, builds: Builds, ignored: bool) -> None:
    """The held one is named, and its client hung up on only where that is asked for; both serve again afterwards.

    Re-exec keeps the session.
    """
    second = lab.directory / "second"
    with counted(lab, builds("7.2"), "-qmp", f"unix:{second},server=on,wait=off") as guest:
        with Qmp(second) as holder:
            result = cpr.update(guest.name, builds("11.1.a"), *(["--ignore", "monitor-client"] if ignored else []))
            assert ("monitor-client" in checks(result)) is (cpr.engine == "handover")
            if cpr.engine == "reexec":
                assert result.code == 0, str(result)
                assert holder.execute("query-version")["qemu"]["major"] == 11
            elif ignored:
                assert result.code == 0, str(result)
                with pytest.raises((EOFError, OSError)):
                    holder.execute("query-status")
            else:
                assert result.code == 3, str(result)
                assert holder.execute("query-status")["status"] == "running"
        for path in (guest.qmp, second):
            with Qmp(path) as monitor:
                assert monitor.execute("query-status")["status"] == "running"
                moved = ignored or cpr.engine == "reexec"
                assert monitor.version == builds("11.1.a" if moved else "7.2").version
        guest.check(rounds=0)


def test_a_human_monitor_beside_it(lab: Lab, cpr: Command, builds: Builds) -> None:
    """What somebody types into it meanwhile reaches the guest's QEMU alone, once the guest is there."""
    human = lab.directory / "human"
    extra = ("-chardev", server("hmp", human), "-mon", "chardev=hmp,mode=readline")
    with counted(lab, builds("7.2"), *extra) as guest:
        events = lab.directory / "events"
        events.touch()
        with cpr.start(
            "update", guest.name, "--qemu", builds("11.1.a").binary, "-y", "--json", "--events", events
        ) as run:
            until(lambda: begun(events, "StartNew") or run.poll() is not None)
            with Wire(human) as wire:  # `cont` would run a guest that has no state yet
                wire.send(b"cont\ninfo status\ninfo version\n")
                out, err = run.communicate(timeout=60)
                lab.adopt(json.loads(out)["guests"][0]["pid_after"])
                assert run.returncode == 0, (out, err)
                wire.log.wait(lambda: builds("11.1.a").version.encode() in wire.received, 20)
                assert b"VM status: running" in wire.received
                assert b"inmigrate" not in wire.received
        guest.check(rounds=0)


# -- VNC


def rfb(address: Address) -> bytes:
    with connected(address) as sock:
        return sock.recv(12)


@pytest.mark.parametrize("kind", ["unix", pytest.param("tcp", marks=full)])
def test_vnc_listens_all_the_time(lab: Lab, cpr: Command, builds: Builds, kind: str) -> None:
    address: Address = lab.directory / "vnc" if kind == "unix" else ("127.0.0.1", free_port())
    words = f"unix:{address}" if kind == "unix" else f"127.0.0.1:{free_port() - 5900}"
    if kind == "tcp":
        address = ("127.0.0.1", 5900 + int(words.partition(":")[2]))
    with counted(lab, builds("7.2"), "-vnc", words, "-vga", "std") as guest:
        assert rfb(address).startswith(b"RFB ")
        with Qmp(guest.qmp) as monitor:
            (before,) = monitor.execute("query-vnc-servers")
        with Knocker(address, pause=0.01) as viewer:
            result = cpr.update(guest.name, builds("11.1.a"))
            assert result.code == 0, str(result)
            had = viewer.had
            until(lambda: viewer.had > had + 5)
        assert viewer.missed == []
        assert rfb(address).startswith(b"RFB ")
        with Qmp(guest.qmp) as monitor:
            (after,) = monitor.execute("query-vnc-servers")
        assert (after["id"], after["auth"], after["server"]) == (before["id"], before["auth"], before["server"])
        guest.check(rounds=0)


@full
def test_a_vnc_client_and_a_password(lab: Lab, cpr: Command, builds: Builds) -> None:
    """Both are named before; nobody gets in without the password afterwards."""
    port = free_port()
    with counted(lab, builds("7.2"), "-vnc", f"127.0.0.1:{port - 5900},password=on", "-vga", "std") as guest:
        with Qmp(guest.qmp) as monitor:
            monitor.execute("set_password", protocol="vnc", password="secret")  # noqa: S106
        with connected(("127.0.0.1", port)) as viewer:
            assert viewer.recv(12).startswith(b"RFB ")
            result = cpr.update(guest.name, builds("11.1.a"))
            assert result.code == 0, str(result)
            assert {"vnc-client", "vnc-password"} <= checks(result)
        with connected(("127.0.0.1", port)) as viewer:
            version = viewer.recv(12)
            viewer.sendall(version)
            count = viewer.recv(1)[0]
            assert 2 in viewer.recv(count)  # VNC authentication, and
            viewer.sendall(b"\x02")
            assert len(viewer.recv(16)) == 16  # a challenge: "None" is not among the types
        guest.check(rounds=0)
