"""Starting a guest that can be updated later: `cpr run`.

QEMU is started detached: in a session of its own, with init as its parent (a parent that waits would take the change
of pid for its end), standard input from /dev/null, its output in a log.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from cpr.app.runnable import runnable
from cpr.app.world import World, real_world
from cpr.errors import BinaryUnusable, CprError, MonitorError, PrivilegeError, UsageError
from cpr.linux.fds import memory_file
from cpr.linux.process import Process, open_process
from cpr.names import file_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cpr.app.runnable import Memory
    from cpr.model import MonitorAddress

NOTHING_RUNS = "nothing was started"
STARTING_SECONDS = 30.0
"""Time until the monitor answers; a QEMU that preallocates much RAM takes long."""


class NotStarted(CprError):
    """QEMU ended at its start; the message has its own words."""

    where = NOTHING_RUNS


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A guest that runs, and that an update can move."""

    name: str
    pid: int
    qemu: str
    monitor: MonitorAddress
    log: str
    argv: tuple[str, ...]
    notes: tuple[str, ...]


def run(
    argv: Sequence[str],
    *,
    name: str = "",
    pidfile: str = "",
    timeout: float = STARTING_SECONDS,
    world: World | None = None,
) -> Started:
    """Start a guest.

    Raises:
        UsageError: no command line, or one that cannot be understood.
        BinaryUnusable: argv[0] is no QEMU.
        NotStarted: QEMU refused, in its own words.
    """
    world = world or real_world()
    if not argv:
        raise UsageError("what is to be started?", hint="cpr run -- qemu-system-x86_64 -m 2G ...")
    program = shutil.which(argv[0])
    if program is None:
        raise BinaryUnusable(argv[0], "no such program", hint="the first word after -- is the QEMU to start")
    knows = world.ask(program, ()).options
    directory = _directory()
    stem = os.path.join(directory, f"{file_name(name)}-{secrets.token_hex(3)}")
    memory: list[int] = []

    def allocate(wanted: Memory) -> int:
        memory.append(_memfd(wanted))
        return memory[-1]

    try:
        made = runnable(argv, knows, allocate, socket=f"{stem}.qmp", cwd=os.getcwd(), name=name, pidfile=pidfile)
        pid = _spawn(program, made.command.argv(), memory, f"{stem}.log")
    finally:
        for number in memory:
            os.close(number)
    _wait_ready(pid, made.monitor, f"{stem}.log", timeout)
    return Started(
        name=name,
        pid=pid,
        qemu=program,
        monitor=made.monitor,
        log=f"{stem}.log",
        argv=tuple(made.command.argv()),
        notes=tuple(made.notes),
    )


def _directory() -> str:
    from cpr.journal import run_directory

    path = os.path.join(run_directory(), "guests")
    try:
        os.makedirs(path, mode=0o755, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(13, "may not be written to")
    except OSError as error:
        raise PrivilegeError(
            f"{path}: {error.strerror or error}",
            ability="write access to the run directory",
            hint="run cpr as root, or name another directory in CPR_RUN_DIR",
            where=NOTHING_RUNS,
        ) from None
    return path


def _memfd(wanted: Memory) -> int:
    try:
        return memory_file(f"cpr-{wanted.id}", wanted.size, page=wanted.page).steal()
    except OSError as error:
        raise NotStarted(f"no memory for {wanted.id} ({wanted.size} bytes): {error.strerror or error}") from None


def _spawn(program: str, argv: Sequence[str], keep: Iterable[int], log: str) -> int:
    """Start a program as a daemon is: own session, init's child, output to `log`. Returns its pid.

    Raises:
        BinaryUnusable: it cannot be executed.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _become(program, argv, keep, log, writing)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as file:
        pid, _, failure = file.read().decode(errors="replace").partition("\n")
    if failure or not pid:
        raise BinaryUnusable(program, failure or "cannot be started")
    return int(pid)


def _become(program: str, argv: Sequence[str], keep: Iterable[int], log: str, writing: int) -> NoReturn:
    """In the child: a session, a second fork that gives init the program, and exec."""
    try:
        os.setsid()
        pid = os.fork()
        if pid:
            os.write(writing, f"{pid}\n".encode())
            os._exit(0)
        null = os.open(os.devnull, os.O_RDONLY)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for target, source in enumerate((null, output, output)):
            os.dup2(source, target)
        for number in keep:
            os.set_inheritable(number, True)
        os.execv(program, list(argv))
    except OSError as error:
        os.write(writing, (error.strerror or str(error)).encode())
    finally:
        os._exit(127)


def _wait_ready(pid: int, monitor: MonitorAddress, log: str, timeout: float) -> None:
    """Until the monitor answers. A QEMU that does not come up is ended: nobody else would."""
    from cpr.qemu import qmp

    deadline = time.monotonic() + timeout
    process = _held(pid, log)
    try:
        while True:
            try:
                qmp.connect(monitor, pid).close()
                return
            except MonitorError as error:
                reason = error.reason
            if process.wait_dead(0.02):
                raise NotStarted(f"QEMU did not start: {_words(log)}", hint=f"its whole output is in {log}")
            if time.monotonic() > deadline:
                process.kill()
                raise NotStarted(
                    f"QEMU's monitor at {monitor} did not answer within {timeout:g} s: {reason}; it was ended",
                    hint=f"its output is in {log}; a chardev with wait=on keeps it from coming up",
                )
    finally:
        process.close()


def _held(pid: int, log: str) -> Process:
    try:
        return open_process(pid)
    except ProcessLookupError:
        raise NotStarted(f"QEMU did not start: {_words(log)}", hint=f"its whole output is in {log}") from None


def _words(log: str) -> str:
    """The last lines that QEMU said, without its warnings if there is anything else."""
    try:
        with open(log, encoding="utf-8", errors="replace") as file:
            lines = [line.strip() for line in file if line.strip()]
    except OSError:
        lines = []
    telling = [line for line in lines if "warning:" not in line]
    return " / ".join((telling or lines)[-4:]) or "it said nothing"
