"""VNC displays that serve browsers: their websocket listener is the same after an update in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from cpr.errors import Exit
from cpr.model import Status
from cpr.qemu.clients import descriptor_targets
from tests.qemu.conftest import Command
from tests.qemu.faults.fault import Fault
from tests.qemu.faults.moments import Script
from tests.qemu.faults.subject import Victim
from tests.qemu.moving import backend, untouched
from tests.qemu.parties import Knocker, Qmp, connected, counted, free_port
from tests.qemu.surveying import until
from tests.qemu.test_connections import rfb

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab
    from tests.qemu.faults.fault import Stage

    Builds = Callable[[str], QemuBuild]

SCRIPT = Script("reexec")
full = pytest.mark.full
REQUEST = (
    b"GET / HTTP/1.1\r\nHost: here\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Protocol: binary\r\n\r\n"
)


@pytest.fixture
def cpr(lab: Lab) -> Command:
    return Command(lab, "reexec")


def browse(address: tuple[str, int]) -> bytes:
    """The RFB version that a browser gets, through the websocket; b"" if there was no upgrade."""
    with connected(address) as sock:
        sock.settimeout(20)
        sock.sendall(REQUEST)
        said = b""
        while b"RFB " not in said and (more := sock.recv(4096)):
            said += more
    head, _, rest = said.partition(b"\r\n\r\n")
    return rest[2:14] if head.startswith(b"HTTP/1.1 101") and rest.startswith(b"\x82") else b""


def display(guest: Any) -> dict[str, Any]:
    """As QEMU describes it, without its clients."""
    with Qmp(guest.qmp) as monitor:
        (found,) = monitor.execute("query-vnc-servers")
    return {key: found[key] for key in ("id", "auth", "server")}


def listeners(pid: int, *ports: int) -> dict[str, int]:
    """{address: inode} of the process's listeners at these ports."""
    ours = {target for target in descriptor_targets(pid).values() if target.startswith("socket:[")}
    found = {}
    for table in ("tcp", "tcp6"):
        with open(f"/proc/{pid}/net/{table}") as file:
            rows = [line.split() for line in file.readlines()[1:]]
        for row in rows:
            if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) in ports and f"socket:[{row[9]}]" in ours:
                found[row[1]] = int(row[9])
    return found


HOSTS = ["127.0.0.1", pytest.param("localhost", marks=full)]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("route", ["7.2 11.1.a", pytest.param("11.1.a 11.1.b 11.1.a", marks=full)])
def test_browsers_find_it_all_the_time(lab: Lab, cpr: Command, builds: Builds, route: str, host: str) -> None:
    """The same listeners at the same addresses, nobody refused, and those who came in the pause are served."""
    first, *rest = route.split()
    plain, web = free_port(), free_port()
    words = f"{host}:{plain - 5900},websocket={web}"
    with counted(lab, builds(first), "-vnc", words, "-vga", "std") as guest:
        pid = guest.process.pid
        before, there = display(guest), listeners(pid, plain, web)
        assert len(there) == (2 if host == "127.0.0.1" else len(before["server"]))
        assert browse(("127.0.0.1", web)).startswith(b"RFB ")
        for key in rest:
            with (
                Knocker(("127.0.0.1", plain), pause=0.01) as viewer,
                Knocker(("127.0.0.1", web), pause=0.01) as browser,
            ):
                result = cpr.update(guest.name, builds(key))
                assert (result.code, result.guest["pid_after"]) == (0, pid), str(result)
                had = browser.had
                until(lambda: browser.had > had + 5)  # noqa: B023 - at once
            assert viewer.missed == browser.missed == []
            assert browse(("127.0.0.1", web)).startswith(b"RFB ")
            assert rfb(("127.0.0.1", plain)).startswith(b"RFB ")
            assert display(guest) == before
            assert listeners(pid, plain, web) == there
            held = [t for t in descriptor_targets(pid).values() if t in {f"socket:[{i}]" for i in there.values()}]
            assert len(held) == len(there), "a second descriptor of a listener was left"
        guest.check(rounds=0)


@full
def test_another_process_cannot_have_it(lab: Lab, cpr: Command, builds: Builds) -> None:
    """Handover is refused, and says what keeps it."""
    plain, web = free_port(), free_port()
    guest = lab.counting(
        builds("7.2"), "-vnc", f"127.0.0.1:{plain - 5900},websocket={web}", backend=backend(builds("7.2"), lab)
    )
    with untouched(lab, guest):
        result = cpr.update(guest.pid, builds("11.1.a"), "--engine", "handover")
    assert result.code == Exit.BLOCKED, str(result)
    (found,) = (f for f in result.guest["findings"] if f["severity"] == "blocker")
    assert (found["check"], found["hint"]) == ("vnc-websocket", "--engine reexec keeps it")


def finished_by_recover(victim: Victim, before: Any, cpr: Command, stage: Stage) -> None:
    """Command and keeper are killed when the new QEMU is to take the state, and `cpr recover` goes forward."""
    victim.kill_both(stage, Fault(at=SCRIPT.at("LoadState", "doing"), do="wait"))
    result = cpr("recover", "--json")
    assert (result.code, result.guest["status"]) == (Exit.OK, "updated"), str(result)
    victim.in_the_new(before)


@pytest.mark.parametrize("faulty", ["fails", pytest.param("dies", marks=full)])
def test_what_goes_wrong(lab: Lab, cpr: Command, stage: Stage, faulty: str) -> None:
    """Browsers are served after the way back, and where cpr dies and is recovered."""
    plain, web = free_port(), free_port()
    words = ("-vnc", f"127.0.0.1:{plain - 5900},websocket={web}", "-vga", "std")
    victim = Victim.start(lab, engine="reexec", everything=False, words=words)
    before = victim.before()
    if faulty == "fails":
        outcome = victim.play(Fault(at=SCRIPT.at("LoadState", "done"), do="fail"))
        assert outcome.status == Status.ROLLED_BACK, outcome
        victim.in_the_old_again(before)
    else:
        finished_by_recover(victim, before, cpr, stage)
    assert browse(("127.0.0.1", web)).startswith(b"RFB ")
    assert rfb(("127.0.0.1", plain)).startswith(b"RFB ")
    victim.can_be_updated()
