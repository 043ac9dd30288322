"""An address space that is held outlasts the exec of its process, and not us."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from typing import TYPE_CHECKING

import pytest

from cpr.linux import syscalls
from cpr.linux.address_space import AddressSpace
from cpr.linux.fds import Fd
from cpr.linux.proc import read_argv
from tests.kernel.support import FOREVER, SLEEP, eventually, python

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

MAPS_AND_EXECS = f"""
import mmap, os, sys
memory = mmap.mmap(MEMORY, mmap.PAGESIZE)
memory[0] = 1
print("mapped", flush=True)
sys.stdin.readline()
os.execv({SLEEP!r}, {list(FOREVER)!r})
"""


def may_hold() -> bool:
    try:
        os.close(syscalls.userfaultfd(os.O_CLOEXEC))
    except OSError:
        return False
    return True


pytestmark = pytest.mark.skipif(not may_hold(), reason="this user may not make a userfaultfd")


@pytest.fixture
def memory() -> Iterator[Fd]:
    """A memory file of which the kernel tells whether anybody has it mapped: it cannot be sealed then."""
    with Fd(os.memfd_create("mapped", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as fd:
        os.ftruncate(fd.number, mmap.PAGESIZE)
        yield fd


def is_mapped(memory: Fd) -> bool:
    try:
        fcntl.fcntl(memory.number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return True
        raise
    return False


def execs(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()
    eventually(lambda: read_argv(child.pid) == FOREVER)


@contextlib.contextmanager
def started(memory: Fd) -> Iterator[subprocess.Popen[str]]:
    """A child that has mapped it."""
    code = MAPS_AND_EXECS.replace("MEMORY", str(memory.number))
    with python(code, pass_fds=[memory.number]) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "mapped\n"
        yield child


def test_it_outlasts_the_exec(memory: Fd) -> None:
    with started(memory) as child:
        with AddressSpace.hold(child.pid) as held:
            execs(child)
            assert is_mapped(memory)
            held.release()
            held.release()
        assert not is_mapped(memory)


def test_without_it_does_not(memory: Fd) -> None:
    with started(memory) as child:
        AddressSpace.hold(child.pid).close()
        assert is_mapped(memory)
        execs(child)
        assert not is_mapped(memory)


def test_the_process_may_end(memory: Fd) -> None:
    with started(memory) as child:
        with AddressSpace.hold(child.pid):
            child.kill()
            child.wait()
            assert is_mapped(memory)
        assert not is_mapped(memory)


def test_we_may_be_killed(memory: Fd) -> None:
    holds = (
        "import sys\nfrom cpr.linux.address_space import AddressSpace\n"
        "held = AddressSpace.hold(int(sys.stdin.readline()))\nprint('held', flush=True)\nsys.stdin.readline()"
    )
    with started(memory) as child:
        with python(holds) as holder:
            assert holder.stdout is not None
            assert holder.stdin is not None
            holder.stdin.write(f"{child.pid}\n")
            holder.stdin.flush()
            assert holder.stdout.readline() == "held\n"
            execs(child)
            assert is_mapped(memory)
            holder.kill()
            holder.wait()
        eventually(lambda: not is_mapped(memory))


def test_nobody_there() -> None:
    with python("pass") as child:
        child.wait()
        with pytest.raises(ProcessLookupError):
            AddressSpace.hold(child.pid)
