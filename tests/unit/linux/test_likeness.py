"""What two processes differ in, and what exec makes of capabilities."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest

from cpr.linux.capabilities import mask, names
from cpr.linux.cgroup import Cgroup
from cpr.linux.credentials import before_exec
from cpr.linux.launcher import out_of_the_way
from cpr.linux.sched import Scheduling
from cpr.linux.traits import Likeness, differences

LIKE = Likeness(
    pid=10, start_time=5, argv=("q",), environ=(), cwd="/", cwd_identity=(1, 2), root="/", root_identity=(1, 2),
    uids=(107,) * 4, gids=(107,) * 4, groups=(36, 107), inheritable=0, permitted=0, effective=0,
    bounding=mask("CAP_CHOWN", "CAP_KILL"), ambient=0, no_new_privs=True, seccomp=2, seccomp_filters=1,
    limits={"RLIMIT_NOFILE": (1024, 4096), "RLIMIT_CORE": (0, -1)}, oom_score_adj=0, affinity=frozenset({0, 1}),
    scheduling=Scheduling(policy=0, priority=0, nice=0, reset_on_fork=False), umask=0o22, ioprio=0,
    cgroups=(Cgroup(hierarchy=0, controllers=(), path="/a"),), namespaces={"net": (4, 1)}, security_label=None,
    session=10, tty=0,
)  # fmt: skip


def test_equal_but_for_what_must_differ() -> None:
    other = dataclasses.replace(
        LIKE, pid=11, start_time=9, argv=("r",), environ=(("A", "b"),), session=3, groups=(107, 36)
    )
    assert differences(LIKE, other) == ()


@pytest.mark.parametrize(
    ("change", "aspect"),
    [
        ({"uids": (0,) * 4}, "uids"),
        ({"gids": (0,) * 4}, "gids"),
        ({"groups": (36,)}, "groups"),
        ({"permitted": 2}, "permitted"),
        ({"bounding": 0}, "bounding"),
        ({"no_new_privs": False}, "no_new_privs"),
        ({"seccomp": 0}, "seccomp"),
        ({"seccomp_filters": 0}, "seccomp"),
        ({"limits": {"RLIMIT_NOFILE": (512, 4096), "RLIMIT_CORE": (0, -1)}}, "RLIMIT_NOFILE"),
        ({"limits": {"RLIMIT_NOFILE": (1024, 8192), "RLIMIT_CORE": (0, -1)}}, "RLIMIT_NOFILE"),
        ({"limits": {"RLIMIT_CORE": (0, -1)}}, "RLIMIT_NOFILE"),
        ({"oom_score_adj": -1000}, "oom_score_adj"),
        ({"affinity": frozenset({1})}, "affinity"),
        ({"umask": 0}, "umask"),
        ({"ioprio": 7}, "ioprio"),
        ({"cgroups": ()}, "cgroup"),
        ({"namespaces": {"net": (4, 2)}}, "namespaces"),
        ({"security_label": "x (enforce)"}, "security label"),
        ({"cwd_identity": (1, 3)}, "cwd"),
        ({"root_identity": (1, 3)}, "root"),
        ({"scheduling": Scheduling(policy=0, priority=0, nice=1, reset_on_fork=False)}, "scheduling"),
    ],
)
def test_each_difference_is_told_unless_it_was(change: dict[str, Any], aspect: str) -> None:
    (line,) = differences(LIKE, dataclasses.replace(LIKE, **change))
    assert line.startswith(aspect + ": ")
    assert differences(LIKE, dataclasses.replace(LIKE, **change), unmet=[f"{aspect}: for some reason"]) == ()


def test_a_raised_soft_limit_is_none() -> None:
    raised = {"RLIMIT_NOFILE": (4096, 4096), "RLIMIT_CORE": (-1, -1)}
    assert differences(LIKE, dataclasses.replace(LIKE, limits=raised)) == ()
    assert differences(dataclasses.replace(LIKE, limits={"RLIMIT_CORE": (-1, -1)}),
                       dataclasses.replace(LIKE, limits={"RLIMIT_CORE": (5, -1)})) != ()  # fmt: skip


def test_capability_names() -> None:
    assert names(mask("CAP_NET_ADMIN", "CAP_CHECKPOINT_RESTORE")) == (
        "CAP_NET_ADMIN",
        "CAP_CHECKPOINT_RESTORE",
    )
    assert names(1 << 50) == ("CAP_50",)
    assert mask("CAP_SYS_ADMIN") == 1 << 21
    assert names(0) == ()


def sets(uid: int, **more: int | None) -> dict[str, Any]:
    base: dict[str, Any] = dict.fromkeys(("inheritable", "permitted", "effective", "bounding", "ambient"), 0)
    return {**base, "uids": [uid] * 4, "securebits": None, **more}


@pytest.mark.parametrize("uid", [0, 107])
def test_exec_never_leaves_more_than_was_permitted(uid: int) -> None:
    """Every small combination of sets, against the rules of capabilities(7)."""
    for number in range(4**5):
        inheritable, permitted, effective, bounding, ambient = ((number >> 2 * i) & 3 for i in range(5))
        if effective & ~permitted or ambient & ~(permitted & inheritable):
            continue
        wanted = sets(
            uid,
            inheritable=inheritable,
            permitted=permitted,
            effective=effective,
            bounding=bounding,
            ambient=ambient,
        )
        before, unmet = before_exec(wanted)
        after = before["inheritable"] | before["bounding"] if uid == 0 else before["ambient"]
        assert after & ~permitted == 0
        for name in ("inheritable", "bounding", "ambient"):
            assert before[name] & ~wanted[name] == 0
        if after != permitted:
            assert any(line.startswith("permitted: ") for line in unmet)


def test_full_root_is_left_as_it_is() -> None:
    full = (1 << 41) - 1
    before, unmet = before_exec(sets(0, permitted=full, effective=full, bounding=full))
    assert unmet == []
    assert before["bounding"] == full


def test_out_of_the_way() -> None:
    first = os.memfd_create("x")
    second = os.dup(first)
    inode = os.fstat(first).st_ino
    taken = set(range(first, first + 40)) | {second}
    moved = out_of_the_way(first, taken)
    assert moved not in taken
    assert os.fstat(moved).st_ino == inode
    with pytest.raises(OSError):
        os.fstat(first)
    assert out_of_the_way(moved, taken) == moved
    os.close(moved)
    os.close(second)
