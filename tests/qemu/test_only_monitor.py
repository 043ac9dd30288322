"""A manager holds the guest's only QMP monitor: cpr looks and updates all the same, and the manager notices nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from cpr import discover, lend
from cpr.engines import ENGINES, Request
from cpr.engines.relay import HIDDEN_WHILE_LOADING
from cpr.errors import Exit, MonitorHeld
from cpr.linux.process import open_process
from cpr.qemu import clients
from cpr.qemu.options import knowledge_from
from tests.lab.start import marked
from tests.qemu.conftest import Command, qemus_of
from tests.qemu.faults.fault import Fault, Stage
from tests.qemu.managers import Client, Flood
from tests.qemu.parties import Wire, counted, descriptors
from tests.qemu.surveying import start, until
from tests.unit import values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cpr.model import Candidate
    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab
    from tests.qemu.parties import Counted

    Builds = Callable[[str], QemuBuild]

full = pytest.mark.full


@pytest.fixture
def cpr(lab: Lab) -> Command:
    return Command(lab)


@pytest.fixture
def run_directory(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPR_RUN_DIR", str(lab.directory / "run"))


def sockets(pid: int) -> list[tuple[int, str]]:
    return [(n, target) for n, target in descriptors(pid).items() if target.startswith("socket:")]


def checked(cpr: Command, guest: Counted, target: QemuBuild) -> dict[str, Any]:
    """What `cpr check` says of the guest."""
    result = cpr("check", guest.name, "--qemu", target.binary, "--json")
    assert result.code == 0, str(result)
    return result.guest


@pytest.mark.parametrize(
    ("route", "times"), [("7.2 11.1.a", 1), pytest.param("11.1.a 11.1.b", 10, marks=full)]
)
@pytest.mark.timeout(300)
def test_a_manager_that_floods_it(lab: Lab, cpr: Command, builds: Builds, route: str, times: int) -> None:
    keys = route.split()
    with counted(lab, builds(keys[0])) as guest:
        pid = guest.process.pid
        with Flood(guest.qmp) as manager:
            until(lambda: manager.answered > 20)
            for number in range(times):
                new = builds(keys[(number + 1) % len(keys)])
                before = sockets(pid)
                found = checked(cpr, guest, new)
                assert (found["engine"], found["engines"]["reexec"]) == ("reexec", "ok")
                assert [f["check"] for f in found["engines"]["handover"]] == ["monitor-held"]
                assert sockets(pid) == before
                result = cpr.update(guest.name, new)
                assert (result.code, result.guest["pid_after"]) == (0, pid), str(result)
                assert result.guest["engine"] == "reexec"
                answered = manager.answered
                until(lambda: manager.answered > answered + 20 or manager.error is not None)  # noqa: B023 - at once
                manager.check()
        manager.check()
        assert not set(manager.events) & HIDDEN_WHILE_LOADING
        with contextlib.closing(Client(guest.qmp)) as client:
            assert client.ask("query-status")["running"] is True
        assert qemus_of(lab) == [pid]
        guest.check(rounds=0)


@full
def test_it_is_listed_shown_and_refused_by_a_handover(lab: Lab, cpr: Command, builds: Builds) -> None:
    with counted(lab, builds("11.1.a")) as guest, contextlib.closing(Client(guest.qmp)) as client:
        before = sockets(guest.process.pid)
        (listed,) = [g for g in cpr("list", "--json").json["guests"] if g["pid"] == guest.process.pid]
        assert listed["runstate"] == "running"
        shown = cpr("show", guest.name, "--qemu", builds("11.1.b").binary)
        assert f"{guest.qmp}, held by a client" in shown.out
        result = cpr.update(guest.name, builds("11.1.b"), "--engine", "handover")
        assert result.code == Exit.BLOCKED, str(result)
        assert [f["check"] for f in result.guest["findings"] if f["severity"] == "blocker"] == ["monitor-held"]
        assert "--engine reexec" in result.guest["hint"]
        assert sockets(guest.process.pid) == before
        assert client.ask("query-status")["running"] is True
        assert client.saw() == []


@full
@pytest.mark.parametrize("way", ["show", "hide"])
def test_what_the_manager_hears_is_its_choice(lab: Lab, cpr: Command, builds: Builds, way: str) -> None:
    """STOP and RESUME, always one with the other; the last one says that it runs."""
    with counted(lab, builds("10.0")) as guest, contextlib.closing(Client(guest.qmp)) as client:
        result = cpr.update(guest.name, builds("11.1.a"), "--manager-events", way)
        assert result.code == 0, str(result)
        assert client.ask("query-status")["running"] is True
        heard = client.saw()
        pairs = heard.count("STOP")
        assert heard == ["STOP", "RESUME"] * pairs
        assert bool(pairs) is (way == "show")
        client.ask("stop")
        assert client.saw()[len(heard) :] == ["STOP"]


@full
def test_a_paused_guest_stays_paused(lab: Lab, cpr: Command, builds: Builds) -> None:
    with counted(lab, builds("7.2")) as guest, contextlib.closing(Client(guest.qmp)) as client:
        client.ask("stop")
        heard = client.saw()
        result = cpr.update(guest.name, builds("11.1.a"), "--manager-events", "show")
        assert (result.code, result.guest["runstate"]) == (0, "paused"), str(result)
        assert client.ask("query-status")["status"] == "paused"
        assert client.saw() == heard
        client.ask("cont")
        guest.log.wait_ticks(20)


@full
def test_a_session_that_is_not_negotiated_is_left_alone(lab: Lab, cpr: Command, builds: Builds) -> None:
    with counted(lab, builds("11.1.a")) as guest, Wire(guest.qmp) as wire:
        until(lambda: wire.received.endswith(b"\n"))
        result = cpr("check", guest.name, "--json")
        assert result.code == Exit.BLOCKED, str(result)
        ((found,),) = [g["findings"] for g in result.json["guests"]]
        assert found["check"] == "monitor-held"
        assert "negotiated" in found["message"]
        wire.send(b'{"execute": "qmp_capabilities"}')
        until(lambda: wire.received.endswith(b'{"return": {}}\r\n'))


# who dies ------------------------------------------------------------------------------------------------------


LOOKING = """
import os, sys
from cpr import discover, lend
candidate = discover.find(sys.argv[1])
with lend.borrowed(candidate.process, candidate.monitors[0]) as (monitor, _):
    print(monitor.execute("query-status")["status"], flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def looking(pid: int) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A command that borrows the session, and its lender's pid."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOOKING, str(pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() in ("running", "prelaunch")
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            (lender,) = map(int, file.read().split())
        try:
            yield process, lender
        finally:
            process.kill()


def candidate(pid: int) -> Candidate:
    return discover.find(str(pid))


@full
@pytest.mark.usefixtures("run_directory")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_look_that_is_killed(lab: Lab, builds: Builds, number: signal.Signals) -> None:
    """The lender gives the session back."""
    orphan = start(lab, builds("11.1.a"), "-S")
    with contextlib.closing(Client(lab.directory / "guest.qmp")) as client:
        before = sockets(orphan.pid)
        with looking(orphan.pid) as (command, lender), open_process(lender) as alive:
            assert client.ask("query-status")["status"] == "prelaunch"
            assert sockets(orphan.pid) != before
            os.kill(lender, signal.SIGTERM)
            command.send_signal(number)
            assert alive.wait_dead(10)
        assert sockets(orphan.pid) == before
        assert client.ask("query-status")["status"] == "prelaunch"


@full
@pytest.mark.usefixtures("run_directory")
def test_a_lender_that_is_killed(lab: Lab, builds: Builds) -> None:
    """Its command, or whoever looks next, gives the session back: that it is owed is seen from QEMU alone."""
    orphan = start(lab, builds("11.1.a"), "-S")
    with contextlib.closing(Client(lab.directory / "guest.qmp")) as client:
        before = sockets(orphan.pid)
        with looking(orphan.pid) as (command, lender), open_process(lender) as alive:
            alive.kill()
            assert alive.wait_dead(10)
            command.kill()
        client.send({"execute": "query-status", "id": "mine"})
        facts = lend.survey(candidate(orphan.pid))
        assert client.message()["id"] == "mine"
        assert facts.monitor_held
        held = clients.holders(orphan.pid, candidate(orphan.pid).monitors[0])
        assert [c.client for c in facts.chardevs if c.monitor == "control"] == held
        assert len(sockets(orphan.pid)) == len(before)


@full
@pytest.mark.usefixtures("run_directory")
def test_facts_are_the_same_as_without_a_client(lab: Lab, builds: Builds) -> None:
    orphan = start(lab, builds("11.1.a"), "-S")
    free = lend.survey(candidate(orphan.pid))
    with contextlib.closing(Client(lab.directory / "guest.qmp")):
        until(lambda: clients.holders(orphan.pid, candidate(orphan.pid).monitors[0]))
        held = lend.survey(candidate(orphan.pid))
        again = lend.survey(candidate(orphan.pid))
    assert (free.monitor_held, held.monitor_held) == (False, True)
    assert held.open_files == again.open_files
    assert len(held.open_files) == len(free.open_files)
    for name in ("argv", "ram", "devices", "monitor", "runstate", "capabilities", "parameters", "vcpus"):
        assert getattr(held, name) == getattr(free, name), name


@full
@pytest.mark.usefixtures("run_directory")
def test_two_look_at_once(lab: Lab, builds: Builds) -> None:
    """One after the other."""
    orphan = start(lab, builds("11.1.a"), "-S")
    with contextlib.closing(Client(lab.directory / "guest.qmp")) as client:
        with looking(orphan.pid) as (command, _):
            began = time.monotonic()
            second = subprocess.Popen(
                [sys.executable, "-c", LOOKING, str(orphan.pid)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
            )
            with second:
                time.sleep(1.0)
                assert command.stdin is not None
                command.stdin.close()
                assert second.communicate(timeout=20)[0].strip() == "prelaunch"
                assert time.monotonic() - began > 1.0
        assert client.ask("query-status")["status"] == "prelaunch"


@full
@pytest.mark.usefixtures("run_directory")
def test_a_process_that_is_traced_already(lab: Lab, builds: Builds) -> None:
    orphan = start(lab, builds("11.1.a"), "-S")
    tracing = f"""
import sys
from cpr.linux import ptrace
ptrace.seize({orphan.pid}, 0)
print("there", flush=True)
sys.stdin.read()
"""
    with contextlib.closing(Client(lab.directory / "guest.qmp")):
        process = subprocess.Popen(
            [sys.executable, "-c", tracing], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "there"
            with pytest.raises(MonitorHeld, match="is traced by pid") as raised:
                lend.survey(candidate(orphan.pid))
            process.kill()
    assert "debugger" in raised.value.hint


# faults of an update -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Managed:
    """A guest, its manager, and the command with faults planted in its keeper."""

    lab: Lab
    cpr: Command
    guest: Counted
    manager: Client

    def update(self, new: QemuBuild, *faults: Fault, words: tuple[str, ...] = ()) -> Any:
        with Stage(self.lab.directory / "stage") as stage:
            result = self.cpr.update(self.guest.name, new, *words, **stage.environment(faults))
            for _ in faults:
                stage.wait(0.1)
        return result

    def well(self, heard: list[str] | None = None) -> None:
        """The manager's session lives, and the guest counts; nobody is left."""
        self.manager.sock.settimeout(20)
        assert self.manager.ask("query-status")["running"] is True
        assert self.manager.saw() == (heard or [])
        self.guest.log.wait_ticks(20)
        self.guest.check(rounds=0)
        (pid,) = qemus_of(self.lab)
        until(lambda: list(marked(str(self.lab.directory))) == [pid], 5)


@pytest.fixture
def managed(lab: Lab, cpr: Command, builds: Builds) -> Iterator[Managed]:
    with counted(lab, builds("7.2")) as guest, contextlib.closing(Client(guest.qmp)) as manager:
        yield Managed(lab, cpr, guest, manager)


STEPS = [
    *("BorrowControl", "TakeDescriptors", "OccupyMonitors", "PrepareExec", "RehearseState", "PrepareSave", "MakeRoom"),
    *("CompareChains", "QuietenMonitors", "SaveState", "CompareChains", "ExecNew", "LoadState", "CompareChains"),
    *("KeepClients", "Continue", "GiveMonitorsBack", "LetClientsIn", "Settle", "Verify"),
]
EXEC, COMMIT = STEPS.index("ExecNew"), STEPS.index("Continue")
def moments(last: int) -> list[Any]:
    return [
        pytest.param(i, state, id=f"{name}-{state}", marks=full)
        for i, name in enumerate(STEPS[:last])
        for state in ("doing", "done")
    ]


@pytest.mark.parametrize(("index", "state"), moments(COMMIT))
def test_it_fails(managed: Managed, builds: Builds, index: int, state: str) -> None:
    """The client has its session, with the old program: also where that had to be started again."""
    result = managed.update(builds("11.1.a"), Fault(at=f"step:{index}:{state}", do="fail"))
    assert result.code in (Exit.ROLLED_BACK, Exit.FAILED), str(result)
    assert "lost its session" not in str(result.guest["notes"])
    assert result.guest["runstate"] == ("running" if (index, state) > (0, "doing") else None)  # nobody was asked yet
    same = result.guest["pid_after"] == managed.guest.process.pid
    assert same is ((index, state) < (EXEC, "done"))
    managed.well()


@pytest.mark.parametrize(("index", "state"), moments(len(STEPS)))
def test_the_keeper_is_killed(managed: Managed, builds: Builds, index: int, state: str) -> None:
    """Its command goes back where the old program still runs, and forward where the new one does."""
    result = managed.update(builds("11.1.a"), Fault(at=f"step:{index}:{state}", do="kill_keeper"))
    forward = (index, state) >= (EXEC, "done")
    assert result.code == (Exit.OK if forward else Exit.ROLLED_BACK), str(result)
    assert result.guest["pid_after"] == managed.guest.process.pid
    managed.well()


@full
@pytest.mark.parametrize("at", ["sent:cont:new", f"step:{EXEC}:undone"])
def test_the_keeper_is_killed_on_the_way_back(managed: Managed, builds: Builds, at: str) -> None:
    """The old program, started again, has the client's connection, and the command brings the two together."""
    result = managed.update(
        builds("11.1.a"),
        Fault(at=f"step:{STEPS.index('LoadState')}:done", do="fail"),
        Fault(at=at, do="kill_keeper"),
    )
    assert (result.code, result.guest["runstate"]) == (Exit.ROLLED_BACK, "running"), str(result)
    assert result.guest["pid_after"] != managed.guest.process.pid
    managed.well()


@full
def test_somebody_waits_behind_the_manager(managed: Managed, builds: Builds) -> None:
    """The new QEMU would serve them before the commit."""
    with Wire(managed.guest.qmp):
        result = managed.cpr.update(managed.guest.name, builds("11.1.a"))
    assert result.code == Exit.FAILED, str(result)
    assert "others wait" in result.guest["error"]
    managed.well()
    assert managed.cpr.update(managed.guest.name, builds("11.1.a")).code == 0
    managed.well()


@pytest.mark.parametrize("at", ["SaveState-done", "LoadState-done"])
@full
def test_the_keeper_is_killed_and_the_manager_hears_of_the_pause(managed: Managed, builds: Builds, at: str) -> None:
    name, state = at.split("-")
    fault = Fault(at=f"step:{STEPS.index(name)}:{state}", do="kill_keeper")
    managed.update(builds("11.1.a"), fault, words=("--manager-events", "show"))
    assert managed.manager.ask("query-status")["running"] is True
    heard = managed.manager.saw()
    assert heard.count("STOP") > 0
    assert heard == ["STOP", "RESUME"] * heard.count("STOP")
    managed.well(heard)


@full
@pytest.mark.parametrize("name", ["QuietenMonitors", "LoadState", "GiveMonitorsBack"])
def test_both_are_killed(managed: Managed, builds: Builds, name: str) -> None:
    """`cpr recover` gives the session back."""
    call = ("update", managed.guest.name, "--qemu", builds("11.1.a").binary, "-y", "--json")
    with Stage(managed.lab.directory / "stage") as stage:
        fault = Fault(at=f"step:{STEPS.index(name)}:done", do="wait")
        with managed.cpr.start(*call, **stage.environment([fault])) as command:
            keeper = stage.wait().keeper
            command.kill()
            with open_process(keeper) as process:
                process.kill()
                assert process.wait_dead(10)
    result = managed.cpr("recover", "--json")
    assert result.code in (Exit.OK, Exit.ROLLED_BACK), str(result)
    managed.well()
    assert managed.cpr("recover", "--json").json["guests"] == []


def test_the_plan_has_these_steps() -> None:
    guest = replace(values.guest(), monitor_held=True, ram=())
    target = replace(values.target(), options=knowledge_from("", []))
    plan = ENGINES["reexec"].steps(guest, target, Request(run_id="20261120T101500-3f2a"))
    assert [step.id for step in plan] == STEPS
