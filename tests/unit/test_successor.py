"""What the new QEMU inherits of a connection that the old one has made."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cpr.engines.successor import SILENT, Successor, callers, successor
from cpr.model import Chardev, Guest, OpenFile
from tests.unit import values

CALLER = Chardev(
    label="con", backend="socket", filename="unix:", frontend_open=True, connected=True, server=False, client=9
)


def calling(*words: str) -> Guest:
    first = values.guest()
    argv = (*first.argv, "-chardev", "socket,id=con,path=/run/con", *words)
    files = (OpenFile(number=9, target="socket:[77]", kind="socket", owner="con", inode=77),)
    return replace(first, argv=argv, ram=(), chardevs=(CALLER,), open_files=files)


def number_of(new: Successor) -> int:
    """The descriptor that its chardev has."""
    (value,) = [word for word in new.argv if word.startswith("socket,id=con,")]
    return int(value.partition("fd=")[2].partition(",")[0])


@pytest.mark.parametrize("in_place", [False, True])
def test_it_starts_with_a_silent_connection_and_is_given_the_real_one_later(in_place: bool) -> None:
    new = successor(calling("-serial", "chardev:con"), values.target(), "run", in_place=in_place)
    silent, real = sorted((e for e in new.inherited if e.name.endswith(":con")), key=lambda e: e.source is not None)
    assert (silent.name, silent.target, silent.source) == (SILENT + "con", number_of(new), None)
    assert (real.name, real.target, real.source) == ("connection:con", 9 if in_place else None, 9)
    assert silent.target != 9
    assert json.loads(dict(new.environ)["CPR_CONNECTIONS"]) == {"con": 77}


def test_a_device_that_the_guest_would_see_unplugged_keeps_its_connection() -> None:
    guest = calling("-device", "usb-serial,chardev=con")
    assert callers(guest) == ()
    new = successor(guest, values.target(), "run")
    assert [(e.name, e.source, e.target) for e in new.inherited] == [("connection:con", 9, number_of(new))]
    assert "CPR_CONNECTIONS" not in dict(new.environ)
