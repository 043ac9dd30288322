"""Cgroups of v1, v2 and both, as recorded on hosts with and without systemd and in containers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cpr.linux import cgroup, procfile
from cpr.linux.cgroup import Cgroup, locate, parse_cgroup, parse_cgroup_mounts, unit_in

if TYPE_CHECKING:
    from pathlib import Path

HYBRID = """\
12:cpu,cpuacct:/machine.slice/machine-qemu\\x2d1\\x2dweb.scope/emulator
3:memory:/machine.slice/machine-qemu\\x2d1\\x2dweb.scope
1:name=systemd:/machine.slice/machine-qemu\\x2d1\\x2dweb.scope
0::/machine.slice/machine-qemu\\x2d1\\x2dweb.scope
"""

MOUNTS = """\
23 28 0:21 / /sys rw,nosuid shared:7 - sysfs sysfs rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 master:3 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/my\\040memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 /docker/abc /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
damaged line
42 31 0:39
"""


def test_parse() -> None:
    cpu, memory, systemd, unified = parse_cgroup(HYBRID)
    assert cpu.controllers == ("cpu", "cpuacct")
    assert memory.path == "/machine.slice/machine-qemu\\x2d1\\x2dweb.scope"
    assert systemd.controllers == ("name=systemd",)
    assert unified == Cgroup(hierarchy=0, controllers=(), path=memory.path)
    assert unified.unified
    assert not systemd.unified
    assert parse_cgroup("0::/a:b::c\n")[0].path == "/a:b::c"
    assert parse_cgroup("") == []


@pytest.mark.parametrize("text", ["0", "0:", "x::/", "0:/a", "0::relative", "1:cpu"])
def test_parse_damaged(text: str) -> None:
    with pytest.raises(ValueError, match="not a line"):
        parse_cgroup(text)


def test_directories() -> None:
    mounts = parse_cgroup_mounts(MOUNTS)
    assert len(mounts) == 4

    def where(controllers: str, path: str) -> str | None:
        names = tuple(controllers.split(",")) if controllers else ()
        return locate(Cgroup(hierarchy=1 if names else 0, controllers=names, path=path), mounts)

    assert where("cpu,cpuacct", "/a/b") == "/sys/fs/cgroup/cpu,cpuacct/a/b"
    assert where("memory", "/") == "/sys/fs/cgroup/my memory"
    assert where("name=systemd", "/x") == "/sys/fs/cgroup/systemd/x"
    assert where("", "/docker/abc/inner") == "/sys/fs/cgroup/unified/inner"
    assert where("", "/docker/abc") == "/sys/fs/cgroup/unified"
    assert where("", "/docker/abcd") is None
    assert where("", "/elsewhere") is None
    assert where("pids", "/") is None


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("/system.slice/qemu@web.service", "qemu@web.service"),
        ("/machine.slice/machine-qemu\\x2d1.scope/libvirt/emulator", "machine-qemu\\x2d1.scope"),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/vm.service", "vm.service"),
        ("/user.slice/user-1000.slice/session-3.scope", "session-3.scope"),
        ("/", None),
        ("/docker/abc", None),
    ],
)
def test_unit(path: str, unit: str | None) -> None:
    assert unit_in(path) == unit


def test_room_is_the_smallest_of_all_ancestors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """v2: the limit of a parent holds for the child, page cache that goes at once is no use."""
    inner = tmp_path / "slice" / "scope"
    inner.mkdir(parents=True)
    (tmp_path / "slice" / "memory.max").write_text("1000\n")
    (tmp_path / "slice" / "memory.current").write_text("700\n")
    (tmp_path / "slice" / "memory.stat").write_text("anon 1\ninactive_file 100\n")
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("600\n")
    (inner / "pids.max").write_text("50\n")
    (inner / "pids.current").write_text("60\n")
    texts = {
        "cgroup": "0::/slice/scope\n",
        "mountinfo": f"41 31 0:38 / {tmp_path} rw - cgroup2 cgroup2 rw\n",
    }
    monkeypatch.setattr(procfile, "read_text", lambda _, name: texts[name])
    assert cgroup.memory_room(1) == 400
    assert cgroup.pids_room(1) == 0
    (tmp_path / "slice" / "memory.max").write_text("max\n")
    assert cgroup.memory_room(1) is None


def test_v1_says_unlimited_by_a_huge_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (tmp_path / "memory.usage_in_bytes").write_text("5\n")
    texts = {"cgroup": "4:memory:/\n", "mountinfo": f"41 31 0:38 / {tmp_path} rw - cgroup cgroup rw,memory\n"}
    monkeypatch.setattr(procfile, "read_text", lambda _, name: texts[name])
    assert cgroup.memory_room(1) is None
    (tmp_path / "memory.limit_in_bytes").write_text("100\n")
    assert cgroup.memory_room(1) == 95
