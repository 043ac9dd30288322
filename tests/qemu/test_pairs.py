"""Every pair of QEMUs: a guest goes from one to the other, or stays where it is, as a real load would have it.

The counting guest proves the RAM; the Linux guest a disk that is written and verified all the time, a network
connection, several vCPUs and several memory backends.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.lab import qemu, tap
from tests.lab.start import Lab
from tests.qemu.conftest import Command, build
from tests.qemu.moving import Subject, agrees, backend, goes_on, walk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.conftest import RecordPair


MACHINES = ("pc", "q35")
EVERY_PAIR = list(itertools.product(qemu.SUITES, qemu.SUITES))
ROUTES = [("7.2", "10.0", "7.2"), ("7.2", "10.0", "11.1.a"), ("7.2", "11.1.a", "11.1.b", "10.0", "7.2")]
REPEATS = 5
"""Samples of the blackout, each of a new guest."""

needs_tap = pytest.mark.skipif(tap.why_not() is not None, reason=f"tap: {tap.why_not()}")


def go(
    subject: Subject, cpr: Command, route: Sequence[str], record_pair: RecordPair, kind: str, *, compare: bool = True
) -> bool:
    """Move a guest along a route as far as it is taken; whether it arrived at the end.

    compare: ask a real load each time, and hold cpr's verdict against it.
    """
    for old, new in itertools.pairwise(map(build, route)):
        load = subject.real_load(new) if compare else None
        outcome = subject.move(cpr, new)
        record_pair(subject.born, old, new, outcome, machine=subject.machine, guest=kind)
        if load is not None:
            agrees(outcome, load)
        if outcome["status"] != "updated":
            return False
    return True


# -- the counting guest: RAM


def counting(lab: Lab, key: str, machine: str, name: str = "guest") -> Subject:
    born = build(key)
    guest = lab.counting(born, name=name, machine=machine, backend=backend(born, lab, f"{name}.ram"))
    return Subject(lab, guest, born, images=(lab.directory / f"{name}.disk",))


COUNTING = "counting, 128 MiB, 1 vCPU"


@pytest.mark.parametrize("pair", [("7.2", "11.1.a"), ("11.1.a", "11.1.b")], ids="-".join)
def test_counting_guest_goes_over(lab: Lab, cpr: Command, record_pair: RecordPair, pair: tuple[str, str]) -> None:
    subject = counting(lab, pair[0], "pc")
    go(subject, cpr, pair, record_pair, COUNTING)
    walk(subject.guest)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("pair", EVERY_PAIR, ids="-".join)
def test_counting_guest_over_every_pair(
    cpr: Command, record_pair: RecordPair, pair: tuple[str, str], machine: str
) -> None:
    for number in range(REPEATS):
        with Lab() as lab:
            subject = counting(lab, pair[0], machine)
            taken = go(subject, Command(lab), pair, record_pair, COUNTING, compare=number == 0)
            walk(subject.guest)
        if not taken:
            break


@pytest.mark.parametrize(
    "route", [ROUTES[0], *(pytest.param(route, marks=pytest.mark.full) for route in ROUTES[1:])], ids="-".join
)
def test_counting_guest_over_several_in_a_row(
    lab: Lab, cpr: Command, record_pair: RecordPair, route: tuple[str, ...]
) -> None:
    subject = counting(lab, route[0], "q35")
    go(subject, cpr, route, record_pair, COUNTING)
    walk(subject.guest)


# -- the Linux guest: disk, network, vCPUs, memory backends

LINUX = "Linux, 256 MiB in 2 NUMA nodes, 2 vCPUs, virtio disk (qcow2) and network (tap)"


@contextlib.contextmanager
def linux(lab: Lab, key: str, machine: str) -> Iterator[tuple[Subject, tap.Tap]]:
    """A Linux guest that writes its disk, has a busy process on each CPU, and users on the network."""
    born = build(key)
    image = lab.directory / "disk.qcow2"
    subprocess.run([qemu.qemu_img(), "create", "-q", "-f", "qcow2", image, "64M"], check=True)
    node = "-object {0},id={1},size=128M -numa node,memdev={1}"
    nodes = [node.format(backend(born, lab, name), name) for name in ("m0", "m1")]
    with tap.Tap() as network:
        guest = lab.linux(
            born,
            *" ".join(nodes).split(),
            *("-smp", "2", "-drive", f"file={image},format=qcow2,if=virtio,cache=none", *network.arguments()),
            machine=machine,
            backend=None,
            words=["cpr.busy", network.guest_word],
        )
        guest.log.wait(lambda: guest.log.disk_ok >= 0 and len(guest.log.cpus) == 2, 60, "the guest does not work")
        yield Subject(lab, guest, born, images=(image,), network=network), network


def linux_goes(lab: Lab, cpr: Command, record_pair: RecordPair, route: Sequence[str], machine: str) -> None:
    """Move a Linux guest along a route with a connection over its network, and find everything unbroken."""
    with linux(lab, route[0], machine) as (subject, network):
        with tap.Stream(network.guest) as stream:
            stream.wait_arrivals()
            go(subject, cpr, route, record_pair, LINUX)
            goes_on(subject.guest)
            stream.wait_arrivals(20)
        assert stream.sound, stream.error
        assert qcow2_errors(lab) == ""


def qcow2_errors(lab: Lab) -> str:
    """What qemu-img finds wrong with the image, leaked clusters apart: the guest is writing it."""
    command = [str(qemu.qemu_img()), "check", "-U", "-q", str(lab.directory / "disk.qcow2")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode in (0, 3) else f"{done.stdout} {done.stderr}"


@needs_tap
@pytest.mark.timeout(300)
def test_linux_guest_goes_over_or_is_told_why_not(lab: Lab, cpr: Command, record_pair: RecordPair) -> None:
    """7.2 -> 10.0 -> 11.1 in a row; the guest is a 7.2's all the way."""
    linux_goes(lab, cpr, record_pair, ROUTES[1], "q35")


@needs_tap
@pytest.mark.timeout(300)
def test_linux_guest_whose_virtio_state_may_be_refused(lab: Lab, cpr: Command, record_pair: RecordPair) -> None:
    """The pair that Debian's builds have not taken so far: what a real load says counts, whatever that is."""
    linux_goes(lab, cpr, record_pair, ("10.0", "11.1.a"), "pc")


@pytest.mark.full
@needs_tap
@pytest.mark.timeout(400)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("pair", EVERY_PAIR, ids="-".join)
def test_linux_guest_over_every_pair(
    lab: Lab, cpr: Command, record_pair: RecordPair, pair: tuple[str, str], machine: str
) -> None:
    linux_goes(lab, cpr, record_pair, pair, machine)


@pytest.mark.full
@needs_tap
@pytest.mark.timeout(400)
@pytest.mark.parametrize("route", ROUTES, ids="-".join)
def test_linux_guest_over_several_in_a_row(
    lab: Lab, cpr: Command, record_pair: RecordPair, route: tuple[str, ...]
) -> None:
    linux_goes(lab, cpr, record_pair, route, "pc")
