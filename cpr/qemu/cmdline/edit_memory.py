"""Edits of memory backends: RAM by an inherited descriptor, or by the file that it is.

`memory-backend-file` with `mem-path=/proc/self/fd/N` is a named file to QEMU, so its migration stream can skip it
(x-ignore-shared, from 8.1 on only named files), leaves nothing on a disk and knows no limit of /dev/shm.
"""

from __future__ import annotations

from cpr.qemu.cmdline.argv import CommandLine
from cpr.qemu.cmdline.params import CommandLineError, Params
from cpr.qemu.cmdline.queries import memory_backends

_CANONICAL = "x-use-canonical-path-for-ramblock-id"
_POPULATING = ("prealloc", "prealloc-threads", "prealloc-context", "policy", "host-nodes")
_OF_MEMFD = ("hugetlb", "hugetlbsize", "seal")
_OF_FILE = ("mem-path", "align", "offset", "discard-data", "pmem", "readonly", "rom")
# Machines up to 3.1 name the blocks of files and memfds by the whole QOM path, those of other backends not
# (hw/core/machine.c, hw_compat_3_1): the name in the stream must not change with the type.
_NAMED_SHORT = frozenset({"memory-backend-ram", "memory-backend-shm"})


def with_memory_backend_fd(cmdline: CommandLine, backend_id: str, fd: int, *, share: bool = True) -> CommandLine:
    """The backend `backend_id`, of any type, made a file that is already open as `fd`.

    `share=False` maps it copy-on-write: for a rehearsal over a guest's own RAM.
    """
    return with_memory_backend_file(cmdline, backend_id, f"/proc/self/fd/{fd}", share=share)


def with_memory_backend_file(cmdline: CommandLine, backend_id: str, path: str, *, share: bool = True) -> CommandLine:
    """The backend `backend_id`, of any type, made the file or device at `path`, whose content counts.

    Gone is what populates or places pages (prealloc, policy, host-nodes) or belongs to memfds alone; `discard-data`
    is off, for the RAM outlives the process. Size, alignment, pmem, readonly, rom, merge and dump stay.
    """
    index, params = _find(cmdline, backend_id)
    short = params.get("qom-type") in _NAMED_SHORT and _CANONICAL not in params
    changed = params.without(*_POPULATING, *_OF_MEMFD)
    changed = changed.with_({"qom-type": "memory-backend-file", "mem-path": path})
    changed = changed.with_({"share": share})
    if "discard-data" in changed:
        changed = changed.with_({"discard-data": False})
    if short:
        changed = changed.with_({_CANONICAL: False})
    return cmdline.replaced(index, cmdline.options[index].with_params(changed))


def without_reservation(cmdline: CommandLine, backend_id: str) -> CommandLine:
    """The backend takes no page of the host's pools before it is written (reserve=off, QEMU 6.1)."""
    index, params = _find(cmdline, backend_id)
    return cmdline.replaced(index, cmdline.options[index].with_params(params.with_({"reserve": False})))


def with_memory_backend_memfd(cmdline: CommandLine, backend_id: str) -> CommandLine:
    """The backend made a fresh, sparse memfd of the same size and name: for a rehearsal with throw-away RAM."""
    index, params = _find(cmdline, backend_id)
    short = params.get("qom-type") in _NAMED_SHORT and _CANONICAL not in params
    changed = params.without(*_POPULATING, *_OF_MEMFD, *_OF_FILE)
    changed = changed.with_({"qom-type": "memory-backend-memfd", "share": True})
    if short:
        changed = changed.with_({_CANONICAL: False})
    return cmdline.replaced(index, cmdline.options[index].with_params(changed))


def _find(cmdline: CommandLine, backend_id: str) -> tuple[int, Params]:
    for backend in memory_backends(cmdline):
        if backend.id == backend_id:
            return backend.index, backend.params
    raise CommandLineError(f"no memory backend {backend_id!r} in the command line")
