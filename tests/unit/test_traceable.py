"""Refusals to trace, and the stub, on values."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cpr.errors import Blocked, PrivilegeError
from cpr.linux import capabilities, stub, traceable
from cpr.linux.status import read_status

if TYPE_CHECKING:
    from pathlib import Path

    from cpr.linux.status import Status

ALL = 2**41 - 1
TRACE = capabilities.mask("CAP_SYS_PTRACE")
ADMIN = capabilities.mask("CAP_SYS_ADMIN")
UID, GID = os.getuid(), os.getgid()
US = replace(read_status(os.getpid()), effective=0, permitted=0, seccomp=0)
THEM = replace(US)

needs_a_stub = pytest.mark.skipif(stub.architecture() is None, reason="not on this architecture")


@pytest.mark.parametrize(
    ("scope", "effective", "error"),
    [
        (0, 0, None), (1, TRACE, None), (2, TRACE, None),
        (1, ALL & ~TRACE, PrivilegeError), (2, 0, PrivilegeError), (3, ALL, Blocked),
    ],
)  # fmt: skip
def test_yama(scope: int, effective: int, error: type[Exception] | None) -> None:
    found = traceable.yama_refuses(1, effective, scope)
    assert type(found) is (error or type(None))
    if isinstance(found, PrivilegeError):
        assert found.ability == "CAP_SYS_PTRACE"
    if found is not None:
        assert f"ptrace_scope is {scope}" in found.message


@pytest.mark.parametrize(
    ("them", "words"),
    [
        (THEM, ""),
        (replace(THEM, uids=(UID + 1,) * 4), f"uid {UID + 1}"),
        (replace(THEM, uids=(UID, UID, UID + 1, UID)), f"uid {UID}"),
        (replace(THEM, gids=(GID, GID + 1, GID, GID)), f"gid {GID}"),
        (replace(THEM, permitted=capabilities.mask("CAP_NET_ADMIN")), "CAP_NET_ADMIN"),
    ],
)
def test_credentials(them: Status, words: str) -> None:
    found = traceable.credentials_refuse(os.getpid(), them, US)
    assert (words in found.message) if found is not None else not words
    assert traceable.credentials_refuse(os.getpid(), them, replace(US, effective=TRACE)) is None


@pytest.mark.parametrize(
    ("seccomp", "us", "restore", "ability"),
    [
        (0, US, False, None),
        (2, replace(US, effective=ADMIN), True, None),
        (2, replace(US, effective=ALL & ~ADMIN), True, "CAP_SYS_ADMIN"),
        (2, replace(US, effective=ALL), False, "CONFIG_CHECKPOINT_RESTORE"),
        (1, replace(US, effective=ALL, seccomp=2), True, "no seccomp filter"),
    ],
)
def test_seccomp(seccomp: int, us: Status, restore: bool, ability: str | None) -> None:
    found = traceable.seccomp_refuses(1, replace(THEM, seccomp=seccomp), us, restore, True)
    assert getattr(found, "ability", None) == ability


def test_root_of_a_user_namespace_may_not_suspend_a_filter() -> None:
    found = traceable.seccomp_refuses(1, replace(THEM, seccomp=2), replace(US, effective=ALL), True, False)
    assert isinstance(found, PrivilegeError)
    assert found.ability == "CAP_SYS_ADMIN"
    assert "the host's own user namespace" in found.hint


def program(bits: int, machine: int) -> bytes:
    layout = "<HHIQQQIHHHHHH" if bits == 64 else "<HHIIIIIHHHHHH"
    ident = b"\x7fELF" + bytes([bits // 32, 1, 1]) + bytes(9)
    return ident + struct.pack(layout, 2, machine, 1, 0, 0, 0, 0, 64, 56, 0, 0, 0, 0) + bytes(64)


@needs_a_stub
@pytest.mark.parametrize(
    ("bits", "machine", "words"), [(32, 3, "32-bit 386"), (32, 62, "32-bit X86_64"), (64, 243, "64-bit RISCV")]
)
def test_a_foreign_program(tmp_path: Path, bits: int, machine: int, words: str) -> None:
    (tmp_path / "program").write_bytes(program(bits, machine))
    found = traceable.foreign(str(tmp_path / "program"), "pid 1")
    assert isinstance(found, Blocked)
    assert words in found.message


@needs_a_stub
def test_a_program_of_this_host(tmp_path: Path) -> None:
    assert traceable.foreign("/proc/self/exe", "pid 1") is None
    (tmp_path / "script").write_text("#!/bin/sh\n")
    found = traceable.foreign(str(tmp_path / "script"), "pid 1")
    assert found is not None
    assert "script for /bin/sh" in found.message


def registers(**values: int) -> dict[str, int]:
    names = {*stub.X86_64.registers, "rip", "orig_rax"}
    return {**dict.fromkeys(names, 0), **{name: stub.unsigned(value) for name, value in values.items()}}


@pytest.mark.parametrize(
    ("origin", "result", "goes_on"),
    [
        (0, -512, (0, 98)),
        (202, -513, (202, 98)),
        (271, -514, (271, 98)),
        (230, -516, (219, 98)),
        (0, 17, (17, 100)),
        (0, -4, (-4, 100)),
        (-1, -512, (-512, 100)),
    ],
)
def test_how_an_interrupted_call_goes_on(origin: int, result: int, goes_on: tuple[int, int]) -> None:
    found = stub.restarted(stub.X86_64, registers(orig_rax=origin, rax=result, rip=100))
    assert (stub.signed(found["rax"]), found["rip"]) == goes_on


@pytest.mark.parametrize(
    ("origin", "result", "timeout", "endless"),
    [(232, -4, -1, True), (281, -4, 0xFFFFFFFF, True), (232, -4, 500, False), (232, 1, -1, False), (0, -4, -1, False)],
)
def test_calls_that_say_eintr(origin: int, result: int, timeout: int, endless: bool) -> None:
    assert stub.waits_endlessly(stub.X86_64, registers(orig_rax=origin, rax=result, r10=timeout)) is endless


def test_the_stub() -> None:
    """It begins with the system call, has every register and the mask in it, and is known again."""
    values = {name: 0x1111 * (i + 1) << 32 | i for i, name in enumerate((*stub.X86_64.registers, "rip"))}
    code = stub.X86_64.code(values, 0xFEDC << 40)
    assert code.startswith(stub.X86_64.instruction)
    assert len(code) <= stub.SIZE
    for name, value in values.items():
        assert (struct.pack("<Q", value) in code) is (name != "rsp"), name
    assert code.endswith(struct.pack("<Q", 0xFEDC << 40))


@needs_a_stub
def test_a_stub_is_known_again() -> None:
    arch = stub.architecture()
    assert arch is not None
    names = (*arch.registers, arch.pc)
    code = arch.code(dict.fromkeys(names, 0x1234), 77).ljust(stub.SIZE, b"\0")
    assert stub.is_stub(code)
    assert not stub.is_stub(code[:-1] + b"x")
    assert not stub.is_stub(b"x" + code[1:])
    assert stub.is_stub(code[:40] + bytes(stub.SIZE - 40))
