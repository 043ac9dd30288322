"""A process sees a copy of a file, of which only those pages are made that it looks at.

    source = Source(file=memory, seen=empty_memory_file(size))
    ...                                     # the process maps `seen` privately, and has not looked at it yet
    with LazyCopies.begin(process, [source]) as copies:
        ...                                 # what it touches is copied first, and what it writes stays with it
        copies.refresh()                    # what it has touched by now is copied anew

For what cannot be mapped copy-on-write: a character device of DAX (drivers/dax/device.c, check_vma). Faults come to us
by userfaultfd(2), which the process has to ask for itself: a tracer has it do so.

Out of scope: what is written to the file meanwhile and has been copied before, but for `refresh`.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import mmap
import os
import select
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from cpr.linux import userfault
from cpr.linux.fds import Fd, take_fd
from cpr.linux.maps import read_maps
from cpr.linux.tracee import Call
from cpr.linux.tracer import Attach, Batch, Detach, Tracer
from cpr.linux.userfault import PAGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cpr.linux.process import Process

@dataclass(frozen=True, slots=True)
class Source:
    """`seen` is what the process maps; offsets in it are those in `file`."""

    file: Fd
    seen: Fd


@dataclass(frozen=True, slots=True)
class _Range:
    """Addresses of the process, what is copied there, and from which offset on."""

    start: int
    end: int
    offset: int
    content: mmap.mmap


def empty_memory_file(size: int) -> Fd:
    """A file of `size` bytes that takes no memory."""
    file = Fd(os.memfd_create("cpr-copy", os.MFD_CLOEXEC))
    os.truncate(file.number, size)
    return file


class LazyCopies:
    """Copies in the making; on the close no more are made, and who looks at the rest waits for ever."""

    def __init__(self, process: Process, fault: Fd, ranges: Sequence[_Range]) -> None:
        self._process = process
        self._fault = fault
        self._ranges = sorted(ranges, key=lambda r: r.start)
        self._starts = [r.start for r in self._ranges]
        self._made: set[int] = set()
        self._lock = threading.Lock()
        self._ended, self._end = os.pipe2(os.O_CLOEXEC)
        self._server = threading.Thread(target=self._serve, name="lazy copies", daemon=True)
        self._server.start()

    @classmethod
    def begin(cls, process: Process, sources: Sequence[Source]) -> Self:
        """What the process had seen of `sources` before is forgotten.

        Raises:
            ValueError: it does not map one of them, or shared. OSError: it may not ask for this (EPERM: its user needs
            CAP_SYS_PTRACE or vm.unprivileged_userfaultfd), the kernel has no userfaultfd, or a file cannot be mapped.
            What a tracer raises.
        """
        with contextlib.ExitStack() as undo:
            ranges = []
            for source in sources:
                ranges += _ranges(process.pid, source, undo)
            fault = undo.enter_context(_watched(process, ranges, sources))
            copies = cls(process, fault, ranges)
            undo.pop_all()
        return copies

    def refresh(self) -> None:
        """Copy once more what was copied by now, over what the process has made of it; nothing where it has ended."""
        with self._lock, contextlib.suppress(OSError), open(f"/proc/{self._process.pid}/mem", "r+b", 0) as memory:
            for address in self._made:
                os.pwrite(memory.fileno(), self._content(address), address)

    @property
    def made(self) -> int:
        """Pages copied so far."""
        return len(self._made)

    def close(self) -> None:
        if self._fault.closed:
            return
        os.close(self._end)
        self._server.join()
        os.close(self._ended)
        self._fault.close()
        for content in {id(r.content): r.content for r in self._ranges}.values():
            content.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _content(self, address: int) -> bytes:
        range_ = self._ranges[bisect.bisect_right(self._starts, address) - 1]
        assert range_.start <= address < range_.end
        offset = range_.offset + address - range_.start
        return range_.content[offset : offset + PAGE]

    def _serve(self) -> None:
        page = ctypes.create_string_buffer(PAGE)
        with contextlib.suppress(ProcessLookupError):  # it has ended
            while self._ended not in select.select([self._fault.number, self._ended], [], [])[0]:
                for address in userfault.faults(self._fault.number):
                    with self._lock:
                        page.raw = self._content(address)
                        userfault.provide(self._fault.number, address, page)
                        self._made.add(address)


def _ranges(pid: int, source: Source, undo: contextlib.ExitStack) -> list[_Range]:
    status = os.fstat(source.seen.number)
    found = [m for m in read_maps(pid) if m.inode == status.st_ino and m.path.startswith("/memfd:")]
    if not found or any(m.perms[3] != "p" for m in found):
        raise ValueError(f"pid {pid} does not map it privately")
    content = undo.enter_context(
        contextlib.closing(mmap.mmap(source.file.number, status.st_size, mmap.MAP_SHARED, mmap.PROT_READ))
    )
    return [_Range(m.start, m.end, m.offset, content) for m in found]


def _watched(process: Process, ranges: Sequence[_Range], sources: Sequence[Source]) -> Fd:
    """Where the faults of these ranges come; what was there is forgotten."""
    with Tracer.start(process) as tracer:
        tracer.run(Attach())
        ((number,),) = tracer.run(Batch((Call("userfaultfd", (os.O_CLOEXEC | os.O_NONBLOCK,)),)))
        fault = take_fd(process.pidfd, number)
        try:
            userfault.enable(fault.number)
            for r in ranges:
                userfault.watch(fault.number, r.start, r.end - r.start)
            for source in sources:
                size = os.fstat(source.seen.number).st_size
                os.truncate(source.seen.number, 0)  # takes the pages that were written to, too
                os.truncate(source.seen.number, size)
            tracer.run(Batch((Call("close", (number,)),)), Detach())
        except BaseException:
            fault.close()
            raise
    return fault
