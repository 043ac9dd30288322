"""Descriptors, our own and those of a child."""

from __future__ import annotations

import contextlib
import errno
import os
import signal

import pytest

from cpr.linux import syscalls as sc
from cpr.linux.fds import Fd, FdSet, descriptor_table, memory_file, open_pidfd, take_fd
from tests.kernel.support import can, child, eventually, python


def test_fd_owns_its_number() -> None:
    fd = Fd(os.memfd_create("x"))
    number = fd.number
    with fd:
        other = fd.dup()
        assert os.fstat(other.number).st_ino == os.fstat(number).st_ino
        assert not os.get_inheritable(other.number)
    assert fd.closed
    with pytest.raises(OSError):
        os.fstat(number)
    with pytest.raises(ValueError):
        fd.number  # noqa: B018
    fd.close()
    stolen = other.steal()
    del other
    os.close(stolen)


def test_fd_is_closed_with_the_object() -> None:
    number = Fd(os.memfd_create("x")).number
    with pytest.raises(OSError):
        os.fstat(number)


def test_fdset_closes_what_was_not_stolen() -> None:
    with FdSet() as fds:
        first = fds.add("a", Fd(os.memfd_create("a")))
        fds.add("b", Fd(os.memfd_create("b")))
        assert fds.names() == ("a", "b")
        stolen = fds.steal("b")
        assert "b" not in fds
        double = Fd(os.memfd_create("a2"))
        with pytest.raises(KeyError):
            fds.add("a", double)
        assert double.closed
    assert first.closed
    os.fstat(stolen.number)
    stolen.close()


CODE = """
import os, sys
fd = os.memfd_create("guest")
os.write(fd, b"0123456789")
print(fd, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(
    not can(lambda: take_fd(os.getppid(), 0).close()), reason="pidfd_getfd is not allowed here"
)
def test_take_fd_is_the_same_open_file_description() -> None:
    with python(CODE) as process:
        assert process.stdout is not None
        number = int(process.stdout.readline())
        with (
            take_fd(process.pid, number) as fd,
            open_pidfd(process.pid) as pidfd,
            take_fd(pidfd, number) as twin,
        ):
            assert os.lseek(fd.number, 0, os.SEEK_CUR) == 10
            os.lseek(fd.number, 3, os.SEEK_SET)
            row = next(r for r in descriptor_table(process.pid) if r.number == number)
            assert row.position == 3
            assert row.target == "/memfd:guest (deleted)"
            assert row.close_on_exec
            assert row.flags & os.O_ACCMODE == os.O_RDWR
            assert (row.device, row.inode) == (os.fstat(fd.number).st_dev, os.fstat(fd.number).st_ino)
            with contextlib.suppress(OSError):  # ENOSYS without CONFIG_KCMP
                assert sc.kcmp(os.getpid(), process.pid, sc.KCMP_FILE, twin.number, number) == 0
            with pytest.raises(OSError) as caught:
                take_fd(process.pid, 9999)
            assert caught.value.errno == errno.EBADF
            process.kill()
            process.wait()
            assert os.pread(fd.number, 20, 0) == b"0123456789"
            with pytest.raises(ProcessLookupError):
                take_fd(pidfd, number)


def test_descriptor_table_of_a_vanished_process() -> None:
    with child() as pid:
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not open(f"/proc/{pid}/cmdline").read())
    with pytest.raises(ProcessLookupError):
        descriptor_table(pid)


def test_eventfd_and_pipe_have_their_names_and_counts() -> None:
    with Fd(os.eventfd(5)) as event:
        row = next(r for r in descriptor_table(os.getpid()) if r.number == event.number)
        assert row.target == "anon_inode:[eventfd]"
        assert dict(row.extra)["eventfd-count"].strip() == "5"


def test_pty_number() -> None:
    master, slave = os.openpty()
    try:
        assert os.ttyname(slave) == f"/dev/pts/{sc.pty_number(master)}"
        with pytest.raises(OSError):
            sc.pty_number(0)
    finally:
        os.close(master)
        os.close(slave)


def test_tun_interface() -> None:
    import fcntl
    import struct

    try:
        number = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        pytest.skip("no /dev/net/tun")
    with Fd(number) as tun:
        with pytest.raises(OSError):
            sc.tun_interface(tun.number)
        try:
            fcntl.ioctl(
                tun.number, 0x400454CA, struct.pack("16sH22x", b"cprtest%d", sc.IFF_TAP | sc.IFF_NO_PI)
            )
        except OSError as error:
            pytest.skip(f"no tap can be made: {error}")
        name, flags = sc.tun_interface(tun.number)
        assert name.startswith("cprtest")
        assert flags & sc.IFF_TAP


def test_a_memory_file() -> None:
    with memory_file("cpr-ram0", 3 << 20) as made:
        assert os.fstat(made.number).st_size == 3 << 20
        assert os.readlink(f"/proc/self/fd/{made.number}").startswith("/memfd:cpr-ram0")
        assert not os.get_inheritable(made.number)
    with pytest.raises(OSError):
        memory_file("cpr-ram0", -1)
