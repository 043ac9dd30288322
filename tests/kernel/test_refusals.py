"""Processes that cannot be traced, each of them real: what is told beforehand is what the kernel does."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cpr.errors import Blocked
from cpr.linux import proc, stub, traceable
from cpr.linux.process import open_process
from tests.kernel.support import can, child
from tests.kernel.tracees import counting_child, deny_execve

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.skipif(stub.architecture() is None, reason="not on this architecture"),
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root has something to give up"),
]

ROOT = Path(__file__).parents[2]
ATTEMPT = """
import json, sys
from cpr.linux import traceable
from cpr.linux.process import open_process
from cpr.linux.tracee import Tracee
pid = int(sys.argv[1])
found = traceable.refusal(pid)
try:
    with open_process(pid) as process, Tracee.attach(process) as tracee:
        tried = str(tracee.call("getpid"))
except Exception as error:
    tried = type(error).__name__
print(json.dumps([getattr(found, "ability", ""), str(found), tried]))
"""


def attempt(pid: int, *, without: str = "", prefix: str = "") -> tuple[str, str, str]:
    """(missing ability, what is told, what the kernel says to it) of somebody without a capability."""
    give_up = ("setpriv", f"--bounding-set=-{without}", f"--inh-caps=-{without}") if without else ()
    command = [*give_up, sys.executable, "-c", prefix + ATTEMPT, str(pid)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    ability, told, tried = json.loads(shown.stdout)
    return ability, told, tried


def test_another_user_without_the_capability() -> None:
    def become_nobody() -> None:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)

    with child(prepare=become_nobody) as pid:
        ability, told, tried = attempt(pid, without="sys_ptrace")
        assert (ability, tried) == ("CAP_SYS_PTRACE", "PermissionError")
        assert "65534" in told
        assert attempt(pid)[::2] == ("", str(pid))


def test_one_with_more_capabilities() -> None:
    with child() as pid:
        ability, told, tried = attempt(pid, without="sys_ptrace")
        assert (ability, tried) == ("CAP_SYS_PTRACE", "PermissionError")
        assert "CAP_SYS_PTRACE" in told


@pytest.mark.parametrize(
    ("without", "prefix", "ability"),
    [("sys_admin", "", "CAP_SYS_ADMIN"), ("", deny_execve(), "no seccomp filter")],
    ids=["no capability", "a filter of our own"],
)
def test_a_filter_that_cannot_be_suspended(without: str, prefix: str, ability: str) -> None:
    """It is seen before a system call is made, and the process notices nothing."""
    with counting_child(4, prefix=deny_execve()) as it:
        found, told, tried = attempt(it.pid, without=without, prefix=prefix)
        if without and "CAP_SYS_PTRACE" in found:
            pytest.skip("it has capabilities that we have not then")
        assert (found, tried) == (ability, "PrivilegeError"), told
        assert it.seen()["wrong"] == []
        assert proc.read_status(it.pid).tracer == 0


@contextlib.contextmanager
def program_of_32_bits(path: Path) -> Iterator[int]:
    """A program that waits: pause(2), again and again, by the system calls of an i386."""
    code = b"\xb8\x1d\x00\x00\x00\xcd\x80\xeb\xf7"  # mov $29, %eax; int $0x80; jmp back
    base, start = 0x08048000, 52 + 32
    ident = b"\x7fELF\x01\x01\x01" + bytes(9)
    header = ident + struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, base + start, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    size = start + len(code)
    path.write_bytes(header + struct.pack("<IIIIIIII", 1, 0, base, base, size, size, 5, 4096) + code)
    path.chmod(0o755)
    if os.uname().machine != "x86_64" or not can(lambda: _starts(path)):
        pytest.skip("programs of 32 bits do not run here")
    with child((str(path),)) as pid:
        yield pid


def _starts(path: Path) -> None:
    with subprocess.Popen([path]) as started:
        try:
            started.wait(0.1)
        except subprocess.TimeoutExpired:
            return
        finally:
            started.kill()
    raise OSError("it ended")


def test_a_program_of_32_bits(tmp_path: Path) -> None:
    with program_of_32_bits(tmp_path / "program") as pid, open_process(pid) as process:
        found = traceable.refusal(pid)
        assert isinstance(found, Blocked)
        assert "32-bit 386" in found.message
        assert process.alive()
