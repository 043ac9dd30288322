"""No test leaves a child behind."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from cpr.linux import proc
from tests.kernel.support import kill

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _no_child_left() -> Iterator[None]:
    before = set(proc.children(os.getpid()))
    yield
    left = set(proc.children(os.getpid())) - before
    for pid in left:
        kill(pid)
    assert not left, "the test left children behind"
