"""Whether memory is kept over an exec: asked of this kernel, and of kernels that only say so."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys

import pytest

from cpr.linux import madvise

MADV_NORMAL = 0
X86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the program that shows the page is for x86-64")

SHOWS_ITSELF = """
import os, sys
from cpr.linux import madvise
program = madvise.shower(madvise._AT)
with os.fdopen(os.memfd_create("shower", os.MFD_CLOEXEC), "wb") as file:
    file.write(program)
    file.flush()
    number = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
os.execve(number, ["shower"], {})
"""


def has_the_advice() -> bool:
    """By the system call itself, on a page of our own."""
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return int(libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), 201)) == 0


def test_this_kernel() -> None:
    """Upstream has nothing at 201; a kernel that has is asked for its proof."""
    if not has_the_advice():
        assert madvise.keeps_memory_over_exec() is False
        assert madvise.answers_zero(madvise.MADV_DOEXEC) is False
    else:
        assert madvise.keeps_memory_over_exec() is madvise.survives_exec(madvise.MADV_DOEXEC)


def test_a_zero_is_not_believed() -> None:
    """MADV_NORMAL is answered with 0 by every kernel, and the page is gone after the exec."""
    assert madvise.answers_zero(MADV_NORMAL) is True
    assert madvise.survives_exec(MADV_NORMAL) is False
    assert madvise.works(MADV_NORMAL) is False


@pytest.mark.parametrize("advice", [22, 23])
def test_the_numbers_of_the_first_proposal_are_never_tried(advice: int) -> None:
    tried: list[int] = []

    def tries(number: int) -> bool:
        tried.append(number)
        return True

    with pytest.raises(ValueError, match="populates"):
        madvise.works(advice, answers=tries, proof=tries)
    assert tried == []


@pytest.mark.parametrize(("zero", "kept", "expected"), [(True, True, True), (True, False, False), (False, True, False)])
def test_both_are_needed(zero: bool, kept: bool, expected: bool) -> None:
    asked: list[tuple[str, int]] = []

    def answers(advice: int) -> bool:
        asked.append(("answers", advice))
        return zero

    def proof(advice: int) -> bool:
        asked.append(("proof", advice))
        return kept

    assert madvise.works(answers=answers, proof=proof) is expected
    assert asked == [("answers", 201), ("proof", 201)][: 1 + zero]


def test_it_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def no(advice: int) -> bool:
        asked.append(advice)
        return False

    monkeypatch.setattr(madvise, "answers_zero", no)
    madvise.keeps_memory_over_exec.cache_clear()
    try:
        assert [madvise.keeps_memory_over_exec() for _ in range(3)] == [False] * 3
    finally:
        madvise.keeps_memory_over_exec.cache_clear()
    assert asked == [201]


@X86
def test_the_program_shows_what_is_there() -> None:
    """Its own first bytes: what the proof would see of a page that was kept."""
    shown = subprocess.run([sys.executable, "-c", SHOWS_ITSELF], capture_output=True, check=True)
    assert (shown.stdout, shown.stderr) == (madvise.shower(madvise._AT)[: madvise.MARK_BYTES], b"")


@X86
def test_the_program_shows_nothing_where_nothing_is() -> None:
    script = SHOWS_ITSELF.replace("madvise.shower(madvise._AT)", "madvise.shower(madvise._AT + (1 << 30))")
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert (shown.stdout, shown.stderr) == (b"", b"")


LOOKS_AT_ITSELF = """
import sys
sys.path[:0] = {path!r}
from cpr.linux import madvise
shower = madvise.shower
madvise.shower = lambda address: shower(madvise._AT)
madvise.mark_and_exec({mark!r}, {advice})
"""


@X86
def test_the_whole_proof_but_for_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a program that looks at its own beginning, which is there, for a mark that is that beginning."""
    monkeypatch.setattr(os, "urandom", lambda count: madvise.shower(0)[:count])
    monkeypatch.setattr(madvise, "_CHILD", LOOKS_AT_ITSELF)
    assert madvise.survives_exec(MADV_NORMAL) is True


def test_a_proof_that_hangs_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(madvise, "_CHILD", "import time\ntime.sleep(60)  # {path} {mark} {advice}")
    monkeypatch.setattr(madvise, "SECONDS", 0.2)
    assert madvise.survives_exec(MADV_NORMAL) is False
