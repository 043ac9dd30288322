"""Real binaries, asked what they know."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cpr.linux import proc
from cpr.qemu import features
from tests.qemu.surveying import KEYS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.lab.qemu import QemuBuild


@pytest.mark.parametrize("key", KEYS)
def test_what_they_know(builds: Callable[[str], QemuBuild], key: str) -> None:
    build = builds(key)
    before = proc.children(os.getpid())
    target = features.ask(str(build.binary), extra_options=("-boot", "menu=on"))
    status = build.binary.stat()
    assert target.binary.version == build.version
    assert build.package in target.binary.package
    assert target.binary.identity == (status.st_dev, status.st_ino)
    assert target.binary.build_id == build.build_id
    assert target.machine_aliases["q35"] in target.machines
    assert "none" not in target.machines
    assert {"virtio-blk-pci", "pc-dimm", "loader"} <= target.device_types
    assert {"add_client", "getfd", "query-fdsets"} <= target.commands
    assert "x-ignore-shared" in target.capabilities
    assert ("cpr-transfer" in target.migrate_modes) is (key != "7.2")
    assert ("cpr-exec" in target.migrate_modes) is key.startswith("11")
    assert target.options.option("daemonize")
    assert target.options.option("run-with") is (key != "7.2")
    assert target.extra_options == ("-boot", "menu=on")
    assert proc.children(os.getpid()) == before


def test_a_copy_without_its_modules(builds: Callable[[str], QemuBuild], tmp_path: Path) -> None:
    """QEMU 7.2's TCG is a module beside the binary; a copy alone has no accelerator where there is no KVM."""
    copy = tmp_path / "qemu-system-x86_64"
    shutil.copy(builds("7.2").binary, copy)
    words = "from cpr.qemu import features; features.ask(sys.argv[1])"
    command = [sys.executable, "-c", f"import sys; {words}", str(copy)]
    if os.path.exists("/dev/kvm"):
        hide = 'mount --bind /dev/null /dev/kvm && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", hide, "sh", *command]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    said = result.stderr.splitlines()[-1]
    assert "BinaryUnusable" in said
    assert "accel" in said
