"""Comparing a guest before and after."""

from __future__ import annotations

import dataclasses

from cpr.verify import compare
from tests.unit import values


def test_soft_limit_of_open_files_that_qemu_raises_is_no_difference() -> None:
    before = dataclasses.replace(values.guest(), limits={"RLIMIT_NOFILE": (1024, 4096), "RLIMIT_CORE": (0, -1)})
    after = dataclasses.replace(before, limits={"RLIMIT_NOFILE": (4096, 4096), "RLIMIT_CORE": (0, -1)})
    assert compare(before, after) == []


def test_other_limits_are_the_same() -> None:
    before = dataclasses.replace(values.guest(), limits={"RLIMIT_NOFILE": (1024, 4096), "RLIMIT_CORE": (0, -1)})
    for limits in ({"RLIMIT_NOFILE": (1024, 8192), "RLIMIT_CORE": (0, -1)}, {"RLIMIT_NOFILE": (1024, 4096)}):
        (line,) = compare(before, dataclasses.replace(before, limits=limits))
        assert line.startswith("limits: ")


def test_only_x_ignore_shared_may_go_off() -> None:
    before = dataclasses.replace(values.guest(), capabilities=(("events", True), ("x-ignore-shared", True)))
    off = (("events", True), ("x-ignore-shared", False))
    assert compare(before, dataclasses.replace(before, capabilities=off)) == []
    (line,) = compare(before, dataclasses.replace(before, capabilities=(("x-ignore-shared", False),)))
    assert line == "migration capabilities: was ['events'], is []"
