"""A human monitor is borrowed from somebody who sits at it, and nothing of that is seen."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from cpr.engines import graft
from cpr.engines.mend import open_human_session, repair
from cpr.engines.typed import Typed
from cpr.model import MonitorAddress
from tests.qemu.managers import PROMPT, Person, held
from tests.qemu.reexecuting import reexecuted
from tests.qemu.surveying import KEYS, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab
    from tests.qemu.managers import Held

    Builds = Callable[[str], QemuBuild]

NEWEST = KEYS[-1]
every = pytest.mark.parametrize(
    "key", [pytest.param(k, marks=() if k == NEWEST else pytest.mark.full) for k in KEYS]
)


def path(lab: Lab) -> Path:
    return lab.directory / "guest.hmp"


def words(lab: Lab) -> tuple[str, str]:
    return "-monitor", f"unix:{path(lab)},server=on,wait=off"


def borrow(guest: Held, seconds: float = 10.0) -> Typed:
    return Typed.borrow(guest.process, guest.tracer, guest.number, until=time.monotonic() + seconds)


@every
def test_an_idle_session(lab: Lab, builds: Builds, key: str) -> None:
    with held(lab, builds(key), Person, *words(lab), address=path(lab)) as (guest, person):
        said = person.types(b"info name\n", PROMPT)
        for _ in range(3):
            seen = person.received
            with borrow(guest) as typed:
                assert typed.execute("info name") == "guest\n"
                assert "info block" in typed.execute("help info")
                person.send(b"info name\n")
                typed.give_back(guest.tracer)
            assert person.sees(PROMPT, len(seen)) == said
        assert not person.ended


@every
def test_a_line_that_is_begun(lab: Lab, builds: Builds, key: str) -> None:
    """It is let finish; then it is borrowed."""
    with held(lab, builds(key), Person, *words(lab), address=path(lab)) as (guest, person):
        person.types(b"info na", b"\x1b[K")
        with pytest.raises(TimeoutError, match="prompt"):
            borrow(guest, 0.1)
        with ThreadPoolExecutor(1) as pool:
            borrowing = pool.submit(borrow, guest)
            assert b"guest" in person.types(b"me\n", PROMPT)
            with borrowing.result() as typed:
                assert typed.execute("info name") == "guest\n"
                typed.give_back(guest.tracer)
        assert b"guest" in person.types(b"info name\n", PROMPT)


def test_qemu_is_replaced_in_place(lab: Lab, builds: Builds) -> None:
    with held(lab, builds(NEWEST), Person, *words(lab), address=path(lab)) as (guest, person):
        said = person.types(b"info name\n", PROMPT)
        already = len(person.received)
        with borrow(guest) as typed:
            person.send(b"info name\n")
            with reexecuted(guest, typed.kept) as (anew, sock):
                open_human_session(sock, "new", timeout=10)
                typed.give_back(anew.tracer, anew.number)
        assert person.sees(PROMPT, already) == said
        assert not person.ended


@every
def test_we_die(lab: Lab, builds: Builds, key: str) -> None:
    with held(lab, builds(key), Person, *words(lab), address=path(lab)) as (guest, person):
        typed = borrow(guest)
        typed.close()
        until(lambda: not graft.socket_inode(guest.process.pid, guest.number))
        address = MonitorAddress(label="hmp", path=str(guest.address))
        repair(guest.process, guest.tracer, address, typed.kept, human=True)
        assert b"guest" in person.types(b"info name\n", PROMPT)
        assert not person.ended
