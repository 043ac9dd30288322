"""A child that maps an empty file privately sees another file's pages."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cpr.linux import stub
from cpr.linux.fds import Fd
from cpr.linux.lazycopy import LazyCopies, Source, empty_memory_file
from cpr.linux.process import Process, open_process
from tests.kernel.support import can, trace_a_child

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.skipif(stub.architecture() is None, reason="not on this architecture"),
    pytest.mark.skipif(not can(trace_a_child), reason="cannot trace here"),
]

PAGE = mmap.PAGESIZE
PAGES = 64
PROGRAM = r"""
import mmap, os, sys
number = int(sys.argv[1])
memory = mmap.mmap(number, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
for line in sys.stdin:
    what, page, *word = line.split()
    at = int(page) * mmap.PAGESIZE
    if what == "write":
        memory[at : at + 4] = word[0].encode()
    elif what == "kernel":  # it is the kernel who looks
        there, here = os.pipe()
        os.write(here, memoryview(memory)[at : at + 4])
        assert os.read(there, 4) == memory[at : at + 4]
    print(memory[at : at + 4].hex(), flush=True)
"""


class Viewer:
    """A process that looks at an empty file."""

    def __init__(self, child: subprocess.Popen[str], process: Process, source: Source) -> None:
        self._child = child
        self.process = process
        self.source = source

    def do(self, what: str, page: int, *word: object) -> bytes:
        """The first four bytes of the page, after `read`, `write` WORD, or `kernel`."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        print(what, page, *word, file=self._child.stdin, flush=True)
        return bytes.fromhex(self._child.stdout.readline())


def word(page: int) -> bytes:
    return f"{page:04}".encode()


@pytest.fixture
def viewer() -> Iterator[Viewer]:
    with contextlib.ExitStack() as held:
        file = held.enter_context(Fd(os.memfd_create("content")))
        os.write(file.number, b"".join(word(page).ljust(PAGE, b".") for page in range(PAGES)))
        seen = held.enter_context(empty_memory_file(PAGES * PAGE))
        command = [sys.executable, "-c", PROGRAM, str(seen.number)]
        child = held.enter_context(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=(seen.number,)
            )
        )
        held.callback(child.kill)
        process = held.enter_context(open_process(child.pid))
        viewer = Viewer(child, process, Source(file, seen))
        assert viewer.do("read", 0) == bytes(4)
        yield viewer


def test_what_it_looks_at_is_copied_and_nothing_else(viewer: Viewer) -> None:
    with LazyCopies.begin(viewer.process, [viewer.source]) as copies:
        assert [viewer.do("read", page) for page in (0, 7, 63)] == [word(0), word(7), word(63)]
        assert 1 <= copies.made <= 3
        assert os.fstat(viewer.source.seen.number).st_blocks == 0


def test_what_it_had_written_before_is_forgotten(viewer: Viewer) -> None:
    assert viewer.do("write", 5, "mine") == b"mine"
    with LazyCopies.begin(viewer.process, [viewer.source]):
        assert viewer.do("read", 5) == word(5)


def test_what_it_writes_stays_with_it(viewer: Viewer) -> None:
    with LazyCopies.begin(viewer.process, [viewer.source]):
        assert viewer.do("write", 9, "mine") == b"mine"
        assert viewer.do("read", 9) == b"mine"
    assert os.pread(viewer.source.file.number, 4, 9 * PAGE) == word(9)


def test_what_has_changed_meanwhile(viewer: Viewer) -> None:
    with LazyCopies.begin(viewer.process, [viewer.source]) as copies:
        assert viewer.do("read", 3) == word(3)
        os.pwrite(viewer.source.file.number, b"news", 3 * PAGE)
        assert viewer.do("read", 3) == word(3)
        copies.refresh()
        assert viewer.do("read", 3) == b"news"
        assert viewer.do("read", 4) == word(4)


def test_the_kernel_looks(viewer: Viewer) -> None:
    with LazyCopies.begin(viewer.process, [viewer.source]):
        assert viewer.do("kernel", 11) == word(11)


def test_it_ends_while_copies_are_made(viewer: Viewer) -> None:
    with LazyCopies.begin(viewer.process, [viewer.source]):
        viewer.process.kill()
        assert viewer.process.wait_dead(5)


def test_one_that_maps_it_not_at_all_or_shared(viewer: Viewer) -> None:
    with empty_memory_file(PAGE) as other, pytest.raises(ValueError, match="does not map it privately"):
        LazyCopies.begin(viewer.process, [Source(viewer.source.file, other)])
    with open_process(os.getpid()) as us, mmap.mmap(viewer.source.seen.number, 0):
        with pytest.raises(ValueError, match="does not map it privately"):
            LazyCopies.begin(us, [viewer.source])
