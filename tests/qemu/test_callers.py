"""QEMU has made the connection itself: what its peer says all the while is heard once, also within the pause."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from cpr import discover, survey
from cpr.engines import ENGINES, Request
from tests.qemu.conftest import BOTH_ENGINES, qemus_of
from tests.qemu.dressing import ask
from tests.qemu.faults.fault import Fault, Stage
from tests.qemu.parties import Qmp, counted, descriptors
from tests.qemu.surveying import until
from tests.qemu.test_connections import address_of, typing

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab
    from tests.qemu.conftest import Command
    from tests.qemu.parties import Counted

    Builds = Callable[[str], QemuBuild]

full = pytest.mark.full
pytestmark = BOTH_ENGINES


@pytest.mark.parametrize(
    ("kind", "route"),
    [
        ("unix", "7.2 11.1.a"),
        pytest.param("tcp", "7.2 10.0 11.1.a 11.1.b 11.1.a", marks=full),
        pytest.param("unix", "11.1.a 11.1.b 11.1.a 11.1.b 11.1.a 11.1.b", marks=full),
    ],
)
def test_a_console_that_calls_loses_no_byte(lab: Lab, cpr: Command, builds: Builds, kind: str, route: str) -> None:
    first, *rest = route.split()
    with counted(lab, builds(first), console=address_of(lab, kind), calls=True) as guest:
        for key in rest:
            with typing(guest):
                result = cpr.update(guest.name, builds(key))
                assert result.code == 0, str(result)
                assert "may be lost" not in str(result.guest["notes"])
        guest.check()
        assert len(qemus_of(lab)) == 1


def moment(guest: Counted, engine: str, key: str, step: str) -> str:
    """When that step is done."""
    facts = survey.survey(discover.find(str(guest.process.pid)))
    steps = ENGINES[engine].steps(facts, ask(key), Request(run_id="20261120T101500-3f2a"))
    return f"step:{[step.id for step in steps].index(step)}:done"


@full
def test_a_console_that_calls_stays_where_the_update_is_undone(lab: Lab, cpr: Command, builds: Builds) -> None:
    """When the new QEMU has the state, and not yet the connection."""
    with counted(lab, builds("7.2"), calls=True) as guest, Stage(lab.directory / "stage") as stage:
        loaded = "MoveState" if cpr.engine == "handover" else "LoadState"
        fault = Fault(at=moment(guest, cpr.engine, "11.1.a", loaded), do="fail")
        with typing(guest):
            result = cpr.update(guest.name, builds("11.1.a"), **stage.environment([fault]))
        assert result.guest["status"] == "rolled_back", str(result)
        guest.check()
        with typing(guest):
            result = cpr.update(guest.name, builds("11.1.a"))
        assert result.code == 0, str(result)
        guest.check()


def test_a_peer_that_hangs_up_meanwhile_stops_nothing(lab: Lab, cpr: Command, builds: Builds) -> None:
    target = builds("11.1.a")
    with counted(lab, builds("7.2"), calls=True) as guest, Stage(lab.directory / "stage") as stage:
        fault = Fault(at=moment(guest, cpr.engine, target.key, "TakeDescriptors"), do="wait")
        words = ("--engine", cpr.engine, "--qemu", target.binary, "-y", "--json")
        with cpr.start("update", guest.name, *words, **stage.environment([fault])) as process:
            announced = stage.wait()
            before = set(descriptors(guest.process.pid).values())
            guest.wire.close()
            until(lambda: before - set(descriptors(guest.process.pid).values()))  # QEMU has seen it
            announced.go()
            out, err = process.communicate(timeout=60)
        (outcome,) = json.loads(out)["guests"]
        lab.adopt(outcome["pid_after"])
        assert (process.returncode, outcome["status"]) == (0, "updated"), out + err
        with Qmp(guest.qmp) as monitor:
            assert "disconnected" in str(monitor.execute("query-chardev"))
            assert monitor.execute("query-status")["status"] == "running"
