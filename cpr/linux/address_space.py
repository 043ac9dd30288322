"""Keeping a process's address space from being taken down within its exec, which waits until all of it is unmapped.

    with AddressSpace.hold(pid) as held:      # /proc/PID/mem is being read, and the reading does not come to its end
        ...                                   # PID executes another program, at once
        held.release()                        # now the old one's memory is taken down, by a thread of ours

Taking down takes time for each page that the process has touched, shared memory too. It is done by whoever drops the
last reference, and a read of /proc/PID/mem holds one (fs/proc/base.c: mem_rw). Ours waits for a page of its buffer that
nobody but us could provide (userfaultfd). The process has no part in it, and does not depend on our life: with us the
reference goes.

Out of scope: helpers of QEMU that do the same (-run-with async-teardown).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import select
import threading
from typing import Self

from cpr.linux import procfile, syscalls, userfault
from cpr.linux.fds import Fd
from cpr.linux.maps import read_maps

BEGIN_SECONDS = 1.0


class AddressSpace:
    """A hold on the address space that a process has now."""

    def __init__(self, fault: Fd, page: mmap.mmap, reader: threading.Thread) -> None:
        self._fault = fault
        self._page = page
        self._reader = reader

    @classmethod
    def hold(cls, pid: int) -> Self:
        """Hold that of `pid`.

        Raises:
            ProcessLookupError, PermissionError: of the process. OSError: this kernel does not let us (ENOSYS, EPERM:
            no userfaultfd, or none without CAP_SYS_PTRACE). TimeoutError: the read has not begun in BEGIN_SECONDS.
        """
        with contextlib.ExitStack() as undo:
            fault = undo.enter_context(Fd(syscalls.userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK)))
            userfault.enable(fault.number)
            page = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            start = ctypes.addressof(ctypes.c_char.from_buffer(page))
            userfault.watch(fault.number, start, mmap.PAGESIZE)
            with procfile.vanishing(pid):
                memory = undo.enter_context(Fd(os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)))
            readable = next((m.start for m in read_maps(pid) if m.perms.startswith("r") and m.inode), 0)
            reader = threading.Thread(target=_read, args=(memory.dup(), page, readable), name="hold", daemon=True)
            reader.start()
            if not select.select([fault.number], [], [], BEGIN_SECONDS)[0]:
                raise TimeoutError(errno.ETIMEDOUT, f"the memory of pid {pid} cannot be read")
            userfault.faults(fault.number)  # it is in the middle of it
            undo.pop_all()
            memory.close()
        return cls(fault, page, reader)

    def release(self) -> None:
        """Let go, at once; the taking down takes its time elsewhere. Safe to repeat."""
        self._fault.close()

    def close(self) -> None:
        """Let go, and wait until nothing is left of it."""
        self.release()
        self._reader.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(memory: Fd, page: mmap.mmap, address: int) -> None:
    with memory, contextlib.suppress(OSError):
        os.preadv(memory.number, [page], address)
