"""Who was born after whom, of lists of threads."""

from __future__ import annotations

import pytest

from cpr.linux.births import FIRST, Birth, predecessors
from cpr.linux.proc import Thread

NAMED = ("qemu-system-x86", "call_rcu", "IO io0", "IO mon_iothread", "CPU 0/KVM", "CPU 1/KVM")
UNNAMED = ("qemu-system-x86",) * len(NAMED)


def threads(*names: str, at: int = 100) -> list[Thread]:
    return [Thread(tid=at + n, comm=name) for n, name in enumerate(names)]


@pytest.mark.parametrize("first", [NAMED[1], NAMED[0]])
def test_named(first: str) -> None:
    """The first one may have no name of its own (QEMU 7.2)."""
    there = threads(NAMED[0], first, *NAMED[2:])
    assert predecessors(100, there, {102: 7, 104: 8, 105: 9}) == {
        FIRST: Birth(7, "IO io0"),
        "IO mon_iothread": Birth(8, "CPU 0/KVM"),
        "CPU 0/KVM": Birth(9, "CPU 1/KVM"),
    }


def test_without_names_only_the_second_is_known() -> None:
    assert predecessors(100, threads(*UNNAMED), {102: 7, 104: 8}) == {FIRST: Birth(7, UNNAMED[0])}


def test_ids_that_began_anew() -> None:
    there = [Thread(tid=300, comm="CPU 0/KVM"), *threads(*NAMED[:4], at=4194300)]
    assert predecessors(4194300, there, {300: 8}) == {"IO mon_iothread": Birth(8, "CPU 0/KVM")}


def test_threads_of_the_kernel_do_not_count() -> None:
    there = threads("qemu-system-x86", "call_rcu", "vhost-100", "IO io0")
    assert predecessors(100, there, {103: 7}) == {FIRST: Birth(7, "IO io0")}


def test_names_that_several_have() -> None:
    there = threads("qemu-system-x86", "call_rcu", "worker", "CPU 0/KVM", "worker", "CPU 1/KVM")
    assert predecessors(100, there, {103: 7, 105: 8}) == {}
