"""Which engine is chosen, what the plan says, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from cpr import plan as planning
from cpr.errors import Exit, UsageError
from cpr.model import Finding, Severity
from tests.unit.checks.facts import guest, host, rehearsal, target
from tests.unit.fake_world import FakeEngine


def blocker(check: str, *engines: str, ignorable: bool = True) -> Finding:
    return Finding(
        check=check,
        severity=Severity.BLOCKER,
        subject="x",
        message="seen",
        hint="do this",
        engines=engines,
        ignorable=ignorable,
    )


def make(*findings: Finding, engines: dict[str, FakeEngine] | None = None, **more: Any) -> Any:
    known = engines or {"handover": FakeEngine(), "reexec": FakeEngine("reexec")}
    return planning.make(guest(), host(), target(), rehearsal(), findings, engines=known, **more)


def test_auto_takes_the_first_that_nothing_blocks() -> None:
    made = make()
    assert (made.engine, made.passed_over) == ("handover", ())
    assert made.reason
    assert [s.commit for s in made.steps].count(True) == 1


def test_auto_says_why_it_passed_one_over() -> None:
    made = make(blocker("supervised", "handover"))
    assert (made.engine, made.passed_over) == ("reexec", (("handover", "supervised"),))
    assert "handover" in made.reason
    assert made.findings == ()


def test_an_engine_speaks_for_itself() -> None:
    engines = {"handover": FakeEngine(own=(blocker("vnc-several", "handover"),)), "reexec": FakeEngine("reexec")}
    assert make(engines=engines).engine == "reexec"
    assert make(engines=engines, ignored=["vnc-several"]).engine == "handover"


def test_a_forced_engine_is_taken_or_refused() -> None:
    assert make(engine="reexec").engine == "reexec"
    with pytest.raises(planning.NoEngine) as caught:
        make(blocker("supervised", "handover"), engine="handover")
    assert [f.check for f in caught.value.findings] == ["supervised"]


def test_none_left() -> None:
    with pytest.raises(planning.NoEngine) as caught:
        make(blocker("ram-volatile", ignorable=False), blocker("busy-job"))
    error = caught.value
    assert error.code is Exit.BLOCKED
    assert [f.check for f in error.findings] == ["ram-volatile", "busy-job"]
    assert error.passed_over == (("handover", "ram-volatile, busy-job"), ("reexec", "ram-volatile, busy-job"))
    assert "ram-volatile" in error.message
    assert "1 more" in error.message
    assert error.hint == "do this"


def test_what_is_ignored_is_a_warning_and_recorded() -> None:
    made = make(blocker("throttle-set"), ignored=["throttle-set", "throttle-set"])
    assert made.ignored == ("throttle-set",)
    assert [(f.check, f.severity) for f in made.findings] == [("throttle-set", Severity.WARNING)]


def test_the_request_reaches_the_engine() -> None:
    engine = FakeEngine()
    make(engines={"handover": engine}, request="what was asked for")
    assert engine.requests == ["what was asked for"]


@pytest.mark.parametrize("name", ["cpr-exec", "cpr-transfer", "cprsave", "copy"])
def test_engines_of_later_releases_are_named(name: str) -> None:
    with pytest.raises(UsageError, match="not in this release"):
        make(engines={"handover": FakeEngine()}, engine=name)


def test_an_engine_that_nobody_knows() -> None:
    with pytest.raises(UsageError, match="no such engine") as caught:
        make(engine="teleport")
    assert "handover" in caught.value.hint
