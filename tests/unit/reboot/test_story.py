"""How a reboot stands, by its manifest: where each guest is, and what somebody would do next."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cpr.errors import CprError, ManifestError
from cpr.linux import proc
from cpr.reboot import manifest as manifests
from cpr.reboot import store
from cpr.reboot.manifest import Mode, Phase, Restore, Result
from cpr.reboot.story import Place, Story, find, stories
from tests.unit.reboot.saved import guest, manifest

if TYPE_CHECKING:
    from pathlib import Path

    from cpr.reboot.manifest import Manifest, SavedGuest


def saved(pid: int = 4242, result: Result = Result.OPEN, *, sealed: bool = True) -> SavedGuest:
    known = replace(guest(pid, f"guest{pid}"), restore=Restore(result=result))
    return known if sealed else replace(known, state=None)


def told(*guests: SavedGuest, phase: Phase = Phase.JUMPING, here: bool = False, **more: object) -> Story:
    known = replace(manifest(*guests), phase=phase, **more)  # type: ignore[arg-type]
    path = "/var/lib/cpr/reboot/r1/manifest.json" if known.release else "/vm/web 1.manifest"
    return Story(manifest=known, path=path, here=here, current=True)


EVERYBODY = [saved(n, result) for n, result in enumerate(Result)]


def test_every_result_and_phase_has_a_place_and_words() -> None:
    for phase in Phase:
        for here in (True, False):
            for mode in Mode:
                for by_hand in (True, False):
                    it = told(*EVERYBODY, phase=phase, here=here, mode=mode, release="" if by_hand else "7.2.1")
                    assert sum(it.counts.values()) == len(EVERYBODY)
                    assert it.open
                    assert it.next


def test_after_the_boot() -> None:
    it = told(saved(1), saved(2, Result.RESTORED), saved(3, Result.GIVEN_UP), saved(4, Result.RESTORED))
    assert dict(it.counts) == {Place.BACK: 2, Place.WAITING: 1, Place.GIVEN_UP: 1}
    assert it.next == "cpr restore"
    elsewhere = replace(it, current=False)
    assert elsewhere.next == "cpr restore --directory /var/lib/cpr/reboot/r1"
    over = told(saved(2, Result.RESTORED), saved(3, Result.GIVEN_UP))
    assert (over.open, over.next) == (False, "")


@pytest.mark.parametrize("phase", [Phase.SAVING, Phase.SAVED, Phase.UNDOING])
def test_interrupted_in_this_boot(phase: Phase) -> None:
    it = told(saved(1), saved(2, Result.CONTINUED), phase=phase, here=True)
    assert dict(it.counts) == {Place.INTERRUPTED: 2}
    assert it.next == "cpr recover"
    assert replace(it, worker="update --kexec (pid 7)").next == "", "it is not interrupted"


def test_between_the_commit_and_the_boot() -> None:
    assert told(saved(1), phase=Phase.COMMITTED, here=True).next == "cpr recover"
    it = told(saved(1), phase=Phase.JUMPING, here=True)
    assert dict(it.counts) == {Place.WAITING: 1}
    assert it.next == "cpr recover, if the host does not go down"


def test_undone() -> None:
    it = told(saved(1), saved(2, Result.CONTINUED), phase=Phase.UNDONE, here=True)
    assert (dict(it.counts), it.open, it.next) == ({Place.CONTINUED: 2}, False, "")


def test_the_host_went_down_before_a_guest_was_saved() -> None:
    """Power loss: one was sealed, the other was not."""
    it = told(saved(1), saved(2, sealed=False), phase=Phase.SAVING)
    assert dict(it.counts) == {Place.WAITING: 1, Place.LOST: 1}
    assert it.next == "cpr restore"
    lost = told(saved(2, sealed=False), saved(1, Result.RESTORED), phase=Phase.SAVING)
    assert lost.next == "cpr restore --give-up guest2, and start afresh"


def test_saved_by_hand() -> None:
    it = told(saved(1), phase=Phase.COMMITTED, here=True, release="", mode=Mode.RESTART)
    assert it.by_hand
    assert it.next == "cpr load '/vm/web 1'"
    assert replace(it, here=False).next == "start it afresh", "its RAM ended with the host"
    kept = told(saved(1), phase=Phase.COMMITTED, release="")
    assert kept.next == "cpr load '/vm/web 1'"
    broken_off = told(saved(1), phase=Phase.SAVED, here=True, release="")
    assert broken_off.next == "cpr recover '/vm/web 1.manifest'"


@pytest.fixture
def base(tmp_path: Path) -> str:
    return str(tmp_path / "cpr")


def put(base: str, run: str, time: float, known: Manifest | None = None) -> str:
    directory = store.make_run(run, base)
    manifests.write(directory, replace(known or manifest(saved()), run=run, time=time))
    return directory


def test_stories_of_a_directory(base: str) -> None:
    assert stories(base) == ((), ())
    put(base, "b", 2.0)
    store.make_current(put(base, "a", 3.0, replace(manifest(saved()), boot_id=proc.boot_id())))
    damaged = put(base, "c", 1.0)
    os.mkdir(os.path.join(base, "reboot", "came-to-nothing"))
    with open(os.path.join(damaged, manifests.NAME), "r+b") as file:
        file.truncate(10)
    found, untold = stories(base)
    assert [(it.manifest.run, it.current, it.here) for it in found] == [("b", False, False), ("a", True, True)]
    (error,) = untold
    assert isinstance(error, ManifestError)
    assert damaged in error.message
    known = find("b", base)
    assert known is not None
    assert known == found[0]
    assert find("d", base) is None
    with pytest.raises(ManifestError):
        find("c", base)


def test_somebody_works_on_it(base: str) -> None:
    path = os.path.join(put(base, "a", 1.0), manifests.NAME)
    with store.hold(path, "restore"):
        ((it,), _) = stories(base)
        assert (it.worker, it.next) == (f"restore (pid {os.getpid()})", "")


def test_a_directory_that_cannot_be_read(tmp_path: Path) -> None:
    """A file stands where the directory should: as for somebody who may not look."""
    (tmp_path / "reboot").write_text("")
    found, (error,) = stories(str(tmp_path))
    assert found == ()
    assert isinstance(error, CprError)
    assert str(tmp_path / "reboot") in error.message
    assert "root" in error.hint
