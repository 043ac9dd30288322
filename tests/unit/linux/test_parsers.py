"""Texts of /proc: recorded ones, ones that a hostile process can make, and ones that are cut short."""

from __future__ import annotations

import resource

import pytest

from cpr.linux.fds import parse_fdinfo
from cpr.linux.launch import parse_id_map
from cpr.linux.maps import parse_maps
from cpr.linux.proc import parse_environ, parse_limits, split_argv
from cpr.linux.procfile import unescape
from cpr.linux.status import parse_stat, parse_status

MAPS = """\
55d0c0a00000-55d0c1000000 r-xp 00355000 fe:00 1054321                    /usr/bin/qemu-system-x86_64
7f1c40000000-7f1cc0000000 rw-s 00000000 00:01 2077                       /memfd:memory-backend-memfd (deleted)
7f1cd0000000-7f1cd0021000 rw-p 00000000 00:00 0
7f1ce0000000-7f1ce0001000 rw-s 00002000 00:16 9                          /dev/shm/a b\\012c
7ffd1b9c2000-7ffd1b9e3000 rw-p 00000000 00:00 0                          [stack]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
"""


def test_maps() -> None:
    program, memfd, anonymous, named, stack, vsyscall = parse_maps(MAPS)
    assert (program.path, program.device, program.inode, program.offset) == (
        "/usr/bin/qemu-system-x86_64", (0xFE, 0), 1054321, 0x355000,
    )  # fmt: skip
    assert (memfd.path, memfd.deleted, memfd.size, memfd.shared) == (
        "/memfd:memory-backend-memfd",
        True,
        2 << 30,
        True,
    )
    assert (anonymous.path, anonymous.inode, anonymous.shared) == ("", 0, False)
    assert named.path == "/dev/shm/a b\nc"
    assert stack.path == "[stack]"
    assert vsyscall.end == 0xFFFFFFFFFF601000
    assert parse_maps("") == []


@pytest.mark.parametrize(
    "text", [MAPS[:30], MAPS[:-40], "nonsense\n", "1-2 rwxp 0 0:0\n", "1-2 rwxq 0 0:0 0 \n"]
)
def test_maps_that_are_damaged(text: str) -> None:
    if text == MAPS[:-40]:
        text = text.rpartition("\n")[0] + "\nffffffffff600000-ff"
    with pytest.raises(ValueError, match="not a line"):
        parse_maps(text)


STATUS = """\
Name:	qemu-system-x86
Umask:	0022
State:	S (sleeping)
Tgid:	4242
Ngid:	0
Pid:	4242
PPid:	1
TracerPid:	0
Uid:	107	107	107	107
Gid:	107	108	107	107
FDSize:	64
Groups:	36 107 64055 
NStgid:	4242	1
NSpid:	4242	1
VmPeak:	 5000000 kB
VmRSS:	  123456 kB
Threads:	6
SigQ:	0/31203
SigIgn:	0000000000001000
CapInh:	0000000000000000
CapPrm:	0000000000001000
CapEff:	0000000000001000
CapBnd:	000001ffffffffff
CapAmb:	0000000000001000
NoNewPrivs:	1
Seccomp:	2
Seccomp_filters:	1
"""  # noqa: W291


def test_status() -> None:
    status = parse_status(STATUS)
    assert status.name == "qemu-system-x86"
    assert status.state == "S"
    assert status.umask == 0o022
    assert status.uids == (107, 107, 107, 107)
    assert status.gids == (107, 108, 107, 107)
    assert status.groups == (36, 107, 64055)
    assert status.ns_pids == (4242, 1)
    assert status.rss == 123456 * 1024
    assert status.effective == 1 << 12
    assert status.bounding == (1 << 41) - 1
    assert status.no_new_privs
    assert (status.seccomp, status.seccomp_filters) == (2, 1)
    assert status.ignored == 1 << 12


def test_status_of_kernel_threads_zombies_and_old_kernels() -> None:
    """A zombie has no Umask and no VmRSS; kernel 4.9 has no NSpid without namespaces, none before 5.9 has filters."""
    gone = ("Umask", "VmRSS", "NSpid", "Seccomp_filters", "CapAmb")
    status = parse_status("".join(line + "\n" for line in STATUS.splitlines() if not line.startswith(gone)))
    assert (status.umask, status.rss, status.ns_pids, status.seccomp_filters) == (None, 0, (4242,), None)


def test_status_cannot_be_forged_by_the_name() -> None:
    """The kernel escapes the newline; and even if it did not, what comes first counts and Name is no other line."""
    assert parse_status(STATUS.replace("qemu-system-x86", "x\\nUid:\\t0\\t0\\t0\\t0")).uids[0] == 107


@pytest.mark.parametrize("cut", [0, 10, 200, len(STATUS) // 2])
def test_status_that_is_cut_short(cut: int) -> None:
    with pytest.raises(ValueError):
        parse_status(STATUS[:cut])


STAT = "4242 (qemu) S 1 4242 4242 34816 -1 4194560 1 0 0 0 5 6 0 0 20 0 6 0 98765 5000000 300 18446744073709551615 0"


@pytest.mark.parametrize("comm", ["qemu", "a) R 1 (b", "((", "x\ny", ") S 1 1 1", ""])
def test_stat_with_any_name(comm: str) -> None:
    stat = parse_stat(STAT.replace("(qemu)", f"({comm})"))
    assert (stat.pid, stat.comm, stat.state, stat.ppid, stat.start_time) == (4242, comm, "S", 1, 98765)
    assert (stat.session, stat.tty) == (4242, 34816)


@pytest.mark.parametrize("text", ["", "4242", "4242 (qemu", "4242 (qemu) S 1 2", ")(", "x (y) " + "z " * 30])
def test_stat_that_is_damaged(text: str) -> None:
    with pytest.raises(ValueError):
        parse_stat(text)


def test_argv_and_environ() -> None:
    assert split_argv(b"") == ()
    assert split_argv(b"\0") == ("",)
    assert split_argv(b"a\0\0b\xff\0") == ("a", "", "b\udcff")
    assert split_argv(b"title without end") == ("title without end",)
    assert parse_environ(b"A=1\0B=\0C=x=y\0junk\0=odd\0\0A=2\0D=\xfe") == (
        ("A", "1"), ("B", ""), ("C", "x=y"), ("A", "2"), ("D", "\udcfe"),
    )  # fmt: skip


def test_limits() -> None:
    text = (
        "Limit                     Soft Limit           Hard Limit           Units     \n"
        "Max cpu time              unlimited            unlimited            seconds   \n"
        "Max open files            1024                 524288               files     \n"
        "Max nice priority         0                    0                    \n"
        "Max something new         1                    2                    \n"
    )
    infinity = resource.RLIM_INFINITY
    assert parse_limits(text) == {
        "RLIMIT_CPU": (infinity, infinity), "RLIMIT_NOFILE": (1024, 524288), "RLIMIT_NICE": (0, 0),
    }  # fmt: skip


def test_fdinfo() -> None:
    info = parse_fdinfo(
        "pos:\t17\nflags:\t02104002\nmnt_id:\t12\nino:\t99\neventfd-count:                5\ntfd: 1\ntfd: 2\n"
    )
    assert (info.position, info.flags, info.mount_id) == (17, 0o2104002, 12)
    assert info.extra == (("eventfd-count", "5"), ("tfd", "1"), ("tfd", "2"))
    for text in ("", "pos:\t0\n", "flags:\tx\n"):
        with pytest.raises(ValueError):
            parse_fdinfo(text)


def test_unescape() -> None:
    assert unescape(r"/a\040b\134c\012d") == "/a b\\c\nd"
    assert unescape(r"/plain\x \9 \04") == r"/plain\x \9 \04"
    assert unescape(r"\377") == "\udcff"


def test_id_map() -> None:
    assert parse_id_map("         0     100000      65536\n     70000          5          1\n") == [
        (0, 100000, 65536), (70000, 5, 1),
    ]  # fmt: skip
    assert parse_id_map("") == []
