"""Throw-away taps, of the kernel we are on."""

from __future__ import annotations

import os

import pytest

from cpr.linux import tun
from cpr.linux.syscalls import IFF_MULTI_QUEUE, IFF_TAP, IFF_VNET_HDR, tun_interface

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/net/tun"), reason="needs root and /dev/net/tun"
)


@pytest.mark.parametrize(("flags", "count"), [(0, 1), (IFF_VNET_HDR, 1), (IFF_VNET_HDR | IFF_MULTI_QUEUE, 3)])
def test_a_throw_away_tap_is_like_the_other_and_nobody_sees_it(flags: int, count: int) -> None:
    before, ours = sorted(os.listdir("/sys/class/net")), os.readlink("/proc/thread-self/ns/net")
    queues = tun.throw_away_queues(flags | IFF_TAP, count)
    try:
        assert len(queues) == count
        for fd in queues:
            name, found = tun_interface(fd.number)
            assert (name, found & (IFF_VNET_HDR | IFF_MULTI_QUEUE)) == ("rehearsal", flags)
        assert sorted(os.listdir("/sys/class/net")) == before
        assert os.readlink("/proc/thread-self/ns/net") == ours
    finally:
        for fd in queues:
            fd.close()


def test_two_of_a_name_do_not_meet() -> None:
    one, other = tun.throw_away_queues(0, 1), tun.throw_away_queues(0, 1)
    assert [tun_interface(fd.number)[0] for fd in (*one, *other)] == ["rehearsal", "rehearsal"]
    for fd in (*one, *other):
        fd.close()
