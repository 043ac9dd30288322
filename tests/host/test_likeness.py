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
