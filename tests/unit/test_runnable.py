"""`cpr run`: what becomes of a command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cpr.app.runnable import Memory, Runnable, runnable
from cpr.errors import UsageError
from cpr.qemu.cmdline import CommandLine, guest_memory, memory_backends
from cpr.qemu.cmdline.table import SPECS
from cpr.qemu.options import OptionKnowledge

if TYPE_CHECKING:
    from collections.abc import Mapping

GIB = 1 << 30
MIB = 1 << 20
QEMU = "/usr/bin/qemu-system-x86_64"


def knows(*gone: str, groups: Mapping[str, frozenset[str]] | None = None) -> OptionKnowledge:
    return OptionKnowledge(frozenset(SPECS) - set(gone), groups or {})


V7_2 = knows("run-with")
V10_0 = knows("async-teardown", groups={"run-with": frozenset({"async-teardown", "chroot"})})
V6_0 = knows("async-teardown", "run-with")


class Made:
    """`runnable` with memfds that are numbers from 50 on."""

    def __init__(self, *arguments: str, name: str = "", pidfile: str = "", of: OptionKnowledge = V10_0) -> None:
        self.memory: list[Memory] = []
        self.result: Runnable = runnable(
            [QEMU, *arguments],
            of,
            self._allocate,
            socket="/run/cpr/guests/a.qmp",
            cwd="/vm",
            name=name,
            pidfile=pidfile,
        )
        self.command: CommandLine = self.result.command
        self.argv = self.command.argv()

    def _allocate(self, wanted: Memory) -> int:
        self.memory.append(wanted)
        return 49 + len(self.memory)

    def value(self, option: str) -> str | None:
        last = self.command.last(option)
        return last[1].value if last else None


def test_plain_memory_becomes_a_named_file_over_a_memfd() -> None:
    made = Made("-M", "q35", "-m", "4G")
    assert made.memory == [Memory(id="cpr-ram", size=4 * GIB)]
    [backend] = memory_backends(made.command)
    assert (backend.qom_type, backend.size, backend.share) == ("memory-backend-file", 4 * GIB, True)
    assert backend.mem_path == "/proc/self/fd/50"
    assert guest_memory(made.command).machine_backend == "cpr-ram"
    assert made.argv[1:5] == ["-M", "q35", "-m", "4G"]


def test_slots_and_a_size_that_nobody_named() -> None:
    assert Made("-m", "512,slots=2,maxmem=1G").memory == [Memory(id="cpr-ram", size=512 * MIB)]
    made = Made("-M", "pc")
    assert made.memory == [Memory(id="cpr-ram", size=128 * MIB)]
    assert guest_memory(made.command).size == 128 * MIB


def test_a_memfd_of_the_users_own() -> None:
    made = Made("-object", "memory-backend-memfd,id=m0,size=1G", "-machine", "q35,memory-backend=m0", "-m", "1G")
    assert made.memory == [Memory(id="m0", size=GIB)]
    [backend] = memory_backends(made.command)
    assert (backend.id, backend.qom_type, backend.share) == ("m0", "memory-backend-file", True)
    assert "m0" in made.result.notes[0]


def test_huge_pages_stay_huge() -> None:
    made = Made(
        "-object", "memory-backend-memfd,id=m0,size=1G,hugetlb=on,hugetlbsize=2M", "-M", "q35,memory-backend=m0"
    )
    assert made.memory == [Memory(id="m0", size=GIB, page=2 * MIB)]
    made = Made("-object", "memory-backend-memfd,id=m0,size=1G,hugetlb=on", "-M", "q35,memory-backend=m0")
    assert made.memory == [Memory(id="m0", size=GIB, page=-1)]


def test_every_numa_node() -> None:
    made = Made(
        *("-m", "2G", "-object", "memory-backend-ram,id=a,size=1G", "-object", "memory-backend-ram,id=b,size=1G"),
        *("-numa", "node,memdev=a", "-numa", "node,memdev=b"),
    )
    assert [m.id for m in made.memory] == ["a", "b"]
    assert {b.mem_path for b in memory_backends(made.command)} == {"/proc/self/fd/50", "/proc/self/fd/51"}
    assert guest_memory(made.command).machine_backend is None


def test_a_file_is_kept_and_shared() -> None:
    shared = "memory-backend-file,id=m0,size=1G,mem-path=/dev/shm/vm,share=on"
    made = Made("-object", shared, "-machine", "memory-backend=m0")
    assert (made.memory, made.value("object")) == ([], shared)
    private = Made("-object", shared.replace("share=on", "share=off"), "-machine", "memory-backend=m0")
    assert (private.memory, private.value("object")) == ([], shared)
    assert "share=on" in private.result.notes[0]
    rom = "memory-backend-file,id=r0,size=1M,mem-path=/rom,readonly=on"
    assert Made("-object", rom).argv[2] == rom


def test_mem_path_becomes_a_backend() -> None:
    made = Made("-m", "1G", "-mem-path", "/dev/hugepages", "-mem-prealloc")
    [backend] = memory_backends(made.command)
    assert (backend.mem_path, backend.share, backend.prealloc, made.memory) == ("/dev/hugepages", True, True, [])
    assert not made.command.has("mem-path", "mem-prealloc")


def test_no_machine_no_memory() -> None:
    assert Made("-M", "none").memory == []


def test_a_monitor_is_added_only_where_none_is() -> None:
    made = Made()
    assert made.value("qmp") == "unix:/run/cpr/guests/a.qmp,server=on,wait=off"
    assert made.result.monitor.path == "/run/cpr/guests/a.qmp"
    assert "/run/cpr/guests/a.qmp" in made.result.notes[-1]
    there = Made("-qmp", "unix:vm.qmp,server=on,wait=off")
    assert (there.result.monitor.path, there.result.notes) == ("/vm/vm.qmp", [])
    long = Made("-chardev", "socket,id=c0,path=/q,server=on,wait=off", "-mon", "chardev=c0,mode=control")
    assert (long.result.monitor.path, long.result.monitor.label) == ("/q", "c0")


@pytest.mark.parametrize(
    "arguments",
    [
        ("-qmp", "tcp:localhost:4444,server=on,wait=off"),
        ("-monitor", "unix:/hmp,server=on,wait=off"),
        ("-qmp", "stdio"),
        ("-qmp", "unix:/q"),
    ],
)
def test_others_than_a_qmp_server_on_a_unix_socket_do_not_count(arguments: tuple[str, str]) -> None:
    assert Made(*arguments).result.monitor.path == "/run/cpr/guests/a.qmp"


def test_async_teardown_as_the_binary_spells_it() -> None:
    assert Made(of=V10_0).value("run-with") == "async-teardown=on"
    assert Made("-run-with", "chroot=/x", of=V10_0).value("run-with") == "chroot=/x,async-teardown=on"
    assert Made("-run-with", "async-teardown=off", of=V10_0).value("run-with") == "async-teardown=off"
    assert Made(of=V7_2).command.has("async-teardown")
    assert Made("-async-teardown", of=V7_2).argv.count("-async-teardown") == 1
    assert not Made(of=V6_0).command.has("async-teardown", "run-with")


def test_name_pidfile_and_daemonize() -> None:
    made = Made("-name", "old,process=x", "-daemonize", "-pidfile", "/x", name="a,b", pidfile="vm.pid")
    assert made.value("name") == "a,,b,process=x"
    assert (made.value("pidfile"), made.command.has("daemonize")) == ("/vm/vm.pid", False)
    assert Made(name="web").value("name") == "web"
    assert Made("-pidfile", "/x").value("pidfile") == "/x"


@pytest.mark.parametrize("arguments", [("-frobnicate",), ("-m",), ("-object", "memory-backend-memfd,id=m0")])
def test_what_qemu_would_not_understand_either(arguments: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        Made(*arguments)
