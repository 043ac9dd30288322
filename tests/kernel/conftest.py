"""No test leaves a child behind, nor a child's child: orphans come to us (PR_SET_CHILD_SUBREAPER)."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

import pytest

from cpr.linux import proc, syscalls
from tests.kernel.support import kill

if TYPE_CHECKING:
    from collections.abc import Iterator

PR_SET_CHILD_SUBREAPER = 36


def _ends(pid: int, seconds: float = 2.0) -> bool:
    """Whether it is dead, or dies within a moment: a SIGKILL takes its time on a busy machine."""
    deadline = time.monotonic() + seconds
    while not (dead := proc.is_zombie(pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return dead


@pytest.fixture(autouse=True)
def _no_child_left() -> Iterator[None]:
    syscalls.prctl(PR_SET_CHILD_SUBREAPER, 1)
    before = set(proc.children(os.getpid()))
    yield
    left = {}
    for pid in set(proc.children(os.getpid())) - before:
        with contextlib.suppress(ProcessLookupError):
            if not _ends(pid):  # an orphan that a test killed is ours to reap
                left[pid] = proc.read_argv(pid)
        kill(pid)
    syscalls.prctl(PR_SET_CHILD_SUBREAPER, 0)
    assert not left, "the test left children behind"
