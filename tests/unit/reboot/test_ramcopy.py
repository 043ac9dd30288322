"""RAM in the state: in which form, and whether a directory will do for it."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cpr.linux.dax import storage_of
from cpr.model import Backing, MonitorAddress, ProcessId, Storage
from cpr.qemu.migration import MAPPED
from cpr.reboot import ramcopy
from cpr.reboot.manifest import RamCopy
from tests.unit import values
from tests.unit.checks.facts import guest, target

if TYPE_CHECKING:
    from pathlib import Path

    from cpr.model import RamBlock

HAS = tuple((name, False) for name in ("x-ignore-shared", "events", *MAPPED))
KNOWS = frozenset(name for name, _ in HAS)
MEMFD = replace(values.ram(), storage=Storage(kind=Backing.MEMFD, path="/memfd:ram"))
PLAIN = replace(values.ram(), backing=Backing.ANONYMOUS, qom_type="memory-backend-ram", named_file=False, path="",
                shared=False)  # fmt: skip


def how(block: RamBlock = PLAIN, *, knows: frozenset[str] = KNOWS, **changes: Any) -> RamCopy:
    known = {"capabilities": HAS, "process": ProcessId(os.getpid(), 1), "ram": (block,), **changes}
    return ramcopy.how(guest(**known), target(capabilities=knows), {"ram0"})


def test_both_have_to_know_mapped_ram() -> None:
    assert how() is RamCopy.MAPPED
    assert how(capabilities=HAS[:-1]) is RamCopy.STREAM
    assert how(knows=KNOWS - {"mapped-ram"}) is RamCopy.STREAM
    assert ramcopy.how(guest(capabilities=HAS, ram=(PLAIN,)), None, {"ram0"}) is RamCopy.STREAM
    assert ramcopy.how(guest(capabilities=HAS), target(capabilities=KNOWS), ()) is RamCopy.NONE


def test_no_descriptor_passes_a_tcp_monitor() -> None:
    assert how(monitor=MonitorAddress(label="m", host="127.0.0.1", port=4444)) is RamCopy.STREAM


def test_a_limit_on_the_size_of_files_would_end_qemu() -> None:
    assert how(limits={"RLIMIT_FSIZE": (1 << 30, 1 << 30)}) is RamCopy.STREAM
    assert how(limits={"RLIMIT_FSIZE": (-1, -1)}) is RamCopy.MAPPED


def test_zeroes_are_left_out_only_where_no_page_is_there_before(tmp_path: Path) -> None:
    file = tmp_path / "ram"
    file.write_bytes(b"a template")
    named = replace(values.ram(), backing=Backing.TMPFS, path=str(file))
    assert how(named) is RamCopy.STREAM
    assert how(replace(named, shared=False, backing=Backing.DISK_FILE)) is RamCopy.STREAM
    assert how(replace(named, backing=Backing.HUGETLB, path=str(tmp_path))) is RamCopy.MAPPED, "a file without a name"
    assert how(replace(named, path=tmp_path.name), cwd=str(tmp_path.parent)) is RamCopy.MAPPED
    assert how(MEMFD) is RamCopy.MAPPED
    updated = Storage(kind=Backing.TMPFS, path="/dev/shm/ram")
    assert how(replace(values.ram(), storage=updated)) is RamCopy.STREAM, "an update has put a number for its name"


def test_flash_memory_is_there_before_it_is_loaded() -> None:
    for words in (("-drive", "if=pflash,file=/fw/code.fd"), ("-machine", '{"type":"q35","pflash0":"n0"}')):
        assert how(argv=(*guest().argv, *words)) is RamCopy.STREAM
    assert how(config_files=(("/vm.cfg", '[drive]\n  if = "pflash"\n'),)) is RamCopy.STREAM


def test_the_capabilities_of_each_form() -> None:
    """With x-ignore-shared RAM of a memfd, or in a file on /dev/shm, would be left out."""
    for form, names in ramcopy.CAPABILITIES.items():
        assert ("x-ignore-shared" in names) is (form is RamCopy.NONE)
        assert ("mapped-ram" in names) is ("multifd" in names) is (form is RamCopy.MAPPED)


@pytest.mark.parametrize(
    ("version", "expected"), [("7.2.22", ()), ("8.1.0", ("b",)), ("11.1.3", ("b",)), (None, ("b",))]
)
def test_what_a_trial_would_copy(version: str | None, expected: tuple[str, ...]) -> None:
    memfd = replace(values.ram("b"), named_file=False)
    of = guest(binary=replace(values.binary(), version=version), ram=(values.ram("a"), memfd, replace(PLAIN, id="c")))
    assert ramcopy.copied_by_a_trial(of) == expected


def test_a_directory_that_will_do(tmp_path: Path) -> None:
    if storage_of(str(tmp_path)).kind is not Backing.DISK_FILE:
        pytest.skip("the tests' directory is not on a disk")
    mine = tmp_path / "ram"
    for there in (False, True):
        if there:
            mine.mkdir(mode=0o700)
        found = ramcopy.ram_directory(str(mine), "ro", timeout=120)
        assert (found.volatile, found.unusable, found.unmeasured) == ("", "", "")
        assert found.rate
        assert found.free > 0
        assert (found.path, found.timeout) == (str(mine), 120)
        assert mine.exists() is there, "looking makes nothing"
    assert os.listdir(mine) == []


def test_directories_that_will_not_do(tmp_path: Path) -> None:
    mine = tmp_path / "ram"
    mine.mkdir(mode=0o755)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(mine)
    for name, words in {"ram": "0755", "file": "no directory", "link": "no directory"}.items():
        found = ramcopy.ram_directory(str(tmp_path / name), "ro")
        assert words in found.unusable
        assert found.rate is None
    if storage_of("/dev/shm").kind is Backing.TMPFS:
        found = ramcopy.ram_directory("/dev/shm/not-there", "ro")
        assert "RAM of this kernel" in found.volatile
        assert found.rate is None


def test_what_cannot_be_measured_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if storage_of(str(tmp_path)).kind is not Backing.DISK_FILE:
        pytest.skip("the tests' directory is not on a disk")

    def refuse(path: str) -> float:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(ramcopy, "write_rate", refuse)
    found = ramcopy.ram_directory(str(tmp_path / "ram"), "ro")
    assert (found.rate, found.volatile, found.unusable) == (None, "", "")
    assert found.unmeasured == f"a test file cannot be written in {tmp_path}: Operation not supported"
    monkeypatch.setattr(ramcopy, "ROOM_TO_MEASURE", 1 << 60)
    assert "too little room" in ramcopy.ram_directory(str(tmp_path), "ro").unmeasured
