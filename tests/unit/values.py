"""A guest, a host and a target as values, to be changed with `dataclasses.replace` by the tests that need them."""

from __future__ import annotations

from cpr.model import (
    Backing,
    Binary,
    Guest,
    MonitorAddress,
    Plan,
    ProcessId,
    RamBlock,
    Step,
    Target,
)

GIB = 1 << 30


def binary(version: str = "7.2.22", path: str = "/usr/bin/qemu-system-x86_64") -> Binary:
    return Binary(path=path, version=version, device=1, inode=100)


def ram(name: str = "ram0") -> RamBlock:
    return RamBlock(
        id=name,
        size=GIB,
        qom_type="memory-backend-file",
        backing=Backing.MEMFD,
        shared=True,
        named_file=True,
        path="/proc/self/fd/20",
        fd=20,
        device=1,
        inode=77,
        qom_path=f"/objects/{name}",
    )


def guest(pid: int = 4242, start_time: int = 1000) -> Guest:
    return Guest(
        process=ProcessId(pid, start_time),
        name="web1",
        uuid="3fa85f64-5717-4562-b3fc-2c963f66afa6",
        binary=binary(),
        installed=binary("11.1.3"),
        argv=("/usr/bin/qemu-system-x86_64", "-machine", "q35,memory-backend=ram0"),
        environ=(("PATH", "/usr/bin"),),
        cwd="/",
        uid=0,
        machine="pc-q35-7.2",
        accelerator="tcg",
        runstate="running",
        monitor=MonitorAddress(label="mon0", path="/run/web1.qmp"),
        ram=(ram(),),
        devices=(),
        chains=(),
        nodes=(),
        chardevs=(),
        vnc=(),
        spice="",
        netdevs=(),
        vcpus=(),
        iothreads=(),
        open_files=(),
        fdsets=(),
        capabilities=(("x-ignore-shared", False), ("events", True)),
        parameters={"max-bandwidth": 134217728, "downtime-limit": 300},
        migration="",
        blocked_reasons=(),
        jobs=(),
        supervisors=(),
        namespaces=(),
        cgroups=(),
        limits={},
        memory_room=None,
        pids_room=None,
        resident=GIB,
        threads=4,
        seccomp=0,
        gone_files=(),
        pidfile="",
        added_options=(),
    )


def target(version: str = "11.1.3") -> Target:
    return Target(
        binary=binary(version, "/opt/qemu/bin/qemu-system-x86_64"),
        machines=frozenset({"pc-q35-7.2"}),
        machine_aliases={"q35": "pc-q35-11.1"},
        device_types=frozenset(),
        commands=frozenset({"display-update"}),
        migrate_modes=frozenset(),
        capabilities=frozenset({"x-ignore-shared", "events", "return-path"}),
        options=None,
    )


def plan(*steps: Step, pid: int = 4242, start_time: int = 1000) -> Plan:
    return Plan(
        guest=guest(pid, start_time),
        target=target(),
        engine="handover",
        reason="nobody knows the guest by its pid",
        steps=steps,
        findings=(),
    )
