"""A command line made fit for later updates: shared RAM that a stream can skip, and a QMP socket. Pure.

What is changed, and only where it is missing: RAM becomes `memory-backend-file` over an inherited memfd (a named file
to QEMU, with nothing left on any file system), a QMP socket is added, the old address space is torn down in the
background, and `-daemonize` goes, since the process is detached anyway.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cpr.errors import UsageError
from cpr.model import MonitorAddress
from cpr.qemu.cmdline import (
    CommandLine,
    CommandLineError,
    Option,
    Params,
    guest_memory,
    machine,
    memory_backends,
    monitors,
    with_memory_backend_fd,
    without,
)
from cpr.qemu.cmdline.params import escape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cpr.qemu.cmdline.facts import MemoryBackend
    from cpr.qemu.options import OptionKnowledge

MAIN_RAM = "cpr-ram"
DEFAULT_RAM = 128 << 20
"""What QEMU gives where nothing is said (MachineClass.default_ram_size; some machines have more)."""
PAGES = frozenset({"memory-backend-ram", "memory-backend-memfd", "memory-backend-shm"})
"""Back ends without a name: from QEMU 8.1 on the stream would copy them, or they are private anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """A memfd that is wanted; sizes in bytes. `page` is 0 for ordinary pages, -1 for the default huge ones."""

    id: str
    size: int
    page: int = 0


@dataclass(slots=True)
class Runnable:
    """The command line as it will be started, and what was changed, in words."""

    command: CommandLine
    monitor: MonitorAddress
    notes: list[str] = field(default_factory=list)


def runnable(
    argv: Sequence[str],
    knows: OptionKnowledge,
    allocate: Callable[[Memory], int],
    *,
    socket: str,
    cwd: str,
    name: str = "",
    pidfile: str = "",
) -> Runnable:
    """`argv` made fit. `allocate` makes a memfd and gives its number; `socket` is where a QMP socket would go.

    Raises:
        UsageError: a command line that QEMU would not understand either.
    """
    notes: list[str] = []
    try:
        command = CommandLine.parse(argv)
        if command.has("daemonize"):
            command = without(command, ["daemonize"])
        command = _named(command, name)
        command = _with_ram(command, allocate, notes)
        command = _with_teardown(command, knows)
        if pidfile:
            command = without(command, ["pidfile"]).appended(Option("pidfile", os.path.join(cwd, pidfile)))
        command, monitor = _with_monitor(command, socket, cwd, notes)
    except CommandLineError as error:
        raise UsageError(f"the command line of QEMU: {error}") from None
    return Runnable(command, monitor, notes)


def _named(command: CommandLine, name: str) -> CommandLine:
    if not name:
        return command
    last = command.last("name")
    if last is None:
        return command.appended(Option("name", Params.of(("guest", name)).render()))
    index, option = last
    return command.replaced(index, option.with_params(option.params.with_(guest=name)))


def _with_ram(command: CommandLine, allocate: Callable[[Memory], int], notes: list[str]) -> CommandLine:
    for backend in memory_backends(command):
        command = _with_backend(command, backend, allocate, notes)
    memory = guest_memory(command)
    covered = memory.machine_backend or any(node.memdev for node in memory.nodes)
    if covered or machine(command).type == "none":
        return command
    if memory.size is None:
        command = command.appended(Option("m", f"{DEFAULT_RAM >> 20}M"))
    size = memory.size or DEFAULT_RAM
    path = memory.mem_path or f"/proc/self/fd/{allocate(Memory(id=MAIN_RAM, size=size))}"
    params = Params.of(("qom-type", "memory-backend-file"), id=MAIN_RAM, size=size).with_({"mem-path": path})
    params = params.with_(share=True)
    if memory.prealloc:
        params = params.with_(prealloc=True)
    return without(command, ["mem-path", "mem-prealloc"]).appended(
        Option("object", params.render()), Option("machine", f"memory-backend={MAIN_RAM}")
    )


def _with_backend(
    command: CommandLine, backend: MemoryBackend, allocate: Callable[[Memory], int], notes: list[str]
) -> CommandLine:
    if backend.qom_type in PAGES:
        if backend.size is None:
            raise UsageError(f"-object {backend.qom_type},id={backend.id}: size= is missing")
        huge = backend.params.size("hugetlbsize") or -1 if backend.hugetlb else 0
        number = allocate(Memory(id=backend.id, size=backend.size, page=huge))
        notes.append(f"{backend.id}: {backend.qom_type} became a shared memfd")
        return with_memory_backend_fd(command, backend.id, number)
    if backend.qom_type == "memory-backend-file" and not backend.share and not backend.readonly:
        notes.append(f"{backend.id}: share=on was added, so that an update can hand it on")
        return command.replaced(
            backend.index, command.options[backend.index].with_params(backend.params.with_(share=True))
        )
    return command


def _with_teardown(command: CommandLine, knows: OptionKnowledge) -> CommandLine:
    """Async teardown, spelt as this QEMU knows it: `-async-teardown` in 7.2 to 8.2, `-run-with` from 8.1 on."""
    if command.has("async-teardown"):
        return command
    last = command.last("run-with")
    if last is not None and "async-teardown" in last[1].params:
        return command
    if knows.parameter("run-with", "async-teardown"):
        params = (last[1].params if last else Params()).with_({"async-teardown": True})
        if last is None:
            return command.appended(Option("run-with", params.render()))
        return command.replaced(last[0], last[1].with_params(params))
    return command.appended(Option("async-teardown")) if knows.option("async-teardown") else command


def _with_monitor(command: CommandLine, socket: str, cwd: str, notes: list[str]) -> tuple[CommandLine, MonitorAddress]:
    for monitor in monitors(command):
        found = monitor.chardev.socket if monitor.chardev else None
        if monitor.mode == "control" and found and found.server and found.kind == "unix" and found.path:
            path = f"@{found.path}" if found.abstract else os.path.join(cwd, found.path)
            return command, MonitorAddress(label=monitor.label, path=path)
    notes.append(f"no QMP socket on the command line: one was added at {socket}")
    command = command.appended(Option("qmp", f"unix:{escape(socket)},server=on,wait=off"))
    return command, MonitorAddress(label=monitors(command)[-1].label, path=socket)
