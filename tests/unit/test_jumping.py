"""Between the call of a jump and the boot: nobody brings guests back into a host that goes down. No QEMU is there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cpr import app
from cpr.app.finish import finish
from cpr.errors import Blocked, Exit
from cpr.linux import proc
from cpr.progress import Silent
from cpr.reboot import manifest as manifests
from cpr.reboot import store
from cpr.reboot.manifest import Phase
from tests.unit.fake_world import FakeHost
from tests.unit.reboot.saved import guest, manifest

if TYPE_CHECKING:
    from pathlib import Path

    from cpr.app import World

GONE = 1 << 30


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The open manifest of this boot, the jump asked for; its guest has ended."""
    monkeypatch.setenv("CPR_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("CPR_RUN_DIR", str(tmp_path / "run"))
    directory = store.make_run("r1")
    store.make_current(directory)
    known = replace(manifest(guest(GONE)), boot_id=proc.boot_id(), phase=Phase.JUMPING)
    return manifests.write(directory, known)


def world(*, going_down: bool) -> World:
    return replace(FakeHost().world(), going_down=lambda: going_down)


def refused(call: object) -> Blocked:
    assert callable(call)
    with pytest.raises(Blocked) as caught:
        call()
    assert caught.value.code is Exit.BLOCKED
    assert "about to jump into 7.2.1" in caught.value.message
    assert "saved" in caught.value.where
    assert "cpr recover" in caught.value.hint
    return caught.value


def test_nothing_is_restored_in_the_old_boot(path: str) -> None:
    before = manifests.read_file(path)
    for going_down in (True, False):
        there = world(going_down=going_down)
        refused(lambda there=there: app.restore([], progress=Silent(), world=there))
        refused(lambda there=there: app.restore(["web1"], give_up=True, progress=Silent(), world=there))
    assert manifests.read_file(path) == before


def test_recover_waits_until_the_shutdown_is_cancelled(path: str) -> None:
    before = manifests.read_file(path)
    refused(lambda: app.recover(None, world(going_down=True)))
    refused(lambda: finish(path, world(going_down=True)))
    assert manifests.read_file(path) == before
    update = app.recover(None, world(going_down=False))
    assert update.exit_code is Exit.NEEDS_ATTENTION, "there is no QEMU here that it could come back in"
    after = manifests.read_file(path)
    assert after.phase is Phase.COMMITTED, "there is no jump any more"
    assert after.open
    again = app.restore([], progress=Silent(), world=world(going_down=False))
    assert again.exit_code is Exit.NEEDS_ATTENTION, "but not for the jump"
    assert "jump" not in again.outcomes[0].error


def test_after_the_boot_it_is_nobodys_obstacle(path: str) -> None:
    manifests.write_file(path, replace(manifests.read_file(path), boot_id="another"))
    update = app.restore([], progress=Silent(), world=world(going_down=True))
    assert "jump" not in update.outcomes[0].error
