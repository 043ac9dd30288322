"""Whether we may trace a process, by what /proc tells: nothing is touched.

The kernel's rules are those of ptrace(2), "Ptrace access mode checking". A security module (SELinux, AppArmor) may
still refuse; that shows only when it is tried. That Yama's scope 1 allows a parent to trace its own children is not
counted upon: who traces is a process of its own.

Out of scope: tracing (tracee.py).
"""

from __future__ import annotations

import os

from cpr.errors import Blocked, CprError, PrivilegeError
from cpr.linux import capabilities, procfile, stub
from cpr.linux.elf import NotElf, elf_facts
from cpr.linux.status import Status, read_status

_YAMA = "/proc/sys/kernel/yama/ptrace_scope"
_RESTORE = "/proc/sys/kernel/ns_last_pid"
"""There only with CONFIG_CHECKPOINT_RESTORE (kernel/pid_namespace.c), which PTRACE_O_SUSPEND_SECCOMP needs."""

_INITIAL = 0xEFFFFFFD
"""PROC_USER_INIT_INO (include/linux/proc_ns.h)."""

_TRACE = capabilities.mask("CAP_SYS_PTRACE")
_ADMIN = capabilities.mask("CAP_SYS_ADMIN")


def why_not(pid: int) -> str | None:
    """Why system calls cannot be made in a process, or None. Raises ProcessLookupError."""
    found = refusal(pid)
    return found.message if found is not None else None


def refusal(pid: int) -> CprError | None:
    """The same as an error to be raised: PrivilegeError names the missing ability; Blocked, where none would help.

    Raises:
        ProcessLookupError: it is gone.
    """
    them, us = read_status(pid), read_status(os.getpid())
    if them.state in ("Z", "X"):
        raise procfile.gone(pid)
    if them.tracer:
        return Blocked(
            f"pid {pid} is traced by pid {them.tracer} already", hint="end that debugger, strace or the like"
        )
    return (
        yama_refuses(pid, us.effective)
        or credentials_refuse(pid, them, us)
        or seccomp_refuses(pid, them, us)
        or _foreign(pid)
    )


def _lacking(pid: int, why: str, ability: str = "CAP_SYS_PTRACE", hint: str = "") -> PrivilegeError:
    return PrivilegeError(f"pid {pid} cannot be traced: {why}", ability=ability, hint=hint or f"needs {ability}")


def yama_scope() -> int:
    """kernel.yama.ptrace_scope; 0 where Yama is not there."""
    try:
        with open(_YAMA) as file:
            return int(file.read())
    except FileNotFoundError:
        return 0


def yama_refuses(pid: int, effective: int, scope: int | None = None) -> CprError | None:
    scope = yama_scope() if scope is None else scope
    if scope >= 3:
        return Blocked(
            f"pid {pid} cannot be traced: kernel.yama.ptrace_scope is {scope}, which nobody can change until reboot"
        )
    if scope >= 1 and not effective & _TRACE:
        return _lacking(pid, f"kernel.yama.ptrace_scope is {scope}")
    return None


def credentials_refuse(pid: int, them: Status, us: Status) -> CprError | None:
    """__ptrace_may_access with PTRACE_MODE_REALCREDS, and cap_ptrace_access_check."""
    if us.effective & _TRACE:
        return None
    if set(them.uids[:3]) != {us.uids[0]} or set(them.gids[:3]) != {us.gids[0]}:
        return _lacking(pid, f"it runs as uid {them.uids[0]}, gid {them.gids[0]}")
    more = them.permitted & ~us.permitted
    if more:
        return _lacking(pid, f"it has {', '.join(capabilities.names(more))}")
    if procfile.stat(pid, "mem").st_uid != them.uids[1]:
        return _lacking(pid, "it is not dumpable")
    return None


def seccomp_refuses(
    pid: int, them: Status, us: Status, restore: bool | None = None, initial: bool | None = None
) -> CprError | None:
    """check_ptrace_options: who suspends a filter has CAP_SYS_ADMIN in the initial user namespace, and no filter."""
    if not them.seccomp:
        return None
    if not us.effective & _ADMIN:
        return _lacking(pid, "its seccomp filter cannot be suspended", "CAP_SYS_ADMIN")
    if not (_in_initial_user_namespace() if initial is None else initial):
        return _lacking(
            pid, "its seccomp filter cannot be suspended out of a user namespace", "CAP_SYS_ADMIN",
            "run cpr in the host's own user namespace",
        )  # fmt: skip
    if us.seccomp:
        return _lacking(
            pid, "its seccomp filter cannot be suspended by a process that has one", "no seccomp filter",
            "run cpr outside of the container, or without its seccomp profile",
        )  # fmt: skip
    if not (os.path.exists(_RESTORE) if restore is None else restore):
        return _lacking(pid, "its seccomp filter cannot be suspended", "CONFIG_CHECKPOINT_RESTORE")
    return None


def _in_initial_user_namespace() -> bool:
    return os.stat("/proc/self/ns/user").st_ino == _INITIAL


def _foreign(pid: int) -> CprError | None:
    try:
        return foreign(f"/proc/{pid}/exe", f"pid {pid}")
    except PermissionError:
        return _lacking(pid, "its program cannot be read")
    except FileNotFoundError:
        raise procfile.gone(pid) from None


def foreign(program: str, name: str) -> CprError | None:
    """What is wrong with a program whose system calls are not those we know: of 32 bits, or another architecture.

    Raises:
        OSError: it cannot be read.
    """
    arch = stub.architecture()
    if arch is None:
        return Blocked(f"{name}: system calls of another process are not known on {os.uname().machine}")
    try:
        facts = elf_facts(program)
    except NotElf as error:
        return Blocked(f"{name} runs {error}")
    if facts.bits != 64 or facts.machine != arch.elf_machine:
        return Blocked(f"{name} is a {facts.bits}-bit {facts.machine_name} program, not one for {arch.machine}")
    return None
