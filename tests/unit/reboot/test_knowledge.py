"""What is written down of a living process, and what is made again after a boot."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

from cpr.reboot import manifest as manifests
from cpr.reboot.knowledge import make_directories, module_directory_in, same_file
from cpr.reboot.manifest import Directory, Phase
from tests.unit import values
from tests.unit.reboot.saved import guest, manifest

if TYPE_CHECKING:
    from pathlib import Path


def test_directories_are_made_again(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir(mode=0o755)
    wanted = [tmp_path / "run" / "web1", kept]
    make_directories(Directory(path=str(p), uid=os.geteuid(), gid=os.getegid(), mode=0o2750) for p in wanted)
    assert stat.S_IMODE(wanted[0].stat().st_mode) == 0o2750
    assert stat.S_IMODE(kept.stat().st_mode) == 0o755, "what is there is left as it is"


def test_the_directory_of_modules() -> None:
    paths = ("/usr/lib/libc.so", "/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so", "[heap]", "")
    assert module_directory_in(paths) == "/usr/lib/x86_64-linux-gnu/qemu"
    assert module_directory_in(paths[:1]) == ""


def test_the_same_file(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("x")
    two.write_text("x")
    assert same_file(os.stat(one), os.stat(one))
    assert not same_file(os.stat(one), os.stat(two))
    assert same_file(os.stat("/dev/null"), os.stat("/dev/null"))
    assert not same_file(os.stat("/dev/null"), os.stat("/dev/zero"))


def test_a_manifest_with_all_that_is_known_of_a_guest() -> None:
    """Every fact comes back as it was: the command line of the new QEMU is made from them."""
    known = replace(
        manifest(replace(guest(), guest=values.guest(), state=None, settings={"a": [1]}, stopped_at=1.5)),
        phase=Phase.SAVING,
    )
    assert manifests.decode(manifests.encode(known)) == known
