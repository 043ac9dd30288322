"""A stopped process that makes system calls for us: all its threads stand, one of them runs a stub (stub.py).

    attach ── call, batch, read, write, scratch ── detach        everything is as before
           └─ execve ── detach                                   the new program begins

Whenever the tracer is killed, the process goes on: the kernel lets its threads go, and the one in the stub finishes the
call it was in, restores its signal mask and registers and returns to where it was. What is left then are the stub,
which nobody runs, and the scratch memory. Measured by killing it at random moments, and before and behind each of its
requests (tests/kernel/test_ptrace.py): nobody died, and each queued signal was handled once.

A thread that was interrupted in a system call goes on with it as after SIGSTOP and SIGCONT (signal(7)), by the
kernel's own restart. Signals stay pending in the kernel. Of the calls that are not restarted but say EINTR, epoll_wait
without timeout is restarted nevertheless; with a timeout it would wait too long, and says EINTR. Any of them says so of
a thread that was to execute a program and could not, if the tracer was killed right then: it may handle a signal.

Two things that are not covered. A seccomp filter is suspended only while we trace: if the tracer is killed between
naming a call that the filter forbids and its passing the filter (some 20 us), the filter judges it. And a thread that
is not in a system call may be in a restartable sequence (rseq); one that is in a call is chosen where there is.

Out of scope: the process that does this (tracer.py), whether it is permitted (traceable.py).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from cpr.errors import Blocked, PrivilegeError
from cpr.linux import procfile, ptrace, stub
from cpr.linux.fds import Fd
from cpr.linux.status import read_stat, read_status

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cpr.linux.process import Process

ATTACH_SECONDS = 1.0
CALL_SECONDS = 5.0
TRIES = 100
"""How often a call that a SIGSTOP interrupted is made again."""
SCRATCH = 65536

_OPTIONS = ptrace.PTRACE_O_TRACESYSGOOD | ptrace.PTRACE_O_TRACEEXEC
_PROT_READ_WRITE = 3
_MAP_PRIVATE_ANONYMOUS = 0x22
_AT_EMPTY_PATH = 0x1000


@dataclass(frozen=True, slots=True)
class Result:
    """As an argument in a batch: what its call number `index` returned."""

    index: int


@dataclass(frozen=True, slots=True)
class Call:
    """A system call by name (stub.Architecture.numbers) or number. Bytes are passed by their address in scratch memory,
    as they are: a path needs its final NUL."""

    number: int | str
    arguments: tuple[int | bytes | Result, ...] = ()


class Tracee:
    """A process all of whose threads we have stopped. Made by `attach`; of use in the thread that made it."""

    def __init__(self, process: Process, arch: stub.Architecture, room: stub.Room) -> None:
        self.process = process
        self.pid = process.pid
        self.thread = process.pid
        """The thread that makes the calls."""
        self.executed = False
        """It stands before the first instruction of a new program."""
        self._arch = arch
        self._room = room
        self._threads: list[int] = []
        self._memory: Fd | None = None
        self._inside = False
        """The thread's registers are the stub's."""
        self._scratch: list[tuple[int, int]] = []
        self._free = (0, 0)
        self._heard: set[int] | None = ptrace.hear_stops()

    @classmethod
    def attach(
        cls,
        process: Process,
        *,
        thread: int | None = None,
        room: stub.Room | None = None,
        timeout: float = ATTACH_SECONDS,
    ) -> Self:
        """Stop all threads. `thread` makes the calls; by default the leader, or another one if only that is in a system
        call. `room` is what `stub.find_room` found before.

        Raises:
            ProcessLookupError: it has ended. PermissionError: no permission to trace. PrivilegeError: its seccomp
            filter cannot be suspended. Blocked: no room for the stub, or an architecture we do not know.
            TimeoutError: a thread did not stop within `timeout` seconds; those that did run again, that one when the
            calling process ends.
        """
        arch = stub.architecture()
        if arch is None:
            raise Blocked(f"system calls of another process are not known on {os.uname().machine}")
        room = room or stub.find_room(process.pid)
        if room is None:
            raise Blocked(f"pid {process.pid} has no unused executable bytes behind its libraries")
        tracee = cls(process, arch, room)
        try:
            tracee._stop_all(time.monotonic() + timeout)
            tracee._choose(thread)
        except BaseException:
            tracee.detach()
            raise
        return tracee

    # stopping ------------------------------------------------------------------------------------------------

    def _stop_all(self, until: float) -> None:
        """Until the kernel counts as many threads as stand: then nobody is left who could make another."""
        while True:
            for tid in self._seize_new():
                if not self._park(tid, until):
                    self._threads.remove(tid)
            if not self.process.alive():
                raise procfile.gone(self.pid)
            if read_status(self.pid).threads == len(self._threads):
                return
            self._threads = [tid for tid in self._threads if not ptrace.reap(tid)]
            if time.monotonic() > until:
                raise TimeoutError(errno.ETIMEDOUT, f"the threads of pid {self.pid} do not come to rest")

    def _seize_new(self) -> list[int]:
        with procfile.vanishing(self.pid):
            tids = [int(name) for name in os.listdir(f"/proc/{self.pid}/task")]
        seized = []
        for tid in tids:
            if tid in self._threads:
                continue
            try:
                ptrace.seize(tid, _OPTIONS)
            except ProcessLookupError:
                continue
            except PermissionError:
                with contextlib.suppress(ProcessLookupError):
                    if read_stat(tid).state not in ("Z", "X"):
                        raise
                continue
            seized.append(tid)
            self._threads.append(tid)
            with contextlib.suppress(ProcessLookupError):
                ptrace.interrupt(tid)
        return seized

    def _park(self, tid: int, until: float) -> bool:
        """Wait until it stands where no signal is on its way; one that was is delivered first. False: it has ended."""
        try:
            while (stop := ptrace.wait(tid, until)).event != ptrace.PTRACE_EVENT_STOP:
                ptrace.interrupt(tid)
                ptrace.resume(tid, 0 if stop.event or stop.at_syscall else stop.signal)
            values = ptrace.registers(tid)
            if stub.waits_endlessly(self._arch, _values(values)):
                setattr(values, self._arch.result, stub.unsigned(-stub.ERESTARTNOHAND))
                ptrace.set_registers(tid, values)
        except ProcessLookupError:
            return False
        except TimeoutError:
            state = read_stat(tid).state
            raise TimeoutError(
                errno.ETIMEDOUT, f"thread {tid} of pid {self.pid} does not stop (state {state})"
            ) from None
        return True

    def _choose(self, thread: int | None) -> None:
        if thread is not None and thread not in self._threads:
            raise ProcessLookupError(errno.ESRCH, f"pid {self.pid} has no thread {thread}")
        order = [thread] if thread is not None else sorted(self._threads, key=lambda tid: tid != self.pid)
        found = {tid: ptrace.registers(tid) for tid in order[:1]}
        if thread is None and stub.signed(getattr(found[order[0]], self._arch.origin)) < 0:
            found = {tid: ptrace.registers(tid) for tid in order}
            order.sort(key=lambda tid: stub.signed(getattr(found[tid], self._arch.origin)) < 0)
        self.thread = order[0]
        self._saved = found[self.thread]
        self._mask = ptrace.signal_mask(self.thread)
        self._memory = Fd(os.open(f"/proc/{self.pid}/mem", os.O_RDWR | os.O_CLOEXEC))
        left = self._room.holds(self._memory.number)
        if left is None:
            raise Blocked(f"pid {self.pid} runs another program than when it was looked at")
        if any(left) and any(self._room.covers(getattr(ptrace.registers(t), self._arch.pc)) for t in self._threads):
            raise Blocked(f"pid {self.pid} is still busy with what a tracer that was killed had asked of it")
        if read_status(self.thread).seccomp:
            self._suspend_seccomp()

    def _suspend_seccomp(self) -> None:
        try:
            ptrace.set_options(self.thread, _OPTIONS | ptrace.PTRACE_O_SUSPEND_SECCOMP)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EINVAL):
                raise
            ability = "CAP_SYS_ADMIN" if error.errno == errno.EPERM else "CONFIG_CHECKPOINT_RESTORE"
            raise PrivilegeError(
                f"the seccomp filter of pid {self.pid} cannot be suspended: {ability} is missing", ability=ability
            ) from None

    # calls ---------------------------------------------------------------------------------------------------

    def call(self, number: int | str, *arguments: int | bytes) -> int:
        """Make a system call there, see `Call`. Calls that sleep with a timeout (poll, nanosleep) must not be made:
        they would take the place of the one that the thread is to be restarted in.

        Raises:
            OSError: the call's own. ProcessLookupError: the process was killed. TimeoutError: it took more than
            CALL_SECONDS and was interrupted.
        """
        if isinstance(number, str):
            number = self._arch.numbers[number]
        words = [self.put(a) if isinstance(a, bytes) else a for a in arguments]
        return _checked(self._run(number, words), f"system call {number} in pid {self.pid}")

    def batch(self, calls: Sequence[Call], before_each: Callable[[], None] = lambda: None) -> list[int]:
        """Make calls until one fails. Raises what `call` raises; those before the failed one have been made."""
        results: list[int] = []
        for call in calls:
            before_each()
            results.append(
                self.call(call.number, *(results[a.index] if isinstance(a, Result) else a for a in call.arguments))
            )
        return results

    def _run(self, number: int, words: Sequence[int], executing: bool = False) -> int:
        """The result, negative for an error; PTRACE_EVENT_EXEC is 0.

        The thread comes to the call with a harmless number; only there, where it stands, is it given the true one. So
        what a filter forbids is named for the shortest time before it passes the filter, and with `executing` signals
        are let in before there is an execve that could leave them blocked to the new program.
        """
        if self.executed or self._memory is None:
            raise ValueError(f"pid {self.pid} is not ours any more")
        for _ in range(TRIES):
            self._go_to_stub()
            self._to_syscall(executing=False)
            if executing:  # the leader's is what the program had from its start; other threads may block everything
                ptrace.set_signal_mask(self.thread, self._leaders_mask())
            values = ptrace.registers(self.thread)
            for name, word in zip(self._arch.arguments, words, strict=False):
                setattr(values, name, stub.unsigned(word))
            setattr(values, self._arch.origin, number)
            ptrace.set_registers(self.thread, values)
            if self._to_syscall(executing).event:
                return 0
            if executing:
                ptrace.set_signal_mask(self.thread, ptrace.ALL_SIGNALS)
            result = stub.signed(getattr(ptrace.registers(self.thread), self._arch.result))
            if -result not in stub.RESTARTS:
                return result
        raise InterruptedError(errno.EINTR, f"system call {number} in pid {self.pid} was interrupted again and again")

    def _leaders_mask(self) -> int:
        return self._mask if self.thread == self.pid else ptrace.signal_mask(self.pid)

    def _go_to_stub(self) -> None:
        """The stub is there before the registers lead to it; signals are kept out only when it would let them in."""
        if not self._inside:
            home = stub.restarted(self._arch, _values(self._saved))
            code = self._arch.code(home, self._mask)
            assert len(code) <= self._room.size
            ptrace.poke(self.thread, self._room.address, code.ljust(self._room.size, b"\0"))
        values = ptrace.copy_registers(self._saved)
        setattr(values, self._arch.pc, self._room.address)
        setattr(values, self._arch.origin, stub.unsigned(-1))
        setattr(values, self._arch.number, self._arch.numbers["getpid"])
        ptrace.set_registers(self.thread, values)
        if not self._inside:
            self._inside = True
            ptrace.set_signal_mask(self.thread, ptrace.ALL_SIGNALS)

    def _to_syscall(self, executing: bool) -> ptrace.Stop:
        """Run to the beginning or the end of the call, or to the new program. Only SIGSTOP can come between; it is
        passed on, and takes hold when we let go."""
        until, late, number = time.monotonic() + CALL_SECONDS, False, 0
        while True:
            ptrace.resume_to_syscall(self.thread, number)
            try:
                stop = self._wait_executing(until) if executing else ptrace.wait(self.thread, until)
            except TimeoutError:
                ptrace.interrupt(self.thread)
                late = True
                stop = ptrace.wait(self.thread, time.monotonic() + CALL_SECONDS)
            if stop.at_syscall or stop.event == ptrace.PTRACE_EVENT_EXEC:
                if late and stop.at_syscall:
                    raise TimeoutError(errno.ETIMEDOUT, f"a system call in pid {self.pid} took too long")
                return stop
            number = 0 if stop.event else stop.signal

    def _wait_executing(self, until: float) -> ptrace.Stop:
        """The other threads end, each must be reaped, and ours becomes the leader (fs/exec.c: de_thread)."""
        others = [tid for tid in self._threads if tid != self.thread]
        while True:
            with contextlib.suppress(ChildProcessError):
                if (stop := ptrace.poll(self.thread)) is not None:
                    return stop
            others = [tid for tid in others if tid == self.pid or not ptrace.reap(tid)]
            if self.thread != self.pid:
                with contextlib.suppress(ChildProcessError):
                    there = ptrace.poll(self.pid)
                    if there is not None and there.event == ptrace.PTRACE_EVENT_EXEC:
                        return there
            ptrace.pause(until)

    # memory --------------------------------------------------------------------------------------------------

    def read(self, address: int, size: int) -> bytes:
        """Raises OSError (EIO) where nothing is mapped."""
        assert self._memory is not None
        return os.pread(self._memory.number, size, address)

    def write(self, address: int, data: bytes) -> None:
        """Raises OSError (EIO) where nothing is mapped."""
        assert self._memory is not None
        while data:
            written = os.pwrite(self._memory.number, data, address)
            address, data = address + written, data[written:]

    def scratch(self, size: int) -> int:
        """Address of `size` bytes there, all zero, of ours until we let go."""
        address, left = self._free
        size = (size + 15) & -16
        if size > left:
            left = max(SCRATCH, (size + stub.PAGE - 1) & -stub.PAGE)
            address = self.call("mmap", 0, left, _PROT_READ_WRITE, _MAP_PRIVATE_ANONYMOUS, -1, 0)
            self._scratch.append((address, left))
        self._free = (address + size, left - size)
        return address

    def put(self, data: bytes) -> int:
        """Scratch memory with this in it. Raises as `call` does."""
        address = self.scratch(len(data))
        self.write(address, data)
        return address

    # the end -------------------------------------------------------------------------------------------------

    def execve(self, program: str | int, argv: Sequence[str | bytes], environ: Sequence[str | bytes]) -> None:
        """Execute a path, or a descriptor of its own (execveat): it then stands before the new program's first
        instruction until `detach`. Pid, start time and descriptors without FD_CLOEXEC are kept, other threads end.

        Raises:
            OSError: nothing has changed, e.g. FileNotFoundError. ProcessLookupError: it did not survive.
        """
        tables = []
        for words in (argv, environ):
            data = [os.fsencode(word) + b"\0" for word in words]
            base = self.put(b"".join(data))
            starts = itertools.accumulate((len(d) for d in data[:-1]), initial=base) if data else ()
            tables.append(self.put(struct.pack(f"={len(data) + 1}Q", *starts, 0)))
        if isinstance(program, int):
            name, first, more = "execveat", [program, self.put(b"\0")], [_AT_EMPTY_PATH]
        else:
            name, first, more = "execve", [self.put(os.fsencode(program) + b"\0")], []
        _checked(
            self._run(self._arch.numbers[name], [*first, *tables, *more], executing=True),
            f"{name} {program} in pid {self.pid}",
        )
        self.executed, self._inside = True, False
        self._close_memory()
        self.thread, self._threads = self.pid, [self.pid]

    def detach(self) -> None:
        """Undo what is ours and let all threads go. Safe to repeat, and of a process that has ended."""
        try:
            if self._inside:
                self._leave()
        except ProcessLookupError:
            pass
        finally:
            self._inside = False
            self._close_memory()
            while self._threads:
                with contextlib.suppress(ProcessLookupError):
                    ptrace.detach(self._threads.pop())
            if self._heard is not None:
                ptrace.hear_as_before(self._heard)
                self._heard = None

    def _leave(self) -> None:
        for address, size in self._scratch:
            with contextlib.suppress(OSError):
                self._run(self._arch.numbers["munmap"], [address, size])
        self._scratch, self._free = [], (0, 0)
        ptrace.interrupt(self.thread)
        ptrace.resume(self.thread)
        until = time.monotonic() + CALL_SECONDS
        while (stop := ptrace.wait(self.thread, until)).event != ptrace.PTRACE_EVENT_STOP:
            ptrace.interrupt(self.thread)
            ptrace.resume(self.thread, 0 if stop.event or stop.at_syscall else stop.signal)
        ptrace.set_signal_mask(self.thread, self._mask)
        ptrace.set_registers(self.thread, self._saved)
        self._inside = False
        ptrace.poke(self.thread, self._room.address, bytes(self._room.size))

    def _close_memory(self) -> None:
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def _values(registers: ptrace.Registers) -> dict[str, int]:
    return {name: getattr(registers, name) for name, *_ in registers._fields_}


def _checked(result: int, what: str) -> int:
    if -4096 < result < 0:
        raise OSError(-result, f"{os.strerror(-result)} ({what})")
    return result
