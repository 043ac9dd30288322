"""Reading one file of /proc/PID, with one answer for a process that vanished: ProcessLookupError.

/proc itself has five: ENOENT when opened too late, ESRCH when read too late, EACCES from ns/ (proc_ns_get_link), EINVAL
from mountinfo, and an empty file from a zombie.
ENOENT of a file that a living process does not have (attr/current without a security module, exe of a kernel
thread) stays FileNotFoundError.

Out of scope: what the files say.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def vanishing(pid: int) -> Iterator[None]:
    """Turn what /proc says of a vanished process (or thread) into ProcessLookupError."""
    try:
        yield
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.EACCES) and not os.path.exists(f"/proc/{pid}")
        if error.errno == errno.ESRCH or missing:
            raise gone(pid) from None
        raise


def gone(pid: int) -> ProcessLookupError:
    return ProcessLookupError(errno.ESRCH, f"process {pid} is gone")


def read_bytes(pid: int, name: str) -> bytes:
    """/proc/PID/NAME.

    Raises:
        ProcessLookupError, PermissionError; FileNotFoundError: the process is there and has no such file.
    """
    with vanishing(pid), open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()


def read_text(pid: int, name: str) -> str:
    """As `read_bytes`, decoded as file names are: odd bytes become surrogates."""
    return os.fsdecode(read_bytes(pid, name))


def mountinfo(pid: int) -> str:
    """/proc/PID/mountinfo, which has an answer of its own for a process that is exiting (mounts_open_common: EINVAL).

    Raises:
        ProcessLookupError, PermissionError.
    """
    try:
        return read_text(pid, "mountinfo")
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise gone(pid) from None
        raise


def read_link(pid: int, name: str) -> str:
    with vanishing(pid):
        return os.readlink(f"/proc/{pid}/{name}")


def stat(pid: int, name: str) -> os.stat_result:
    """stat of what /proc/PID/NAME leads to."""
    with vanishing(pid):
        return os.stat(f"/proc/{pid}/{name}")


def unescape(text: str) -> str:
    r"""Paths in maps, mountinfo and the like have \012, \040 and \134 for newline, blank and backslash."""
    if "\\" not in text:
        return text
    parts = text.split("\\")
    out = [parts[0]]
    for part in parts[1:]:
        code = part[:3]
        if len(code) == 3 and all(c in "01234567" for c in code):
            out.append(os.fsdecode(bytes([int(code, 8) & 0xFF])) + part[3:])
        else:
            out.append("\\" + part)
    return "".join(out)
