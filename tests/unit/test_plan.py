"""Which engine is chosen, what the plan says, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from cpr import plan as planning
from cpr.engines.handover import Handover
from cpr.errors import Exit, UsageError
from cpr.model import Finding, Severity
from tests.unit.checks.facts import guest, host, rehearsal, target
from tests.unit.fake_world import FakeEngine

if TYPE_CHECKING:
    from cpr.engines.base import Engine


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


WATCHED = "pid 4242 is watched by systemd (vm.service): re-exec keeps the pid"


def engines(preferred: str = WATCHED) -> dict[str, FakeEngine]:
    return {name: FakeEngine(name) for name in ("handover", "cpr-transfer")} | {
        "reexec": FakeEngine("reexec", preferred=preferred),
        "cpr-exec": FakeEngine("cpr-exec"),
    }


def test_auto_prefers_the_engine_that_fits() -> None:
    """Its reason is what is printed, and those that it was preferred to are said."""
    made = make(engines=engines())
    assert (made.engine, made.reason) == ("reexec", WATCHED)
    fits = "nothing blocks it, but reexec fits better"
    assert made.passed_over == (("handover", fits), ("cpr-transfer", fits))


def test_an_engine_that_is_preferred_says_what_blocks_the_first() -> None:
    made = make(blocker("supervised", "handover"), engines=engines())
    assert (made.engine, made.reason, made.passed_over[0]) == ("reexec", WATCHED, ("handover", "supervised"))
    assert made.findings == ()


def test_an_engine_that_fits_but_is_blocked_is_passed_over() -> None:
    made = make(blocker("ptrace", "reexec"), engines=engines())
    assert (made.engine, made.passed_over) == ("handover", (("reexec", "ptrace"),))
    assert "reexec" in made.reason
    made = make(blocker("ptrace", "reexec"), blocker("vnc-several", "handover"), engines=engines())
    assert (made.engine, made.passed_over) == ("cpr-transfer", (("handover", "vnc-several"), ("reexec", "ptrace")))


def test_where_both_are_blocked_both_reasons_are_told() -> None:
    with pytest.raises(planning.NoEngine) as caught:
        make(blocker("supervised", "handover"), blocker("ptrace", "reexec"),
             engines={"handover": FakeEngine(), "reexec": FakeEngine("reexec", preferred=WATCHED)})  # fmt: skip
    assert caught.value.passed_over == (("handover", "supervised"), ("reexec", "ptrace"))


def test_a_forced_engine_is_taken_although_another_fits_better() -> None:
    made = make(engines=engines(), engine="handover")
    assert (made.engine, made.reason, made.passed_over) == ("handover", "--engine handover was asked for", ())


def test_an_engine_without_an_opinion_is_not_preferred() -> None:
    real: dict[str, Engine] = {"handover": Handover(), "reexec": FakeEngine("reexec", preferred=WATCHED)}
    made = planning.make(guest(), host(), target(), rehearsal(), (), engines=real)
    assert made.engine == "reexec"


def test_the_order_is_that_of_the_engines_where_none_fits_better() -> None:
    assert make(engines=engines(preferred="")).engine == "handover"


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
