"""Threads of vCPUs and I/O threads after a re-exec: their ids, and where they run."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from tests.qemu.conftest import Command
from tests.qemu.parties import Counted, Qmp, counted, unique

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab

    Builds = Callable[[str], QemuBuild]

THREADS = ("-smp", "2", "-object", "iothread,id=io0")
full = pytest.mark.full

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="an id is given with CAP_CHECKPOINT_RESTORE")


@pytest.fixture
def cpr(lab: Lab) -> Command:
    return Command(lab, "reexec")


def named(lab: Lab) -> tuple[str, str]:
    """As libvirt says it."""
    return "-name", f"guest={unique(lab)},debug-threads=on"


def ids(guest: Counted) -> dict[str, int]:
    with Qmp(guest.qmp) as monitor:
        found = {f"vCPU {c['cpu-index']}": c["thread-id"] for c in monitor.execute("query-cpus-fast")}
        return found | {f"iothread {t['id']}": t["thread-id"] for t in monitor.execute("query-iothreads")}


def placed(tid: int) -> tuple[object, ...]:
    return os.sched_getaffinity(tid), os.sched_getscheduler(tid), os.getpriority(os.PRIO_PROCESS, tid)


def told(notes: list[str]) -> list[str]:
    return [note for note in notes if "is now" in note]


@pytest.mark.parametrize("route", ["7.2 11.1.a", pytest.param("7.2 10.0 11.1.a 11.1.b 10.0 7.2", marks=full)])
def test_ids_are_kept_and_the_threads_run_where_they_ran(lab: Lab, cpr: Command, builds: Builds, route: str) -> None:
    """Another process may be given an id in between: then that one is told, and no other."""
    first, *rest = route.split()
    cpus = sorted(os.sched_getaffinity(0))
    with counted(lab, builds(first), *THREADS, *named(lab)) as guest:
        before = ids(guest)
        for number, tid in enumerate(before.values()):
            os.sched_setaffinity(tid, {cpus[number % len(cpus)]})
            os.setpriority(os.PRIO_PROCESS, tid, 19 if number == 1 else os.getpriority(os.PRIO_PROCESS, tid))
        os.sched_setscheduler(before["iothread io0"], os.SCHED_BATCH, os.sched_param(0))
        places = {name: placed(tid) for name, tid in before.items()}
        kept = 0
        for key in rest:
            result = cpr.update(guest.name, builds(key))
            assert result.code == 0, str(result)
            after = ids(guest)
            words = [f"{n}: thread {tid} is now {after[n]}" for n, tid in before.items() if after[n] != tid]
            assert "; ".join(told(result.guest["notes"])).partition(";")[0] == ", ".join(words)
            assert {name: placed(tid) for name, tid in after.items()} == places
            kept += len(before) - len(words)
            before = after
        assert kept > len(rest)
        guest.check(rounds=0)


@pytest.mark.parametrize("why", ["capability", pytest.param("names", marks=full)])
def test_ids_that_cannot_be_kept_are_told(lab: Lab, cpr: Command, builds: Builds, why: str) -> None:
    with counted(lab, builds("7.2"), *THREADS, *(named(lab) if why == "capability" else ())) as guest:
        before = ids(guest)
        if why == "capability":
            cpr.prefix = ("setpriv", "--bounding-set=-sys_admin,-checkpoint_restore")
        result = cpr.update(guest.name, builds("10.0"))
        assert result.code == 0, str(result)
        after = ids(guest)
        (words,) = told(result.guest["notes"])
        for name in ("vCPU 0", "vCPU 1"):
            assert before[name] != after[name]
            assert f"{name}: thread {before[name]} is now {after[name]}" in words
        assert "libvirt must be restarted" in words
        guest.check(rounds=0)


@full
def test_processes_begin_by_the_hundred(lab: Lab, cpr: Command, builds: Builds) -> None:
    """Ids are lost to others then; the update is as good as ever, and what is told is true."""
    ended = threading.Event()

    def fork() -> None:
        while not ended.is_set():
            if (pid := os.posix_spawn("/bin/true", ["true"], {})) > 0:
                os.waitpid(pid, 0)

    with counted(lab, builds("7.2"), *THREADS, *named(lab)) as guest:
        storm = threading.Thread(target=fork)
        storm.start()
        try:
            for key in ("11.1.a", "10.0"):
                before = ids(guest)
                result = cpr.update(guest.name, builds(key))
                assert result.code == 0, str(result)
                after = ids(guest)
                assert bool(told(result.guest["notes"])) is (after != before)
        finally:
            ended.set()
            storm.join()
        guest.check(rounds=0)
