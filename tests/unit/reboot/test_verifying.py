"""A saved guest that is not what it was is refused with every reason, and nothing is made that is missing."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cpr.errors import Exit
from cpr.linux import dax, proc
from cpr.model import Backing
from cpr.persistence import identity
from cpr.reboot import stamp
from cpr.reboot.files import StateFile, disk
from cpr.reboot.manifest import Manifest, Mode, Restore, Result, SavedGuest, SavedRam
from cpr.reboot.verifying import NotRestorable, located, verify
from tests.unit.reboot import saved

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 64 * 4096


@pytest.fixture
def known(tmp_path: Path) -> SavedGuest:
    """As it would be after a save, its process gone."""
    ram, state, image = tmp_path / "ram", tmp_path / "state", tmp_path / "disk"
    ram.write_bytes(os.urandom(SIZE))
    state.write_bytes(b"state")
    image.write_bytes(b"image")
    storage = dax.storage_of(str(ram))
    made = stamp.take(str(ram), SIZE, identity(storage))
    child = subprocess.Popen(["true"])
    child.wait()
    return replace(
        saved.guest(child.pid),
        own_namespaces=(),
        vfio=(),
        ram=(SavedRam(id="ram0", size=SIZE, path=str(ram), storage=storage, stamp=made),),
        state=StateFile(path=str(state), size=5, sha256=hashlib.sha256(b"state").hexdigest()),
        disks=(disk(str(image)),),
    )


def of(known: SavedGuest, *, booted: bool = False, mode: Mode = Mode.REBOOT) -> Manifest:
    return replace(saved.manifest(known), boot_id="another" if booted else proc.boot_id(), mode=mode)


def reasons(known: SavedGuest, manifest: Manifest | None = None) -> tuple[str, ...]:
    with pytest.raises(NotRestorable) as caught:
        verify(known, manifest or of(known))
    assert caught.value.code is Exit.BLOCKED
    assert "not touched" in caught.value.where
    return caught.value.reasons


@pytest.mark.parametrize("booted", [False, True])
def test_what_is_as_it_was(known: SavedGuest, booted: bool) -> None:
    verify(known, of(known, booted=booted))


@pytest.mark.parametrize("result", [r for r in Result if r is not Result.OPEN])
def test_only_once(known: SavedGuest, result: Result) -> None:
    gone = replace(known, restore=Restore(result=result, pid=99))
    assert len(reasons(gone)) == 1


def test_every_reason_is_told(known: SavedGuest, tmp_path: Path) -> None:
    (tmp_path / "ram").unlink()
    (tmp_path / "state").write_bytes(b"stale")
    (tmp_path / "disk").write_bytes(b"longer than before")
    ram, state, image = sorted(reasons(known), key=lambda text: ["RAM", "state", "disk"].index(_of(text)))
    assert "No such file" in ram
    assert "SHA-256" in state
    assert "5 bytes" in image
    assert not (tmp_path / "ram").exists()


def _of(text: str) -> str:
    return "RAM" if text.startswith("RAM") else "state" if "/state" in text else "disk"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.write_bytes(bytes(SIZE)), "the memory was wiped"),
        (lambda p: os.truncate(p, SIZE // 2), f"where {SIZE} are needed"),
        (lambda p: (p.unlink(), p.mkdir()), "no regular file"),
        (lambda p: (p.rename(p.with_name("x")), p.symlink_to("x")), "no regular file"),
    ],
)
def test_ram_that_is_not_what_it_was(known: SavedGuest, tmp_path: Path, change: object, words: str) -> None:
    assert callable(change)
    change(tmp_path / "ram")
    [reason] = reasons(known)
    assert words in reason


def test_a_regular_file_in_the_place_of_a_dax_device(known: SavedGuest) -> None:
    [ram] = known.ram
    there = replace(ram, storage=replace(ram.storage, kind=Backing.DEVDAX))
    [reason] = reasons(replace(known, ram=(there,)))
    assert "no device DAX" in reason
    assert located(replace(known, ram=(there,))).ram == (there,), "there is none to be found"


def test_ram_that_somebody_uses(known: SavedGuest) -> None:
    """A child of ours has it mapped shared."""
    script = "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0); print(flush=True); input()"
    command = [sys.executable, "-c", script, known.ram[0].path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        [reason] = reasons(known)
        assert f"in use by pid {child.pid}" in reason
        child.communicate(b"\n")


def test_the_old_process_is_still_there(known: SavedGuest) -> None:
    own = replace(known, pid=os.getpid(), likeness=saved.likeness())
    [reason] = reasons(own)
    assert f"pid {os.getpid()}) is still there" in reason
    verify(own, of(own, booted=True))  # after a boot it is somebody else's pid


def test_after_a_boot(known: SavedGuest) -> None:
    [reason] = reasons(known, of(known, booted=True, mode=Mode.RESTART))
    assert "its RAM is gone" in reason
    [reason] = reasons(replace(known, own_namespaces=("net",)), of(known, booted=True))
    assert "namespaces of its own (net)" in reason


def test_what_was_not_sealed(known: SavedGuest) -> None:
    [reason] = reasons(replace(known, state=None))
    assert "not saved to the end" in reason
    [reason] = reasons(replace(known, ram=(replace(known.ram[0], stamp=None),)))
    assert "not stamped" in reason


def test_ram_that_is_made_anew_has_nothing_to_be_compared(known: SavedGuest, tmp_path: Path) -> None:
    """But nobody else may have it, and huge pages are not made of others."""
    gone = str(tmp_path / "gone")
    storage = replace(known.ram[0].storage, kind=Backing.TMPFS, path=gone)
    ram = SavedRam(id="ram0", size=SIZE, path="", storage=storage, volatile=True)
    for anew in (ram, replace(ram, path=gone), replace(ram, path=known.ram[0].path)):
        verify(replace(known, ram=(anew,)), of(known, booted=True))
    script = "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0); print(flush=True); input()"
    command = [sys.executable, "-c", script, known.ram[0].path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        [reason] = reasons(replace(known, ram=(replace(ram, path=known.ram[0].path),)))
        assert f"in use by pid {child.pid}" in reason
        child.communicate(b"\n")
    huge = replace(ram, path=gone, storage=replace(storage, kind=Backing.HUGETLB))
    [reason] = reasons(replace(known, ram=(huge,)))
    assert f"no hugetlbfs is mounted at {tmp_path}" in reason
