"""The registry: order, facts that are missing, what may be ignored."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cpr.checks import REGISTRY, apply_ignores, blockers, in_order, registry, run_checks, run_host_checks
from cpr.errors import UsageError
from cpr.model import Backing, Finding, Severity
from tests.unit import values
from tests.unit.checks.facts import DEVDAX, guest, host, next_kernel, rehearsal, target


def finding(check: str = "throttle-set", severity: Severity = Severity.BLOCKER, *, ignorable: bool = True) -> Finding:
    return Finding(check=check, severity=severity, subject="x", message="seen", hint="do", ignorable=ignorable)


def test_a_guest_as_it_should_be_has_no_findings() -> None:
    assert run_checks(guest(), host(), target(), rehearsal()) == ()


def test_a_reboot_has_checks_of_its_own_and_many_in_common() -> None:
    modes = {id: check.modes for id, check in REGISTRY.items()}
    assert modes["ram-volatile"] == modes["supervised"] == modes["room-memory"] == {"restart"}
    assert modes["memmap-missing"] == {"reboot"}
    assert modes["drift-chain"] == modes["busy-job"] == modes["start-refused"] == {"restart", "reboot"}
    dax = replace(values.ram(), backing=Backing.DEVDAX, storage=DEVDAX)
    assert run_checks(guest(ram=(dax,)), host(), target(), rehearsal(), mode="reboot", kexec=next_kernel()) == ()


def test_what_concerns_the_host_is_asked_without_a_guest() -> None:
    kexec = next_kernel(obstacles=("no",), unsaved=("db1",), image="", state_directory_free=0)
    assert [f.check for f in run_host_checks(host(), kexec)] == [
        "kexec-impossible", "kexec-kernel-missing", "guest-not-saved", "room-state",
    ]  # fmt: skip
    assert run_host_checks(host(), next_kernel()) == ()


def test_it_can_be_asked_without_target_and_rehearsal() -> None:
    assert run_checks(guest(), host(), None, None) == ()


def test_everything_is_said_at_once_blockers_first() -> None:
    bad = guest(
        "-loadvm",
        "s1",
        ram=(replace(values.ram("a"), shared=False), replace(values.ram("b"), backing=Backing.ANONYMOUS)),
        jobs=("backup j0",),
        capabilities=(("x-ignore-shared", True),),
    )
    found = run_checks(bad, host(), target(), rehearsal())
    severities = [f.severity for f in found]
    assert severities == sorted(severities, key=[Severity.BLOCKER, Severity.WARNING, Severity.NOTE].index)
    assert {"ram-volatile", "busy-job", "capability-left-on", "loadvm"} <= {f.check for f in found}
    assert [f.subject for f in found if f.check == "ram-volatile"] == ["a", "b"]
    assert found == run_checks(bad, host(), target(), rehearsal())


def test_findings_carry_what_the_registry_says_of_their_check() -> None:
    volatile = run_checks(guest(ram=(replace(values.ram(), shared=False),)), host(), None, None)[0]
    assert (volatile.check, volatile.ignorable, volatile.hint != "") == ("ram-volatile", False, True)
    skipped = run_checks(guest(ram=(replace(values.ram(), named_file=False),),
                               binary=values.binary("10.0.13")), host(), None, None)[0]  # fmt: skip
    assert skipped.engines == ("handover", "reexec")


def test_every_check_is_described() -> None:
    for check in REGISTRY.values():
        assert check.title, check.id
        assert check.function.__doc__, check.id
        assert re.fullmatch("[a-z][a-z-]*[a-z]", check.id)


def test_a_check_that_wants_an_unknown_fact_is_refused() -> None:
    with pytest.raises(TypeError, match="unknown facts"):
        registry.check("x-unknown", "title")(lambda weather: iter(()))
    with pytest.raises(TypeError, match="declared twice"):
        registry.check("ram-volatile", "title")(lambda guest: iter(()))


def test_ignoring_turns_a_blocker_into_a_warning() -> None:
    before = (finding(), finding("file-gone"))
    after = apply_ignores(before, ["throttle-set"])
    assert [(f.check, f.severity) for f in after] == [
        ("file-gone", Severity.BLOCKER),
        ("throttle-set", Severity.WARNING),
    ]
    assert "ignored" in after[1].message
    assert apply_ignores(after, ["throttle-set"]) == after


@pytest.mark.parametrize(
    ("found", "ids", "words"),
    [
        ((), ["no-such-check"], "no such check"),
        ((), ["ram-volatile"], "cannot be ignored"),
        ((finding("file-gone", ignorable=False),), ["file-gone"], "cannot be ignored"),
    ],
)
def test_what_cannot_be_ignored(found: tuple[Finding, ...], ids: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        apply_ignores(found, ids)
    assert caught.value.hint


def test_the_list_of_what_can_be_ignored_leaves_out_what_cannot() -> None:
    with pytest.raises(UsageError) as caught:
        apply_ignores((), ["x"])
    assert "throttle-set" in caught.value.hint
    assert "ram-volatile" not in caught.value.hint


def test_an_engine_of_its_own_may_be_ignored_by_its_id() -> None:
    assert apply_ignores((finding("vnc-several"),), ["vnc-several"])[0].severity is Severity.WARNING


def test_blockers_of_an_engine() -> None:
    found = (replace(finding(), engines=("handover",)), finding("file-gone"), finding("spice", Severity.WARNING))
    assert [f.check for f in blockers(found, "handover")] == ["throttle-set", "file-gone"]
    assert [f.check for f in blockers(found, "reexec")] == ["file-gone"]


def test_said_twice_is_said_once() -> None:
    assert in_order([finding(), finding()]) == (finding(),)
