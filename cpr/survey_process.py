"""The facts about a guest's process that matter to who would replace its program and keep the process."""

from __future__ import annotations

import contextlib
import os
import stat

from cpr.errors import CprError, PrivilegeError
from cpr.linux import proc, traceable
from cpr.linux.fds import Fd
from cpr.model import Untraceable

PIDFILE_BYTES = 64
"""More than any pid with blanks around it."""


def untraceable(pid: int) -> Untraceable | None:
    """Why system calls cannot be made in the process; None where nothing is known to speak against it.

    Raises:
        ProcessLookupError: it is gone, or has ended and is not reaped.
    """
    try:
        found: CprError | None = traceable.refusal(pid)
    except PermissionError as error:
        what = error.filename or f"/proc/{pid}"
        return Untraceable(why=f"{what} cannot be read", ability="CAP_SYS_PTRACE", way_out="run cpr as root")
    if found is None:
        return None
    ability = found.ability if isinstance(found, PrivilegeError) else ""
    return Untraceable(why=found.message, ability=ability, way_out=found.hint)


def teardown_helpers(pid: int) -> tuple[int, ...]:
    """Pids of the children by which async teardown keeps address spaces of this process alive.

    Each is named cleanup/PID after the pid that QEMU itself sees (util/async-teardown.c), and shares the address space
    of the program that made it, also when the process has executed another one since. One that has ended, reaped or
    not, keeps nothing; a child in vfork still has QEMU's own name.

    Raises:
        ProcessLookupError: the process is gone.
    """
    name = f"cleanup/{proc.read_status(pid).ns_pids[-1]}"[:15]
    found = []
    for child in proc.children(pid):
        with contextlib.suppress(ProcessLookupError):
            status = proc.read_status(child)
            if status.name == name and status.state not in ("Z", "X", "x"):
                found.append(child)
    return tuple(found)


def pidfile_holds_pid(pid: int, pidfile: str, cwd: str) -> bool:
    """Whether the guest's pid file, as its process sees it, is there and has its pid, as the process or we count.

    The path is the guest's word: no link at its end is followed, and nothing but a regular file is opened, as opening
    alone does something with devices (a watchdog).

    Raises:
        ProcessLookupError: the process is gone.
    """
    if not pidfile:
        return False
    path = f"/proc/{pid}/root{os.path.join('/', cwd, pidfile)}"
    try:
        with Fd(os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)) as there:
            if not stat.S_ISREG(os.fstat(there.number).st_mode):
                return False
            with open(f"/proc/self/fd/{there.number}", "rb", buffering=0) as file:
                content = file.read(PIDFILE_BYTES).strip()
    except (OSError, ValueError):  # ValueError: a NUL byte in its name
        return False
    return content in {str(p).encode() for p in (pid, *proc.read_status(pid).ns_pids)}
