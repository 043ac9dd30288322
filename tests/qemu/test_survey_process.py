"""What the survey says of a real QEMU's process: helpers of async teardown, seccomp filters, its pid file, tracing."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cpr import discover, plan, survey
from cpr.checks import run_checks
from cpr.engines import fit
from cpr.linux import proc
from tests.qemu.surveying import KEYS, bare, start, surveyed, until
from tests.unit.checks import facts
from tests.unit.fake_world import FakeEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab

TEARDOWN = {"7.2": ("-async-teardown",)}
SEIZE = """
import ctypes, sys, time
libc = ctypes.CDLL(None)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
print(libc.ptrace(0x4206, int(sys.argv[1]), None, None), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("key", KEYS)
def test_a_process_to_be_kept(lab: Lab, builds: Callable[[str], QemuBuild], key: str) -> None:
    """One helper for each QEMU that asks for it; the filter of its sandbox; the pid file is its own."""
    teardown = TEARDOWN.get(key, ("-run-with", "async-teardown=on"))
    orphan = start(lab, builds(key), *teardown, "-sandbox", "on,spawn=deny", "-pidfile", "pid")
    guest = surveyed(orphan)
    (helper,) = guest.teardown_helpers
    assert proc.read_status(helper).name == f"cleanup/{orphan.pid}"[:15]
    assert guest.seccomp_filters == proc.read_status(orphan.pid).seccomp_filters
    assert guest.seccomp == 2
    assert guest.untraceable is None
    assert guest.pidfile_holds_pid
    assert "pid file" in fit.pid_known_to(guest)
    (lab.directory / "pid").write_text("1\n")
    assert fit.pid_known_to(surveyed(orphan)) == ""
    orphan.kill()
    until(lambda: not os.path.exists(f"/proc/{helper}"))


def test_a_plain_one(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    guest = surveyed(start(lab, builds("10.0")))
    assert (guest.teardown_helpers, guest.seccomp_filters, guest.pidfile_holds_pid) == ((), 0, False)


@contextlib.contextmanager
def traced(pid: int) -> Iterator[int]:
    """Somebody traces it: the pid of who does."""
    with subprocess.Popen([sys.executable, "-c", SEIZE, str(pid)], stdout=subprocess.PIPE) as tracer:
        try:
            assert tracer.stdout is not None
            assert tracer.stdout.readline() == b"0\n"
            yield tracer.pid
        finally:
            tracer.kill()


def test_one_that_is_traced(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    """A debugger is at it: told, and handover is what is left."""
    orphan = start(lab, builds("10.0"))
    with traced(orphan.pid) as tracer:
        guest = surveyed(orphan)
    assert guest.untraceable is not None
    assert str(tracer) in guest.untraceable.why
    assert [f.check for f in run_checks(guest, facts.host(), None, None) if f.engines == ("reexec",)] == ["ptrace"]
    assert surveyed(orphan).untraceable is None


def test_auto_takes_re_exec_under_a_parent_that_waits(lab: Lab, builds: Callable[[str], QemuBuild]) -> None:
    """The facts of a real guest; the engines only have the names."""
    command = [*bare(builds("10.0")), "-qmp", f"unix:{lab.directory}/p.qmp,server=on,wait=off"]
    with subprocess.Popen(command, env={**os.environ, **lab.environment}) as child:
        try:
            until(lambda: any(c.process.pid == child.pid and c.monitors for c in discover.candidates()))
            guest = survey.survey(discover.candidate(child.pid))
        finally:
            child.kill()
    found = [f for f in run_checks(guest, facts.host(), facts.target(), None) if f.check == "supervised"]
    engines = {"handover": FakeEngine(), "reexec": FakeEngine("reexec", preferred=fit.pid_known_to(guest))}
    made = plan.make(guest, facts.host(), facts.target(), None, found, engines=engines)
    assert (made.engine, made.passed_over) == ("reexec", (("handover", "supervised"),))
    assert made.reason.startswith(f"pid {child.pid} is watched by its parent, ")
    assert str(os.getpid()) in made.reason
