"""ptrace(2) of threads, on python-ptrace: one thin function each. What its binding lacks (PTRACE_SEIZE and what came
with it in kernel 3.4, signal masks) are numbers here. OSError out and nothing else.

Stops are looked at and not consumed (WNOWAIT): a stop that nobody consumed keeps its signal, so that when the tracer
is killed just then, the kernel delivers the signal as if nobody had traced (kernel/signal.c: ptrace_stop).
A stop at a system call is marked by bit 7 (PTRACE_O_TRACESYSGOOD), which is no signal, and so is harmless then.

All requests for a thread must come from the thread that seized it. PTRACE_O_EXITKILL is never used.

Out of scope: what is done with the stopped threads (tracee.py).
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from dataclasses import dataclass
from typing import Any

from ptrace.binding import func as _func
from ptrace.binding import ptrace_getregs, ptrace_registers_t, ptrace_setregs
from ptrace.error import PtraceError

Registers = Any
"""python-ptrace's ptrace_registers_t (struct user_regs_struct), a ctypes structure of unsigned words."""

PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_GETSIGMASK = 0x420A
PTRACE_SETSIGMASK = 0x420B
PTRACE_EVENT_STOP = 128
PTRACE_EVENT_EXEC = int(_func.PTRACE_EVENT_EXEC)
PTRACE_EVENT_CLONE = int(_func.PTRACE_EVENT_CLONE)
PTRACE_O_TRACECLONE = int(_func.PTRACE_O_TRACECLONE)
PTRACE_O_TRACESYSGOOD = int(_func.PTRACE_O_TRACESYSGOOD)
PTRACE_O_TRACEEXEC = int(_func.PTRACE_O_TRACEEXEC)
PTRACE_O_SUSPEND_SECCOMP = 1 << 21

SYSCALL_STOP = signal.SIGTRAP | 0x80
ALL_SIGNALS = 2**64 - 1
"""SIGKILL and SIGSTOP are left out by the kernel."""

_WALL = int(_func.THREAD_TRACE_FLAGS)
_AWAKE = 0.0003
"""Seconds for which a stop is waited for without sleeping: to be woken takes longer than most calls."""
_NOT_BEFORE = 0.002
"""Seconds between looks at a thread where SIGCHLD does not tell, because another thread of ours took it."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a thread stands. `event` is a PTRACE_EVENT_ number, or 0 where a signal or a system call stopped it."""

    signal: int
    event: int

    @property
    def at_syscall(self) -> bool:
        return self.signal == SYSCALL_STOP and not self.event


def _do(request: int, tid: int, address: int = 0, data: int = 0) -> None:
    try:
        _func.ptrace(request, tid, address, data)
    except PtraceError as error:
        raise _os_error(error, tid) from None


def _os_error(error: Any, tid: int) -> OSError:
    number = error.errno or errno.EIO
    return OSError(number, f"{os.strerror(number)} (ptrace of thread {tid})")


def seize(tid: int, options: int) -> None:
    """Trace it without stopping it. PermissionError also of one that is exiting."""
    _do(PTRACE_SEIZE, tid, 0, options)


def interrupt(tid: int) -> None:
    """Have it stop (PTRACE_EVENT_STOP), or stop again when it is let go; any other stop takes this back."""
    _do(PTRACE_INTERRUPT, tid)


def set_options(tid: int, options: int) -> None:
    _do(_func.PTRACE_SETOPTIONS, tid, 0, options)


def resume(tid: int, number: int = 0) -> None:
    """Let it run on, with a signal."""
    _do(_func.PTRACE_CONT, tid, 0, number)


def resume_to_syscall(tid: int, number: int = 0) -> None:
    """Let it run to the next entry to, or exit from, a system call."""
    _do(_func.PTRACE_SYSCALL, tid, 0, number)


def detach(tid: int) -> None:
    """Let it go. A group-stop (SIGSTOP) that is in effect takes hold of it again (__ptrace_unlink)."""
    _do(_func.PTRACE_DETACH, tid)


def event_message(tid: int) -> int:
    """What goes with the event that it stands at: of PTRACE_EVENT_CLONE the new thread."""
    value = ctypes.c_ulong()
    _do(_func.PTRACE_GETEVENTMSG, tid, 0, ctypes.addressof(value))
    return value.value


def registers(tid: int) -> Registers:
    try:
        return ptrace_getregs(tid)
    except PtraceError as error:
        raise _os_error(error, tid) from None


def set_registers(tid: int, values: Registers) -> None:
    try:
        ptrace_setregs(tid, values)
    except PtraceError as error:
        raise _os_error(error, tid) from None


def copy_registers(values: Registers) -> Registers:
    return ptrace_registers_t.from_buffer_copy(values)


def signal_mask(tid: int) -> int:
    """Blocked signals, bit n-1 for signal n: those before the call where ppoll and the like changed them."""
    mask = ctypes.c_uint64()
    _do(PTRACE_GETSIGMASK, tid, 8, ctypes.addressof(mask))
    return mask.value


def set_signal_mask(tid: int, mask: int) -> None:
    value = ctypes.c_uint64(mask)
    _do(PTRACE_SETSIGMASK, tid, 8, ctypes.addressof(value))


def poke(tid: int, address: int, data: bytes) -> None:
    """Write whole words, whatever protects the page; a private page is copied for it.

    Unlike /proc/PID/mem this does not depend on proc_mem.force_override (kernel 6.12).
    """
    size = ctypes.sizeof(ctypes.c_ulong)
    for at in range(0, len(data), size):
        _do(_func.PTRACE_POKETEXT, tid, address + at, int.from_bytes(data[at : at + size], "little"))


def hear_stops() -> set[int]:
    """Block SIGCHLD in this thread, so that `wait` is woken by it. Returns the mask that was."""
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD]))


def hear_as_before(mask: set[int]) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def poll(tid: int) -> Stop | None:
    """Where it stands; None while it runs.

    Raises:
        ProcessLookupError: it has ended, and is reaped now. ChildProcessError: it is not traced any more.
    """
    options = os.WEXITED | os.WSTOPPED | os.WNOHANG | _WALL
    found = os.waitid(os.P_PID, tid, options | os.WNOWAIT)
    if found is None:
        return None
    if found.si_code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED):
        os.waitid(os.P_PID, tid, options)
        raise ProcessLookupError(errno.ESRCH, f"thread {tid} has ended")
    stop = Stop(found.si_status & 0xFF, found.si_status >> 8)
    if stop.event == PTRACE_EVENT_EXEC:  # else no request is taken when the tid has changed: looks_like_a_spurious_pid
        os.waitid(os.P_PID, tid, options)
    return stop


def reap(tid: int) -> bool:
    """Take in its end, if it has ended: exec waits for that of all other threads."""
    try:
        poll(tid)
    except (ProcessLookupError, ChildProcessError):
        return True
    return False


def pause(until: float) -> None:
    """Sleep until a traced thread stops or ends, a moment at most; `until` by time.monotonic.

    Raises:
        TimeoutError: it is past.
    """
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError(errno.ETIMEDOUT, "a traced thread does not stop")
    signal.sigtimedwait([signal.SIGCHLD], min(left, _NOT_BEFORE))


def wait(tid: int, until: float) -> Stop:
    """Wait for its next stop.

    Raises:
        ProcessLookupError: it has ended. TimeoutError.
    """
    awake = time.monotonic() + _AWAKE
    try:
        while (stop := poll(tid)) is None:
            if time.monotonic() < awake:
                os.sched_yield()
            else:
                pause(until)
    except ChildProcessError:
        raise ProcessLookupError(errno.ESRCH, f"thread {tid} has ended") from None
    return stop
