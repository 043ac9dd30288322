"""Questions to a command line: settings, machine, memory, devices and objects.

Chardevs, network, displays and drives are asked in `query_io`, descriptor numbers in `descriptors`.
"""

from __future__ import annotations

from cpr.qemu.cmdline.argv import CommandLine
from cpr.qemu.cmdline.facts import (
    AddFd,
    Device,
    GdbStub,
    GuestMemory,
    Machine,
    MemoryBackend,
    NumaNode,
    QomObject,
    Settings,
)
from cpr.qemu.cmdline.params import Params, parse_size

_SHARED_BY_DEFAULT = frozenset({"memory-backend-memfd", "memory-backend-shm", "memory-backend-epc"})


def settings(cmdline: CommandLine) -> Settings:
    """What stands alone: name, uuid, -incoming, -daemonize, -chroot and so on."""
    run_with = merged(cmdline, "run-with")
    return Settings(
        name=merged(cmdline, "name").get("guest"),
        uuid=_text(cmdline, "uuid"),
        accel=_accelerators(cmdline),
        cpu=_text(cmdline, "cpu"),
        incoming=tuple(option.value or "" for _, option in cmdline.find("incoming")),
        loadvm=_text(cmdline, "loadvm"),
        daemonize=cmdline.has("daemonize"),
        pidfile=_text(cmdline, "pidfile"),
        snapshot=cmdline.has("snapshot"),
        chroot=_text(cmdline, "chroot") or run_with.get("chroot"),
        runas=_text(cmdline, "runas") or run_with.get("user"),
        paused=cmdline.has("S"),
        nodefaults=cmdline.has("nodefaults"),
        nographic=cmdline.has("nographic"),
    )


def machine(cmdline: CommandLine) -> Machine:
    """-machine and -M, later ones over earlier ones (system/vl.c keyval_parse_into)."""
    params = merged(cmdline, "machine")
    return Machine(type=params.get("type"), params=params, indexes=tuple(index for index, _ in cmdline.find("machine")))


def devices(cmdline: CommandLine) -> tuple[Device, ...]:
    return tuple(
        Device(driver=p.get("driver") or "", id=p.get("id"), index=index, params=p)
        for index, p in _params(cmdline, "device")
    )


def objects(cmdline: CommandLine) -> tuple[QomObject, ...]:
    return tuple(
        QomObject(qom_type=p.get("qom-type") or "", id=p.get("id"), index=index, params=p)
        for index, p in _params(cmdline, "object")
    )


def memory_backends(cmdline: CommandLine) -> tuple[MemoryBackend, ...]:
    """The -object memory-backend-* (and of SGX: -epc)."""
    return tuple(_memory_backend(found) for found in objects(cmdline) if found.qom_type.startswith("memory-backend-"))


def guest_memory(cmdline: CommandLine) -> GuestMemory:
    memory, board = merged(cmdline, "m"), machine(cmdline).params
    size = memory.get("size")
    return GuestMemory(
        # `-m 512` counts MiB, `-machine memory.size=` bytes
        size=parse_size(size, default_suffix="m") if size else board.size("memory.size"),
        max_size=memory.size("maxmem") or board.size("memory.max-size"),
        slots=int(memory.get("slots") or board.get("memory.slots") or 0) or None,
        mem_path=_text(cmdline, "mem-path"),
        prealloc=cmdline.has("mem-prealloc"),
        machine_backend=board.get("memory-backend") or board.get("memory_backend"),
        nodes=tuple(_numa_node(index, p) for index, p in _params(cmdline, "numa") if p.get("type") == "node"),
    )


def gdbstub(cmdline: CommandLine) -> GdbStub | None:
    """-gdb or -s; the last one wins. `-gdb none` is none."""
    last = cmdline.last("gdb", "s")
    if last is None or last[1].value == "none":
        return None
    return GdbStub(address=last[1].value or "tcp::1234", index=last[0])


def add_fds(cmdline: CommandLine) -> tuple[AddFd, ...]:
    return tuple(
        AddFd(fd=int(p.get("fd") or -1), fdset=int(p.get("set") or -1), opaque=p.get("opaque"), index=index)
        for index, p in _params(cmdline, "add-fd")
    )


def merged(cmdline: CommandLine, name: str) -> Params:
    """All options of one name as one, later ones over earlier ones."""
    result = Params()
    for _, params in _params(cmdline, name):
        result = result.with_({key: params.get(key) or "" for key in params.names()})
    return result


def _params(cmdline: CommandLine, name: str) -> list[tuple[int, Params]]:
    return [(index, option.params) for index, option in cmdline.find(name)]


def _text(cmdline: CommandLine, name: str) -> str | None:
    last = cmdline.last(name)
    return last[1].value if last else None


def _accelerators(cmdline: CommandLine) -> tuple[str, ...]:
    """In the order in which QEMU tries them. -accel stands over -machine accel=; -enable-kvm is accel=kvm."""
    named = [p.get("accel") or "" for _, p in _params(cmdline, "accel")]
    if not named:
        for _, option in cmdline.find("machine", "enable-kvm"):
            text = "kvm" if option.name == "enable-kvm" else option.params.get("accel")
            named = text.split(":") if text else named
    return tuple(named)


def _memory_backend(found: QomObject) -> MemoryBackend:
    p = found.params
    return MemoryBackend(
        id=found.id or "",
        qom_type=found.qom_type,
        size=p.size("size"),
        share=p.flag("share", found.qom_type in _SHARED_BY_DEFAULT),
        index=found.index,
        params=p,
        mem_path=p.get("mem-path"),
        prealloc=p.flag("prealloc"),
        policy=p.get("policy"),
        host_nodes=",".join(p.all("host-nodes")) or p.get("host-nodes.0"),
        hugetlb=p.flag("hugetlb"),
        discard_data=p.flag("discard-data"),
        readonly=p.flag("readonly"),
    )


def _numa_node(index: int, params: Params) -> NumaNode:
    mem, nodeid = params.get("mem"), params.get("nodeid")
    return NumaNode(
        index=index,
        nodeid=int(nodeid, 0) if nodeid else None,
        memdev=params.get("memdev"),
        mem=parse_size(mem, default_suffix="m") if mem else None,
    )
