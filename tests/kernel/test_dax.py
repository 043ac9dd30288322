"""What files really are on real mounts: tmpfs, ramfs, huge pages, overlays, and ext4 on loop devices."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cpr.linux.dax import OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC
from cpr.linux.syscalls import statfs_type

if TYPE_CHECKING:
    from pathlib import Path

MOUNTS = r"""
mount --make-rprivate / || exit 77
cd "$1" && mkdir tmpfs ramfs huge upper upper/u upper/w lower over diskover loop ramloop || exit 77
mount -t tmpfs none tmpfs && : > tmpfs/f || exit 77
mount -t ramfs none ramfs && : > ramfs/f
mount -t hugetlbfs none huge && : > huge/f
mkdir tmpfs/u tmpfs/w
mount -t overlay none -o "lowerdir=$1/lower,upperdir=$1/tmpfs/u,workdir=$1/tmpfs/w" over && : > over/f
mount -t overlay none -o "lowerdir=$1/lower,upperdir=$1/upper/u,workdir=$1/upper/w" diskover && : > diskover/f
for where in . tmpfs; do
    truncate -s 16M $where/image && mkfs.ext4 -q $where/image
done
mount -o loop image loop && : > loop/f
mount -o loop tmpfs/image ramloop && : > ramloop/f
"$2" -c '
import json, os, sys
from cpr.linux.dax import storage_of
from cpr.persistence import persistence
found = {}
for name in sys.argv[1:]:
    if os.path.exists(name + "/f"):
        storage = storage_of(name + "/f")
        found[name] = (storage.kind, storage.filesystem, persistence(storage, "").kept, len(storage.fs_uuid))
print(json.dumps(found))
' tmpfs ramfs huge over diskover loop ramloop
for name in loop ramloop; do umount $name; done 2> /dev/null
exit 0
"""

EXPECTED = {
    "tmpfs": ["tmpfs", "tmpfs", False, 0],
    "ramfs": ["tmpfs", "ramfs", False, 0],
    "huge": ["hugetlb", "hugetlbfs", False, 0],
    "over": ["tmpfs", "overlay", False, 0],
    "loop": ["file", "ext4", True, 36],
    "ramloop": ["file", "ext4", False, 36],
}


def test_real_mounts(tmp_path: Path) -> None:
    """In a mount namespace of our own. What cannot be mounted here is not judged."""
    words = ["unshare", "--mount", "sh", "-c", MOUNTS, "sh", str(tmp_path), sys.executable]
    try:
        done = subprocess.run(words, env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
                              capture_output=True, text=True, check=False)  # fmt: skip
    except FileNotFoundError:
        pytest.skip("no unshare(1)")
    if done.returncode:
        pytest.skip(f"no mounts here: {done.stderr.strip()[-200:]}")
    found = json.loads(done.stdout)
    assert found["tmpfs"] == EXPECTED["tmpfs"]
    below = found.pop("diskover", None)
    assert below is None or below[1] == "overlay"
    if statfs_type(str(tmp_path)) in (TMPFS_MAGIC, OVERLAYFS_SUPER_MAGIC):
        found.pop("loop", None)  # it is as lasting as where we are
    assert found == {name: EXPECTED[name] for name in found}
