"""Who needs the pid to stay, and what is said of it."""

from __future__ import annotations

import pytest

from cpr.engines import fit
from cpr.model import Supervisor
from tests.unit.checks.facts import guest


@pytest.mark.parametrize(
    ("kind", "who", "words"),
    [
        ("systemd", "vm.service", "systemd (vm.service)"),
        ("libvirt", "libvirt", "libvirt"),
        ("container", "the container whose first process it is", "the container whose first process it is"),
        ("parent", "bash (pid 7)", "its parent, bash (pid 7)"),
        ("something", "", "something"),
    ],
)
def test_a_supervisor(kind: str, who: str, words: str) -> None:
    watched = guest(supervisors=(Supervisor(kind=kind, who=who),))
    assert fit.pid_known_to(watched) == f"pid 4242 is watched by {words}: re-exec keeps the pid"


def test_all_supervisors_are_named() -> None:
    two = (Supervisor(kind="libvirt", who="libvirt"), Supervisor(kind="parent", who="sh (pid 7)"))
    assert "libvirt and its parent, sh (pid 7)" in fit.pid_known_to(guest(supervisors=two, pidfile="/run/vm.pid"))


def test_a_pid_file_counts_where_it_has_the_pid() -> None:
    assert "pid file /run/vm.pid" in fit.pid_known_to(guest(pidfile="/run/vm.pid", pidfile_holds_pid=True))
    assert fit.pid_known_to(guest(pidfile="/run/vm.pid")) == ""


def test_nobody() -> None:
    assert fit.pid_known_to(guest()) == ""
