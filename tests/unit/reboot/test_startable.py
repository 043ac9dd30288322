"""What of a guest's place is still there after the boot: a unit that does not run has no cgroup."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cpr.engines.settings import Settings
from cpr.linux import cgroup
from cpr.linux.cgroup import Cgroup, CgroupMount
from cpr.linux.likeness import thread_placement
from cpr.reboot.startable import like_now, settings_now
from tests.unit import values
from tests.unit.reboot import saved

if TYPE_CHECKING:
    from pathlib import Path

    from cpr.reboot.manifest import SavedGuest

THERE, GONE, OF_ITS_OWN = "/machine", "/system.slice/web1.service", "/machine/vcpu0"


@pytest.fixture(autouse=True)
def mounts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """cgroup v2 with one group in it."""
    (tmp_path / THERE[1:]).mkdir()
    mount = CgroupMount(directory=str(tmp_path), root="/", unified=True, options=frozenset())
    monkeypatch.setattr(cgroup, "own_mounts", lambda: [mount])


def entry(path: str) -> Cgroup:
    return Cgroup(hierarchy=0, controllers=(), path=path)


def guest(process: str, *threads: str) -> SavedGuest:
    """A guest whose process and vCPUs were in these cgroups."""
    (placement, *_) = thread_placement(os.getpid())
    settings = replace(
        Settings.of(values.guest(), (), ()),
        threads={f"vcpu {n}": replace(placement, cgroups=(entry(path),)) for n, path in enumerate(threads)},
    )
    known = saved.guest()
    return replace(known, settings=settings.json(), likeness=replace(known.likeness, cgroups=(entry(process),)))


def test_a_cgroup_that_is_there_is_kept() -> None:
    it = guest(THERE, THERE)
    like, unmet = like_now(it)
    assert like.cgroups == (entry(THERE),)
    assert unmet == ()
    assert settings_now(it) == Settings.from_json(it.settings)


def test_one_that_is_gone_is_told_once_and_wanted_by_nobody() -> None:
    it = guest(GONE, GONE, THERE)
    like, unmet = like_now(it)
    assert like.cgroups == ()
    assert unmet == (f"cgroup: {GONE} is not there any more",)
    assert [p.cgroups for p in settings_now(it).threads.values()] == [(), (entry(THERE),)]


def test_one_of_a_thread_is_told_too() -> None:
    assert like_now(guest(THERE, OF_ITS_OWN))[1] == (f"cgroup: {OF_ITS_OWN} is not there any more",)


def test_a_guest_of_which_nothing_is_known_has_none() -> None:
    assert like_now(replace(guest(THERE), settings={}))[1] == ()
