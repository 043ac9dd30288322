"""The use cases with a fake world: choosing guests, several at once, outcomes and exit codes."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from cpr import app
from cpr.app.update import worst
from cpr.errors import BinaryUnusable, Busy, Exit, MonitorError, MonitorHeld, NoSuchGuest, PrivilegeError, UsageError
from cpr.model import Backing, Outcome, Status, Storage
from cpr.progress import Silent
from tests.unit import values
from tests.unit.checks import facts
from tests.unit.fake_world import FakeEngine, FakeHost

VOLATILE = (replace(values.ram(), shared=False, backing=Backing.ANONYMOUS),)
UP_TO_DATE = replace(values.binary("11.1.3"), inode=200)


class Listener(Silent):
    def __init__(self) -> None:
        self.heard: list[tuple[str, dict[str, Any]]] = []

    def event(self, guest: str, event: Any) -> None:
        self.heard.append((guest, dict(event)))


def update(
    host: FakeHost, *names: str, progress: Any = None, stop: app.Stop | None = None, **choices: Any
) -> app.Update:
    prepared = app.prepare(names, app.Choices(**choices), host.world())
    return app.perform(prepared, progress or Silent(), stop or app.Stop(), host.world())


def statuses(result: app.Update) -> dict[str, Status]:
    return {o.guest: o.status for o in result.outcomes}


def test_an_update_of_one() -> None:
    host, listener = FakeHost(), Listener()
    host.add("web1")
    result = update(host, "web1", progress=listener)
    [outcome] = result.outcomes
    assert (outcome.status, outcome.pid_after, result.exit_code) == (Status.UPDATED, 5242, Exit.OK)
    assert host.rehearsed == ["web1"]
    kinds = [event["event"] for _, event in listener.heard]
    assert kinds == ["step"] * 6 + ["blackout", "outcome"]


def test_run_and_ignored_reach_the_engine() -> None:
    host = FakeHost()
    host.add("web1", chains=())
    update(host, "web1", ignore=("throttle-set",))
    [request] = host.engines["handover"].requests
    assert (request.run_id, request.ignored) == ("20261120T101500-3f2a", ("throttle-set",))


def test_without_a_name_every_outdated_guest() -> None:
    host = FakeHost()
    host.add("old")
    host.add("new", binary=UP_TO_DATE)
    result = update(host)
    assert statuses(result) == {"old": Status.UPDATED, "new": Status.UNCHANGED}
    assert result.exit_code is Exit.OK


def test_a_named_guest_is_updated_to_the_same_binary() -> None:
    host = FakeHost()
    host.add("new", binary=UP_TO_DATE)
    assert statuses(update(host, "new")) == {"new": Status.UPDATED}


def test_a_guest_that_another_run_has_is_left_alone() -> None:
    host = FakeHost()
    host.add("a")
    host.add("b")
    host.busy[4242] = Busy("run 1 (pid 7) is working on this guest", {"run": "1", "pid": 7}, hint="wait")
    result = update(host, "a", "b")
    assert statuses(result) == {"a": Status.BUSY, "b": Status.UPDATED}
    assert (result.exit_code, result.outcomes[0].hint) == (Exit.BUSY, "wait")
    assert host.rehearsed == ["b"]


def test_one_blocked_guest_does_not_stop_the_others() -> None:
    host = FakeHost()
    for name in ("a", "b", "c"):
        host.add(name, **({"ram": VOLATILE} if name == "b" else {}))
    result = update(host, jobs=2)
    assert statuses(result) == {"a": Status.UPDATED, "b": Status.BLOCKED, "c": Status.UPDATED}
    assert result.exit_code is Exit.BLOCKED
    blocked = result.outcomes[1]
    assert [f.check for f in blocked.findings] == ["ram-volatile"]
    assert "not touched" in blocked.where


def test_blocked_guests_may_be_skipped() -> None:
    host = FakeHost()
    host.add("a")
    host.add("b", ram=VOLATILE)
    result = update(host, skip_blocked=True)
    assert statuses(result) == {"a": Status.UPDATED, "b": Status.SKIPPED}
    assert result.exit_code is Exit.OK


def test_the_worst_outcome_decides() -> None:
    host = FakeHost(endings={"b": Exit.ROLLED_BACK, "c": Exit.DIFFERS})
    for name in ("a", "b", "c", "d"):
        host.add(name, **({"ram": VOLATILE} if name == "d" else {}))
    assert update(host).exit_code is Exit.DIFFERS


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([], 0),
        ([0, 0], 0),
        ([0, 3], 3),
        ([3, 6], 6),
        ([6, 8], 8),
        ([8, 7], 7),
        ([3, 1], 1),
        ([0, 75], 75),
        ([6, 130], 130),
        ([130, 143], 143),
        ([7, 130], 7),
    ],
)
def test_worst(codes: list[int], expected: int) -> None:
    assert worst(map(Exit, codes)) == expected


def test_a_name_that_nobody_has_stops_everything() -> None:
    host = FakeHost()
    host.add("a")
    with pytest.raises(NoSuchGuest):
        update(host, "a", "nobody")
    assert host.keepers == []


def test_a_guest_named_twice_is_updated_once() -> None:
    host = FakeHost()
    host.add("a")
    update(host, "a", "a")
    assert len(host.keepers) == 1


def test_the_new_qemu_is_asked_once() -> None:
    host = FakeHost()
    for name in "abc":
        host.add(name)
    update(host, jobs=3, qemu="/opt/qemu/bin/qemu-system-x86_64", qemu_options=("-d", "trace"))
    assert host.asked == [("/opt/qemu/bin/qemu-system-x86_64", ("-d", "trace"))]


@pytest.mark.parametrize(
    ("error", "check", "code"),
    [
        (MonitorHeld("/run/q", "no greeting"), "monitor-held", Exit.BLOCKED),
        (MonitorError("/run/q", "cannot connect"), "no-monitor", Exit.BLOCKED),
        (PrivilegeError("CAP_SYS_PTRACE is missing", ability="CAP_SYS_PTRACE"), "", Exit.PRIVILEGES),
    ],
)
def test_a_survey_that_fails(error: Any, check: str, code: Exit) -> None:
    host = FakeHost()
    host.guests["a"] = error
    result = update(host, "a")
    assert result.exit_code is code
    assert [f.check for f in result.outcomes[0].findings] == ([check] if check else [])


def test_a_monitor_that_only_others_may_reach() -> None:
    host = FakeHost()
    host.guests["a"] = MonitorError("/run/q", "cannot connect: Permission denied")
    candidate = replace(host.candidates()[0], unreadable=("/proc/4242/fd",))
    world = replace(host.world(), find=lambda _: candidate)
    [examined] = app.check(["a"], app.Choices(), world)
    assert (examined.exit_code, [f.check for f in examined.findings]) == (Exit.PRIVILEGES, ["privileges"])
    assert "/proc/4242/fd" in examined.findings[0].message


def test_a_binary_that_does_not_answer() -> None:
    host = FakeHost(target=BinaryUnusable("/opt/qemu", "no such program"))
    host.add("a")
    assert update(host, "a").exit_code is Exit.NOT_FOUND


def test_no_binary_installed() -> None:
    host = FakeHost()
    host.add("a", installed=None)
    [outcome] = update(host, "a").outcomes
    assert (outcome.exit_code, "--qemu" in outcome.hint) == (Exit.NOT_FOUND, True)


def test_missing_privileges_have_their_own_exit_code() -> None:
    host = FakeHost()
    host.add("a", unreadable=("/proc/4242/fd",))
    assert update(host, "a").exit_code is Exit.PRIVILEGES


def test_what_cannot_be_meant_is_no_matter_of_one_guest() -> None:
    host = FakeHost()
    host.add("a")
    for choices in ({"ignore": ("ram-volatile",)}, {"engine": "copy"}, {"engine": "x"}, {"ignore": ("x",)}):
        with pytest.raises(UsageError):
            update(host, "a", **choices)


def test_a_keeper_that_cannot_be_started() -> None:
    host = FakeHost()
    host.add("a")

    def start(*_: object) -> Any:
        raise OSError(11, "Resource temporarily unavailable")

    world = replace(host.world(), start=start)
    result = app.perform(app.prepare(["a"], app.Choices(), world), Silent(), app.Stop(), world)
    assert (result.exit_code, "temporarily" in result.outcomes[0].error) == (Exit.FAILED, True)


@pytest.mark.parametrize("code", [Exit.INTERRUPTED, Exit.TERMINATED])
def test_an_interrupt_reaches_every_keeper(code: Exit) -> None:
    host, stop = FakeHost(waiting=True), app.Stop()
    host.add("a")
    host.add("b")

    def interrupt() -> None:
        host.started.wait(5)
        stop.request(code)
        stop.request(Exit.NEEDS_ATTENTION)  # the first one counts

    thread = threading.Thread(target=interrupt)
    thread.start()
    result = update(host, jobs=2, stop=stop)
    thread.join()
    assert result.exit_code is code
    assert {o.exit_code for o in result.outcomes} == {int(code)}


def test_after_an_interrupt_nothing_is_begun() -> None:
    host, stop = FakeHost(), app.Stop()
    host.add("a")
    stop.request(Exit.INTERRUPTED)
    [outcome] = update(host, "a", stop=stop).outcomes
    assert (outcome.exit_code, host.keepers) == (Exit.INTERRUPTED, [])
    assert "not touched" in outcome.where


def test_a_dry_run_has_the_exit_code_of_the_real_one() -> None:
    host = FakeHost()
    host.add("a")
    host.add("b", ram=VOLATILE)
    world = host.world()
    assert app.prepare(["a"], app.Choices(), world).exit_code is Exit.OK
    assert app.prepare(["a", "b"], app.Choices(), world).exit_code is Exit.BLOCKED
    assert app.prepare(["a", "b"], app.Choices(skip_blocked=True), world).exit_code is Exit.OK
    assert host.keepers == []


def test_list_rehearses_nothing_and_judges_every_engine() -> None:
    host = FakeHost(engines={"handover": FakeEngine(), "other": FakeEngine("other")})
    host.add("a")
    host.guests["b"] = MonitorHeld("/run/q", "no greeting")
    first, second = app.list_guests(host.world())
    assert (first.outdated, first.plan and first.plan.engine) == (True, "handover")
    assert [name for name, _ in first.engines] == ["handover", "other"]
    assert (second.guest, second.outdated) == (None, None)
    assert host.rehearsed == []


def test_info() -> None:
    host = FakeHost()
    host.add("shm")
    on_disk = Storage(kind=Backing.DISK_FILE, path="/vm/ram", filesystem="ext4", disks=("sda",))
    host.add("disk", ram=(replace(values.ram(), backing=Backing.DISK_FILE, storage=on_disk),))
    host.add("plain", ram=VOLATILE)
    modes = {name: app.info(name, app.Choices(), host.world()) for name in host.guests}
    assert {name: (m.restart, m.kept, m.can_reboot) for name, m in modes.items()} == {
        "shm": (("handover",), False, False),
        "disk": (("handover",), True, True),
        "plain": ((), False, False),
    }
    assert "sda" in modes["disk"].words
    assert "ram0: a memfd" in modes["shm"].words
    assert [f.check for f in modes["shm"].reboot.blockers] == ["ram-volatile-over-kexec"]
    assert host.rehearsed == []


def test_check_and_show() -> None:
    host = FakeHost()
    host.add("a", jobs=("backup j0",))
    [examined] = app.check([], app.Choices(), host.world())
    assert (examined.exit_code, [f.check for f in examined.blockers]) == (Exit.BLOCKED, ["busy-job"])
    assert app.show("a", app.Choices(), host.world()).candidate.name == "a"


def test_an_outcome_of_an_untouched_guest_tells_where_it_is() -> None:
    host = FakeHost()
    host.add("new", binary=UP_TO_DATE)
    [outcome] = update(host).outcomes
    assert isinstance(outcome, Outcome)
    assert outcome.pid_before == outcome.pid_after == 4242
    assert facts.guest().uuid == outcome.uuid
