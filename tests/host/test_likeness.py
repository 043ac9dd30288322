"""A guest that is not root's and not free: the new QEMU is as the old one was, read from /proc and the cgroup."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from tests.host import guests
from tests.host.guests import Likeness
from tests.lab import qemu

if TYPE_CHECKING:
    from tests.host.vm import Host

pytestmark = pytest.mark.hostfull

NUMBER = itertools.count()
LIKENESSES = {
    "another uid": Likeness(uid=2000),
    "mount namespace": Likeness(mounts=True),
    "cgroup": Likeness(memory_max="600M", cpu_max="'150000 100000'"),
    "vhost-net": Likeness(vhost=True),
    "all": Likeness(uid=2000, mounts=True, memory_max="600M", cpu_max="'150000 100000'", vhost=True, oom=-500),
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("likeness", LIKENESSES.values(), ids=LIKENESSES)
@pytest.mark.parametrize("yama", [0, 1])
def test_new_process_is_like_the_old(host: Host, likeness: Likeness, yama: int) -> None:
    host.sh(f"echo {yama} > /proc/sys/kernel/yama/ptrace_scope")
    name = f"like{next(NUMBER)}"
    guest = guests.start(host, "7.2", name=name, likeness=likeness)
    try:
        before = guest.properties()
        old = guest.pid
        words = ("update", "--restart", name, "--engine", "handover", "-y", "--json")
        said = host.cpr(*words, "--qemu", qemu.obtain("11.1.a").binary)
        assert said.code == 0, said
        (answer,) = said.json["guests"]
        guest.pid = answer["pid_after"]
        assert guest.pid != old
        after = guest.properties()
        assert after == before
        log = guest.goes_on()
        assert log.sound, log.problems()
    finally:
        guest.end()
        host.sh("echo 0 > /proc/sys/kernel/yama/ptrace_scope")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("likeness", [LIKENESSES["all"]], ids=["all"])
def test_process_is_kept_under_yama(host: Host, likeness: Likeness) -> None:
    """In place, twice; root may trace whom it likes at scope 1."""
    host.sh("echo 1 > /proc/sys/kernel/yama/ptrace_scope")
    name = f"like{next(NUMBER)}"
    guest = guests.start(host, "7.2", name=name, likeness=likeness)
    try:
        before = guest.properties()
        for key in ("11.1.a", "11.1.b"):
            words = ("update", "--restart", name, "--engine", "reexec", "-y", "--json")
            said = host.cpr(*words, "--qemu", qemu.obtain(key).binary)
            assert said.code == 0, said
            (answer,) = said.json["guests"]
            assert answer["pid_after"] == guest.pid
            assert guest.properties() == before
        log = guest.goes_on()
        assert log.sound, log.problems()
    finally:
        guest.end()
        host.sh("echo 0 > /proc/sys/kernel/yama/ptrace_scope")


@pytest.mark.timeout(900)
def test_yama_refuses_the_guests_own_user(host: Host) -> None:
    """The same user, without CAP_SYS_PTRACE: refused by name, before anything is touched; at scope 0 he may trace."""
    name, user = f"like{next(NUMBER)}", 2000
    guest = guests.start(host, "7.2", name=name, likeness=Likeness(uid=user))
    directory = f"/tmp/run{user}"
    host.sh(f"mkdir -m 700 {directory}; chown {user} {directory}")
    become = f"CPR_RUN_DIR={directory} exec setpriv --reuid={user} --regid={user} --groups={guests.GROUP} cpr"
    words = f"update --restart {name} --engine reexec -y --json --qemu {qemu.obtain('11.1.a').binary}"
    try:
        host.sh("echo 1 > /proc/sys/kernel/yama/ptrace_scope")
        before = guest.properties()
        said = host.run(f"{become} {words}", 400)
        assert said.code == 3, said
        (answer,) = said.json["guests"]
        (found,) = (f for f in answer["findings"] if f["check"] == "ptrace")
        assert "ptrace_scope is 1" in found["message"], said
        assert "CAP_SYS_PTRACE" in found["message"] + found["hint"], said
        assert answer["where"] == "the guest was not touched"
        assert guest.properties() == before
        host.sh("echo 0 > /proc/sys/kernel/yama/ptrace_scope")
        said = host.run(f"{become} {words}", 400)  # what a user cannot, he is told: the guest's bounding set is empty
        assert not {f["check"] for f in said.json["guests"][0]["findings"]} & {"ptrace", "take-descriptors"}, said
        log = guest.goes_on()
        assert log.sound, log.problems()
    finally:
        guest.end()
        host.sh("echo 0 > /proc/sys/kernel/yama/ptrace_scope")
