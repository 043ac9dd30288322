"""Every check: a guest of which it speaks, and one of which it does not."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from cpr.checks import REGISTRY, run_checks
from cpr.checks.memory import keeps_private_ram
from cpr.model import (
    Backing,
    BlockChain,
    BlockNode,
    Guest,
    GuestAgent,
    NextKernel,
    NotHadAgain,
    OpenFile,
    RamDirectory,
    Severity,
    Storage,
    Supervisor,
    Untraceable,
    Vcpu,
)
from cpr.qemu.options import OptionKnowledge
from tests.unit import values
from tests.unit.checks.facts import (
    DEVDAX,
    GIB,
    MIB,
    REGION,
    browsers,
    chardev,
    device,
    guest,
    host,
    netdev,
    next_kernel,
    rehearsal,
    said,
    target,
    vnc,
)

B, W, N = Severity.BLOCKER, Severity.WARNING, Severity.NOTE


@dataclass(frozen=True)
class Case:
    """A guest, and what `check` says of it: (severity, subject) of each finding."""

    check: str
    what: str
    guest: Guest
    expected: list[tuple[Severity, str]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def ram(id: str = "ram0", **changes: Any) -> Any:
    return replace(values.ram(id), **changes)


def chain(file: str = "/vm/disk.qcow2", *more: str, **changes: Any) -> BlockChain:
    known: dict[str, Any] = {"device": "vd0", "node": "n0", "files": (file, *more) if file else (), "read_only": False}
    return BlockChain(**{**known, "drive": "d0", **changes})


def open_file(number: int, kind: str, target: str = "", owner: str = "") -> OpenFile:
    return OpenFile(number=number, target=target, kind=kind, owner=owner)


def knows(*gone: str) -> OptionKnowledge:
    """A binary that knows every option of our guests but `gone`."""
    from cpr.qemu.cmdline.table import SPECS

    return OptionKnowledge(frozenset(SPECS) - set(gone), {})


DRIVE = ("-drive", "file=/vm/disk.qcow2,if=none,id=d0", "-device", "virtio-blk-pci,drive=d0,id=vd0")
VD0 = (device("virtio-blk-pci", "vd0"),)
SEEN = rehearsal(devices=VD0)


def pty(label: str) -> Any:
    return chardev(label, backend="pty", server=False, listener=None)


MEMORY = [
    Case("ram-volatile", "shared memfd", guest()),
    Case("ram-volatile", "shared file on a disk", guest(ram=(ram(backing=Backing.DISK_FILE),))),
    Case("ram-volatile", "private", guest(ram=(ram(shared=False),)), [(B, "ram0")]),
    Case("ram-volatile", "anonymous", guest(ram=(ram(backing=Backing.ANONYMOUS, fd=None),)), [(B, "ram0")]),
    Case("ram-volatile", "memory-backend-ram,share=on",
         guest(ram=(ram(backing=Backing.ANONYMOUS, qom_type="memory-backend-ram", fd=None),)), [(B, "ram0")]),
    Case("ram-volatile", "confidential", guest(ram=(ram(backing=Backing.GUEST_MEMFD),)), [(B, "ram0")]),
    Case("ram-volatile", "not to be told", guest(ram=(ram(backing=Backing.UNKNOWN),)), [(B, "ram0")]),
    Case("ram-volatile", "each block at fault", guest(ram=(ram("a", shared=False), ram("b"), ram("c", shared=False))),
         [(B, "a"), (B, "c")]),
    Case("ram-not-skipped", "named file, new", guest(binary=values.binary("10.0.13"))),
    Case("ram-not-skipped", "memfd before 8.1", guest(ram=(ram(named_file=False),), binary=values.binary("8.0.9"))),
    Case("ram-not-skipped", "memfd in 8.1", guest(ram=(ram(named_file=False),), binary=values.binary("8.1.0")),
         [(B, "ram0")]),
    Case("ram-not-skipped", "memfd in 10.0", guest(ram=(ram(named_file=False),), binary=values.binary("10.0.13")),
         [(B, "ram0")]),
    Case("ram-not-skipped", "version unknown",
         guest(ram=(ram(named_file=False),), binary=replace(values.binary(), version=None)), [(B, "ram0")]),
    Case("ram-not-skipped", "volatile anyway",
         guest(ram=(ram(named_file=False, shared=False),), binary=values.binary("10.0.13"))),
    Case("ram-fd-missing", "no descriptor", guest(ram=(ram(fd=None),)), [(B, "ram0")]),
    Case("ram-fd-missing", "there", guest()),
    Case("ram-discarded-at-exit", "switched off", guest(ram=(ram(discard_data=True),)), [(N, "ram0")]),
    Case("ram-discarded-at-exit", "out of reach", guest(ram=(ram(discard_data=True, qom_path=""),)), [(B, "ram0")]),
    Case("ram-discarded-at-exit", "off", guest()),
    Case("writes-ram-at-start", "data", guest("-device", "loader,addr=0x1000,data=1,data-len=4,id=l0"), [(B, "l0")]),
    Case("writes-ram-at-start", "file", guest("-device", "loader,file=/x"), [(B, "loader file=/x")]),
    Case("writes-ram-at-start", "sets a CPU only", guest("-device", "loader,addr=0x1000,cpu-num=0")),
    Case("writes-ram-at-start", "seen in the rehearsal", guest(), [(B, "ram0")],
         {"rehearsal": rehearsal(written=(("ram0", 4096),))}),
    Case("writes-ram-at-start", "virtio-mem of 7.2", guest("-device", "virtio-mem-pci,memdev=m,id=vm0"), [(B, "vm0")],
         {"target": target(binary=replace(target().binary, version="7.2.22"))}),
    Case("writes-ram-at-start", "virtio-mem of 8.1", guest("-device", "virtio-mem-pci,memdev=m,id=vm0"), [],
         {"target": target(binary=replace(target().binary, version="8.1.0"))}),
    Case("writes-ram-at-start", "not rehearsed", guest(), [], {"rehearsal": None}),
    Case("drift-memory", "hot-plugged", guest(ram=(ram(), ram("dimm1", in_argv=False))), [(B, "dimm1")]),
    Case("drift-memory", "none", guest()),
]  # fmt: skip

MIGRATION = [
    Case("no-monitor", "none", guest(monitor=None), [(B, "monitor")]),
    Case("no-monitor", "there", guest()),
    Case("monitor-held", "by another",
         guest(monitor=None, chardevs=(chardev("mon0", monitor="control", connected=True),)), [(B, "mon0")]),
    Case("monitor-held", "by another, who lends it", guest(monitor_held=True), [(B, "mon0")]),
    Case("monitor-held", "by us", guest(chardevs=(chardev("mon0", monitor="control", connected=True),))),
    Case("not-migratable", "9p", guest(blocked_reasons=("Migration is disabled when VirtFS export path is mounted",)),
         [(B, "migration")]),
    Case("not-migratable", "fine", guest()),
    Case("stream-cannot-skip", "old QEMU", guest(capabilities=(("events", False),)), [(B, "running QEMU")]),
    Case("stream-cannot-skip", "new QEMU", guest(), [(B, "new QEMU")],
         {"target": target(capabilities=frozenset({"events"}))}),
    Case("stream-cannot-skip", "both can", guest()),
    Case("busy-migration", "active", guest(migration="active"), [(B, "migration")]),
    Case("busy-migration", "postcopy", guest(migration="postcopy-paused"), [(B, "migration")]),
    *(Case("busy-migration", f"over: {s!r}", guest(migration=s)) for s in ("", "none", "completed", "failed")),
    Case("busy-job", "backup", guest(jobs=("backup j0",)), [(B, "backup j0")]),
    Case("busy-job", "none", guest()),
    *(Case("guest-state", s, guest(runstate=s)) for s in ("running", "paused")),
    *(Case("guest-state", s, guest(runstate=s), [(B, s)])
      for s in ("io-error", "internal-error", "guest-panicked", "shutdown", "prelaunch", "suspended", "inmigrate",
                "postmigrate", "finish-migrate", "watchdog", "save-vm", "restore-vm", "debug", "colo", "preconfig",
                "a-state-of-the-future")),
    Case("capability-left-on", "on", guest(capabilities=(("x-ignore-shared", True),)), [(W, "x-ignore-shared")]),
    Case("capability-left-on", "off", guest()),
]  # fmt: skip

YAMA = Untraceable(
    why="kernel.yama.ptrace_scope is 1", ability="CAP_SYS_PTRACE", way_out="needs CAP_SYS_PTRACE"
)

UNDER_LIBVIRT = guest(supervisors=(Supervisor(kind="libvirt", who="libvirt"),))

PROCESS = [
    *(Case("supervised", kind, guest(supervisors=(Supervisor(kind=kind, who="w"),)), [(B, f"{kind} w")])
      for kind in ("systemd", "libvirt", "container", "parent", "something")),
    Case("supervised", "nobody", guest()),
    Case("privileges", "root", guest(uid=107)),
    Case("privileges", "the owner", guest(uid=107), [], {"host": host(uid=107, capabilities=())}),
    Case("privileges", "a stranger", guest(uid=107), [(B, "uid 1000"), (B, "uid 1000")],
         {"host": host(uid=1000, capabilities=())}),
    Case("privileges", "a stranger who may trace", guest(uid=107), [(B, "uid 1000")],
         {"host": host(uid=1000, capabilities=("CAP_SYS_PTRACE",))}),
    Case("privileges", "something was hidden", guest(unreadable=("/proc/4242/fd",)), [(B, "/proc/4242/fd")]),
    Case("limits", "above ours", guest(limits={"RLIMIT_MEMLOCK": (8, 16)}), [(B, "RLIMIT_MEMLOCK")],
         {"host": host(capabilities=(), limits={"RLIMIT_MEMLOCK": (8, 8)})}),
    Case("limits", "unlimited", guest(limits={"RLIMIT_MEMLOCK": (8, -1)}), [(B, "RLIMIT_MEMLOCK")],
         {"host": host(capabilities=(), limits={"RLIMIT_MEMLOCK": (8, 8)})}),
    Case("limits", "ours are unlimited", guest(limits={"RLIMIT_MEMLOCK": (8, -1)}), [],
         {"host": host(capabilities=(), limits={"RLIMIT_MEMLOCK": (-1, -1)})}),
    Case("limits", "we may raise them", guest(limits={"RLIMIT_MEMLOCK": (8, -1)}), [],
         {"host": host(limits={"RLIMIT_MEMLOCK": (8, 8)})}),
    Case("command-line", "unknown option", guest("-frobnicate"), [(B, "command line")]),
    Case("command-line", "configuration gone", guest("-readconfig", "/etc/vm.cfg"), [(B, "command line")]),
    Case("command-line", "configuration there",
         guest("-readconfig", "/etc/vm.cfg", config_files=(("/etc/vm.cfg", '[memory]\n  size = "1G"\n'),))),
    Case("command-line", "fine", guest()),
    Case("chroot", "-chroot", guest("-chroot", "/var/empty"), [(B, "/var/empty")]),
    Case("chroot", "-run-with", guest("-run-with", "chroot=/var/empty"), [(B, "/var/empty")]),
    Case("chroot", "none", guest()),
    Case("runas", "the old spelling", guest("-runas", "nobody"), [(B, "nobody")]),
    Case("runas", "the new one", guest("-run-with", "user=vm"), [(B, "vm")]),
    Case("runas", "another of its words", guest("-run-with", "async-teardown=on")),
    Case("file-gone", "firmware", guest(gone_files=("/usr/share/OVMF.fd",)), [(B, "/usr/share/OVMF.fd")]),
    Case("file-gone", "none", guest()),
    Case("config-changed", "edited", guest(changed_files=("/etc/vm.cfg",)), [(B, "/etc/vm.cfg")]),
    Case("config-changed", "as it was", guest()),
    Case("loadvm", "-loadvm", guest("-loadvm", "s1"), [(N, "s1")]),
    Case("loadvm", "none", guest()),
    Case("added-options", "of an earlier update", guest(added_options=("-d", "trace")), [(N, "-d, trace")]),
    Case("added-options", "none", guest()),
    Case("foreign-variables", "planted", guest(environ=(("A", "1"), ("CPR_FD_a", "3,1"), ("QEMU_START_FREEZE", ""))),
         [(N, "CPR_FD_a, QEMU_START_FREEZE")]),
    Case("foreign-variables", "what an update leaves", guest(environ=(("A", "1"), ("CPR_RUN", "r1/42")))),
    Case("ptrace", "Yama", guest(untraceable=YAMA), [(B, "CAP_SYS_PTRACE")]),
    Case("take-descriptors", "Yama", guest(untraceable=YAMA), [(B, "CAP_SYS_PTRACE")], {"host": host(capabilities=())}),
    Case("take-descriptors", "a tracer", guest(untraceable=Untraceable(why="traced by pid 7"))),
    Case("take-descriptors", "none", guest()),
    Case("ptrace", "a debugger", guest(untraceable=Untraceable(why="it is traced by pid 7")), [(B, "pid 4242")]),
    Case("ptrace", "it can be", guest()),
    Case("async-teardown", "two", guest(teardown_helpers=(50, 51)), [(N, "pid 50, 51")]),
    Case("async-teardown", "none", guest()),
    Case("seccomp-filters", "three", guest(seccomp_filters=3), [(N, "pid 4242")]),
    Case("thread-ids", "libvirt remembers them", UNDER_LIBVIRT, [(N, "CAP_CHECKPOINT_RESTORE")],
         {"host": host(capabilities=())}),
    Case("thread-ids", "nobody remembers them", guest(), [], {"host": host(capabilities=())}),
    *(Case("thread-ids", f"kept with {name}", UNDER_LIBVIRT, [], {"host": host(capabilities=(name,))})
      for name in ("CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE")),
    Case("seccomp-filters", "200", guest(seccomp_filters=200), [(N, "pid 4242")]),
    Case("seccomp-filters", "as many as the kernel takes", guest(seccomp_filters=201), [(B, "pid 4242")]),
    *(Case("seccomp-filters", str(n), guest(seccomp_filters=n)) for n in (None, 0, 1)),
]  # fmt: skip

DRIFT = [
    Case("drift-device", "as on the command line", guest(*DRIVE, devices=VD0), [], {"rehearsal": SEEN}),
    Case("drift-device", "plugged in", guest(*DRIVE, devices=(*VD0, device("e1000", "n1"))), [(B, "n1")],
         {"rehearsal": SEEN}),
    Case("drift-device", "unplugged", guest(*DRIVE), [(B, "vd0")], {"rehearsal": SEEN}),
    Case("drift-device", "unplugged, not rehearsed", guest(*DRIVE), [(B, "vd0")], {"rehearsal": None}),
    Case("drift-device", "plugged in, not rehearsed", guest(devices=VD0), [(B, "vd0")], {"rehearsal": None}),
    Case("drift-device", "without an id, by number", guest(devices=(device("e1000", "device[0]", anonymous=True),)),
         [(B, "e1000")]),
    Case("drift-device", "without an id, the same",
         guest(devices=(device("e1000", "device[1]", anonymous=True),)), [],
         {"rehearsal": rehearsal(devices=(device("e1000", "device[0]", anonymous=True),))}),
    Case("drift-device", "a CPU is not its matter", guest(devices=(device("qemu64-x86_64-cpu", "cpu1"),))),
    Case("drift-cpu", "as -smp says",
         guest("-smp", "2", vcpus=(Vcpu(index=0, thread_id=1), Vcpu(index=1, thread_id=2)))),
    Case("drift-cpu", "plugged in", guest("-smp", "1,maxcpus=2",
         vcpus=(Vcpu(index=0, thread_id=1), Vcpu(index=1, thread_id=2))), [(B, "cpu")]),
    Case("drift-cpu", "topology alone", guest("-smp", "sockets=1,cores=2", vcpus=(Vcpu(index=0, thread_id=1),)),
         [(B, "cpu")]),
    Case("drift-cpu", "-device", guest("-smp", "1,maxcpus=2", "-device", "qemu64-x86_64-cpu,id=c1,core-id=1",
         vcpus=(Vcpu(index=0, thread_id=1), Vcpu(index=1, thread_id=2)))),
    Case("drift-cpu", "none said", guest(vcpus=(Vcpu(index=0, thread_id=1),))),
    Case("drift-object", "made later", guest(iothreads=(("io1", 5),)), [(B, "io1")]),
    Case("drift-object", "in argv", guest("-object", "iothread,id=io1", iothreads=(("io1", 5),))),
    Case("drift-chardev", "made later", guest(chardevs=(chardev("c9", in_argv=False),)), [(B, "c9")]),
    Case("drift-chardev", "made by the rehearsed start too", guest(chardevs=(chardev("c9", in_argv=False),)), [],
         {"rehearsal": rehearsal(chardevs=("c9",))}),
    Case("chardev-not-movable", "the gdb stub's own", guest(chardevs=(chardev("#chr1", backend="gdb", server=False),))),
    Case("drift-chardev", "the gdb stub's own", guest(chardevs=(chardev("#chr1", backend="gdb", in_argv=False),))),
    Case("drift-chardev", "in argv", guest(chardevs=(chardev(),))),
    Case("drift-netdev", "made later", guest(netdevs=(netdev(in_argv=False),)), [(B, "net0")]),
    Case("drift-netdev", "in argv", guest(netdevs=(netdev(),))),
    Case("snapshot-mode", "-snapshot", guest("-snapshot"), [(B, "-snapshot")]),
    Case("snapshot-mode", "snapshot=on", guest("-drive", "file=/a,id=d0,snapshot=on"), [(B, "d0")]),
    Case("snapshot-mode", "none", guest(*DRIVE)),
    Case("drift-chain", "as argv says", guest(*DRIVE, chains=(chain(),))),
    Case("drift-chain", "a backing file is no drift", guest(*DRIVE, chains=(chain("/vm/disk.qcow2", "/vm/base.img"),))),
    Case("drift-chain", "a relative name", guest("-hda", "disk.img", cwd="/vm", chains=(chain("disk.img"),))),
    Case("drift-chain", "a snapshot", guest(*DRIVE, chains=(chain("/vm/overlay.qcow2", "/vm/disk.qcow2"),)),
         [(B, "vd0")]),
    Case("drift-chain", "another medium", guest("-cdrom", "/iso/a.iso", chains=(chain("/iso/b.iso", device="cd0"),)),
         [(B, "cd0"), (B, "/iso/a.iso")]),
    Case("drift-chain", "ejected", guest("-cdrom", "/iso/a.iso", chains=(chain("", device="cd0"),)),
         [(B, "/iso/a.iso")]),
    Case("drift-chain", "-blockdev", guest("-blockdev", '{"driver":"file","filename":"/vm/a","node-name":"f0"}',
         chains=(chain("/vm/a"),))),
    Case("drift-chain", "a node that no device has", guest("-blockdev", "file,filename=/vm/a,node-name=f0",
         nodes=(BlockNode(name="f0", driver="file", filename="/vm/a", size=1, read_only=True),))),
    Case("drift-chain", "a network name is spelt otherwise", guest("-drive", "file=nbd:localhost:10809,id=d0",
         chains=(chain("nbd://localhost:10809"),))),
    Case("drift-chain", "a descriptor", guest("-drive", "file=/dev/fdset/1,id=d0", chains=(chain("/dev/fdset/1"),))),
    Case("drift-chain", "snapshot=on says so itself",
         guest("-drive", "file=/vm/a,id=d0,snapshot=on", chains=(chain("/var/tmp/vl.x", "/vm/a"),))),
    Case("throttle-set", "over QMP", guest(*DRIVE, chains=(chain(throttle=(("iops", 100),)),)), [(B, "vd0")]),
    Case("throttle-set", "in argv", guest("-drive", "file=/a,id=d0,throttling.iops-total=100,bps_rd=1M",
         chains=(chain("/a", throttle=(("iops", 100), ("bps_rd", MIB), ("iops_max_length", 1))),))),
    Case("throttle-set", "taken away", guest("-drive", "file=/a,id=d0,iops=100", chains=(chain("/a"),)), [(B, "vd0")]),
    Case("throttle-set", "a drive without an id", guest("-drive", "file=/a,if=virtio,iops=100",
         chains=(chain("/a", drive="virtio0", throttle=(("iops", 100),)),))),
]  # fmt: skip

BINARY = [
    Case("binary-same", "the same file", guest(binary=replace(values.binary(), inode=200)),
         [(N, "/opt/qemu/bin/qemu-system-x86_64")]),
    Case("binary-same", "another", guest()),
    Case("machine-unknown", "gone", guest(machine="pc-i440fx-2.1"), [(B, "pc-i440fx-2.1")]),
    Case("machine-unknown", "there", guest()),
    Case("device-unknown", "a module is missing", guest(*DRIVE, devices=VD0), [(B, "vd0")],
         {"target": target(device_types=frozenset({"e1000"})), "rehearsal": SEEN}),
    Case("device-unknown", "there", guest(*DRIVE, devices=VD0), [],
         {"target": target(device_types=frozenset({"virtio-blk-pci"})), "rehearsal": SEEN}),
    Case("options-removed", "gone", guest("-sandbox", "on"), [(B, "-sandbox")],
         {"target": target(options=knows("sandbox"))}),
    Case("options-removed", "translated", guest("-no-hpet"), [(N, "command line")],
         {"target": target(options=knows("no-hpet"))}),
    Case("options-removed", "known", guest("-no-reboot"), [], {"target": target(options=knows())}),
    Case("start-refused", "in its own words", guest(), [(B, "rehearsal")],
         {"rehearsal": rehearsal(started=False, words="no such device")}),
    Case("start-refused", "started", guest()),
    Case("cpu-differs", "a feature", guest(), [(W, "cpu")], {"rehearsal": rehearsal(cpu_differences=("-avx2",))}),
    Case("cpu-differs", "none", guest()),
    Case("accelerator-changes", "KVM is not to be had", guest(accelerator="kvm"), [(B, "tcg")]),
    Case("accelerator-changes", "not rehearsed", guest("-accel", "kvm", "-accel", "tcg", accelerator="kvm"),
         [(W, "kvm tcg")], {"rehearsal": None}),
    Case("accelerator-changes", "the same", guest()),
]  # fmt: skip

NULL_STDIN = open_file(0, "device", "/dev/null", "stdio")

DEVICES = [
    Case("chardev-not-movable", "a listening socket", guest(chardevs=(chardev(),))),
    Case("chardev-not-movable", "a file", guest(chardevs=(chardev(backend="file", server=False, movable=False),))),
    *(Case("chardev-not-movable", kind,
           guest(chardevs=(chardev(backend=kind, server=False, listener=None, movable=False),)), [(B, "serial0")])
      for kind in ("pty", "stdio", "pipe", "serial", "parallel", "spicevmc", "spiceport", "udp", "braille", "dbus",
                   "qemu-vdagent", "something")),
    Case("chardev-not-movable", "stdio from /dev/null",
         guest(chardevs=(chardev(backend="stdio", server=False, movable=False),), open_files=(NULL_STDIN,))),
    Case("chardev-not-movable", "multiplexed", guest(chardevs=(chardev(movable=False),)), [(B, "serial0")]),
    Case("chardev-not-movable", "its listener is not found", guest(chardevs=(chardev(listener=None),)),
         [(B, "serial0")]),
    Case("chardev-not-movable", "an outgoing connection",
         guest(chardevs=(chardev(server=False, listener=None, client=11, connected=True),))),
    Case("chardev-not-movable", "an outgoing connection that is not found",
         guest(chardevs=(chardev(server=False, listener=None, connected=True),)), [(B, "serial0")]),
    Case("chardev-not-movable", "an outgoing connection that was lost",
         guest(chardevs=(chardev(server=False, listener=None),)), [(B, "serial0")]),
    Case("chardev-not-movable", "one that comes again",
         guest(chardevs=(chardev(server=False, listener=None, reconnect=True),))),
    Case("chardev-framing", "telnet client", guest(chardevs=(chardev(plain=False, connected=True, movable=False),)),
         [(W, "serial0")]),
    Case("chardev-framing", "telnet, nobody there", guest(chardevs=(chardev(plain=False, movable=False),))),
    Case("chardev-framing", "outgoing TLS", guest(chardevs=(chardev(plain=False, connected=True, server=False),)),
         [(B, "serial0")]),
    Case("chardev-framing", "outgoing TLS that comes again",
         guest(chardevs=(chardev(plain=False, connected=True, server=False, reconnect=True),)), [(W, "serial0")]),
    Case("monitor-client", "on another monitor",
         guest(chardevs=(chardev("mon1", monitor="control", connected=True),)), [(B, "mon1")]),
    Case("monitor-client", "somebody at a prompt",
         guest(chardevs=(chardev("mon1", monitor="readline", connected=True),)), [(B, "mon1"), (N, "mon1")]),
    Case("monitor-client", "somebody at a prompt that has a serial line beside it",
         guest(chardevs=(chardev("mon1", monitor="readline", connected=True, movable=False),)), [(B, "mon1")]),
    Case("monitor-client", "on ours, that is us",
         guest(chardevs=(chardev("mon0", monitor="control", connected=True),))),
    Case("monitor-client", "behind us, served afterwards",
         guest(chardevs=(chardev("mon0", monitor="control", connected=True, queued=1),))),
    Case("client-queued", "behind another", guest(chardevs=(chardev(connected=True, queued=2),)), [(B, "serial0")]),
    Case("client-queued", "first in line", guest(chardevs=(chardev(queued=1),))),
    Case("vnc-client", "one", guest(vnc=(vnc(clients=1),)), [(W, "default")]),
    Case("vnc-client", "none", guest(vnc=(vnc(),))),
    Case("vnc-password", "over QMP", guest("-vnc", ":1,password=on", vnc=(vnc(auth="vnc"),)), [(W, "default")]),
    Case("vnc-password", "password-secret", guest("-vnc", ":1,password-secret=s0", vnc=(vnc(auth="vnc"),))),
    Case("vnc-password", "none", guest("-vnc", ":1", vnc=(vnc(),))),
    Case("vnc-websocket", "on", guest(vnc=(browsers(),)), [(B, "default")]),
    Case("vnc-websocket", "one of a range",
         guest("-vnc", ":1,websocket=on,to=9", vnc=(browsers(),)), [(B, "default"), (B, "default")]),
    Case("vnc-websocket", "a UNIX socket",
         guest(vnc=(browsers(family="unix", host="/run/web"),)), [(B, "default"), (B, "default")]),
    Case("vnc-websocket", "nobody's", guest(vnc=(browsers(number=None),)), [(B, "default"), (B, "default")]),
    Case("vnc-websocket", "off", guest(vnc=(vnc(),))),
    *(Case("display-local", kind, guest("-display", kind), [(B, kind)])
      for kind in ("gtk", "sdl", "curses", "dbus", "egl-headless", "spice-app")),
    Case("display-local", "none", guest()),
    Case("spice", "on", guest(spice="none"), [(B, "spice")]),
    Case("spice", "a client",
         guest(spice="none", open_files=(replace(open_file(12, "socket", "x"), owner="spice"),)),
         [(B, "spice"), (W, "spice")]),
    Case("spice-password", "over QMP", guest("-spice", "port=5930", spice="spice"), [(W, "spice")]),
    Case("spice-password", "on the command line", guest("-spice", "port=5930,password-secret=s", spice="spice")),
    Case("spice-password", "none", guest("-spice", "port=5930,disable-ticketing=on", spice="none")),
    Case("spice", "off", guest()),
    Case("listener-unknown", "an NBD server", guest(open_files=(open_file(12, "listener", "0.0.0.0:10809"),)),
         [(B, "fd 12")]),
    Case("listener-unknown", "a chardev's", guest(open_files=(open_file(12, "listener", "x", "chardev:serial0"),))),
    Case("listener-unknown", "a connection", guest(open_files=(open_file(12, "socket", "x"),))),
    Case("listener-gap", "hostfwd", guest(netdevs=(netdev("user", hostfwd=("tcp::2222-:22",)),)), [(N, "net0")]),
    Case("listener-gap", "gdb", guest(chardevs=(chardev("gdb", backend="gdb", filename="tcp::1234,server=on"),)),
         [(W, "tcp::1234,server=on")]),
    Case("listener-gap", "none", guest()),
    Case("pty-unknown", "one that is found by being alone", guest(chardevs=(pty("serial0"),))),
    Case("pty-unknown", "two that are named", guest(
         chardevs=(pty("serial0"), pty("serial1")),
         open_files=tuple(open_file(20 + n, "pty", "/dev/ptmx", f"chardev:serial{n}") for n in (0, 1)))),
    Case("pty-unknown", "two without a name", guest(chardevs=(pty("serial0"), pty("serial1"))),
         [(B, "serial0, serial1")]),
    Case("pty-unknown", "one of two", guest(
         chardevs=(pty("serial0"), pty("serial1")),
         open_files=(open_file(20, "pty", "/dev/ptmx", "chardev:serial1"),))),
    *(Case("netdev-unsupported", kind, guest(netdevs=(netdev(kind, fds=()),)), [(B, "net0")])
      for kind in ("vhost-user", "vhost-vdpa", "l2tpv3", "vde", "netmap", "socket", "stream", "dgram", "af-xdp")),
    Case("netdev-unsupported", "a tap whose descriptor is not found", guest(netdevs=(netdev(fds=()),)), [(B, "net0")]),
    *(Case("netdev-unsupported", kind, guest(netdevs=(netdev(kind),))) for kind in ("tap", "bridge", "user")),
    Case("slirp-connections", "user", guest(netdevs=(netdev("user"),)), [(W, "net0")]),
    Case("slirp-connections", "tap", guest(netdevs=(netdev(),))),
    *(Case(check, kind, guest(devices=(device(kind),)), [(B, "dev0")])
      for check, kind in (("vfio", "vfio-pci"), ("vfio", "vfio-pci-nohotplug"), ("vhost-vsock", "vhost-vsock-pci"),
                          ("vhost-user", "vhost-user-fs-pci"), ("vhost-user", "vhost-user-blk-pci"),
                          ("device-exclusive", "vhost-vdpa-device-pci"), ("device-exclusive", "vhost-scsi-pci"),
                          ("device-exclusive", "usb-host"), ("device-exclusive", "ivshmem-doorbell"))),
    *(Case(check, "none of these", guest(devices=(device("virtio-net-pci"),)))
      for check in ("vfio", "vhost-vsock", "vhost-user", "device-exclusive")),
    Case("vfio", "by its descriptor", guest(open_files=(open_file(40, "vfio", "/dev/vfio/12"),)), [(B, "fd 40")]),
    *(Case("tpm", kind, guest("-tpmdev", f"{kind},id=t0"), [(B, "t0")]) for kind in ("emulator", "passthrough")),
    Case("tpm", "none", guest()),
]  # fmt: skip

HOST = [
    Case("room-memory", "cgroup", guest(memory_room=100 * MIB), [(B, "memory.max")]),
    Case("room-memory", "of a large QEMU", guest(memory_room=GIB, resident=4 * GIB), [(B, "memory.max")]),
    Case("room-memory", "host", guest(), [(B, "host memory")], {"host": host(memory_available=MIB)}),
    Case("room-memory", "enough", guest(memory_room=GIB)),
    Case("room-pids", "few", guest(pids_room=5), [(B, "pids.max")]),
    Case("room-pids", "enough", guest(pids_room=50)),
    Case("room-disk", "full", guest(), [(B, "/run/cpr")], {"host": host(run_directory_free=0)}),
    Case("room-disk", "no inodes", guest(), [(B, "/run/cpr")], {"host": host(run_directory_inodes=0)}),
    Case("room-disk", "enough", guest()),
    Case("room-fds", "of the new QEMU",
         guest(limits={"RLIMIT_NOFILE": (20, 4096)}, open_files=tuple(open_file(n, "tap") for n in range(15))),
         [(B, "RLIMIT_NOFILE")]),
    Case("room-fds", "of cpr", guest(), [(B, "RLIMIT_NOFILE")], {"host": host(limits={"RLIMIT_NOFILE": (20, 20)})}),
    Case("room-fds", "unlimited", guest(limits={"RLIMIT_NOFILE": (-1, -1)})),
]  # fmt: skip



def over(check: str, what: str, of: Guest, expected: Any = (), kexec: NextKernel | None = None) -> Case:
    """A case of a reboot; its guest has RAM on device DAX where it is not said otherwise."""
    return Case(check, what, of, list(expected), {"mode": "reboot", "kexec": kexec or next_kernel()})


def dax(**changes: Any) -> Any:
    return ram(**{"backing": Backing.DEVDAX, "path": "/dev/dax0.0", "fd": None, "storage": DEVDAX, **changes})


def on_dax(*more: str, **changes: Any) -> Guest:
    return guest(*more, **{"ram": (dax(),), **changes})


AGENT = GuestAgent(path="/run/qga", version="10.0", can_suspend=True)
NVME = (device("vfio-pci", "nvme0"),)
DISK = Storage(kind=Backing.DISK_FILE, path="/vm/ram0", filesystem="ext4", disks=("sda",))
BARE = next_kernel(command_line="ro quiet")
MDEV = "/sys/bus/mdev/devices/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
NO_SET = NotHadAgain("-add-fd set 2", "fd=9 was passed in", "give the path")
LIBVIRT, CONTAINER = Supervisor(kind="libvirt", who="libvirt"), Supervisor(kind="container", who="pod")
SERVICE, SHELL = Supervisor(kind="systemd", who="web1.service"), Supervisor(kind="parent", who="bash (pid 7)")
RAM_KINDS = (Backing.ANONYMOUS, Backing.MEMFD, Backing.TMPFS, Backing.HUGETLB, Backing.GUEST_MEMFD, Backing.UNKNOWN)
COPY = RamDirectory(path="/srv/ram", free=100 * GIB, rate=1e9)


def fifth(separator: str, more: str = "") -> NextKernel:
    """A jump with four other regions in front of that of DEVDAX."""
    regions = [f"1G!{number}G" for number in (8, 10, 12, 14, 4)]
    word = "memmap=" + separator.join(regions) if separator == "," else " ".join(f"memmap={r}" for r in regions)
    return next_kernel(command_line=f"ro {word} {more}")


def copying(**changes: Any) -> NextKernel:
    """A jump for which RAM is copied."""
    return next_kernel(save_ram=replace(COPY, **changes))


COPYING = copying()

KEXEC = [
    *(over("ram-volatile-over-kexec", str(kind), guest(ram=(ram(backing=kind),)), [(B, "ram0")]) for kind in RAM_KINDS),
    over("ram-volatile-over-kexec", "devdax", on_dax()),
    over("ram-volatile-over-kexec", "private devdax", guest(ram=(dax(shared=False),)), [(B, "ram0")]),
    over("ram-volatile-over-kexec", "devdax of which nothing is known", guest(ram=(dax(storage=None),)), [(B, "ram0")]),
    over("ram-volatile-over-kexec", "a regular file called /dev/dax0.0",
         guest(ram=(dax(storage=Storage(kind=Backing.TMPFS, path="/dev/dax0.0")),)), [(B, "ram0")]),
    over("ram-volatile-over-kexec", "a file on a disk", guest(ram=(dax(storage=DISK),))),
    over("ram-volatile-over-kexec", "a file on a RAM disk",
         guest(ram=(dax(storage=replace(DISK, volatile="it lies on ram0")),)), [(B, "ram0")]),
    over("ram-volatile-over-kexec", "each at fault is named",
         guest(ram=(dax(id="a"), ram("b"), ram("c", backing=Backing.TMPFS))), [(B, "b"), (B, "c")]),
    over("ram-volatile-over-kexec", "only memmap is missing", on_dax(), [], BARE),
    over("memmap-missing", "it is", on_dax(), [(B, "ram0")], BARE),
    over("memmap-missing", "another range", on_dax(), [(B, "ram0")], next_kernel(command_line="memmap=512M!4G")),
    over("memmap-missing", "it is there", on_dax()),
    over("memmap-missing", "an NVDIMM needs none",
         guest(ram=(dax(storage=replace(DEVDAX, pmem=replace(REGION, provider="ACPI.NFIT"))),)), [], BARE),
    over("memmap-kaslr", "the fifth of its own", on_dax(), [(B, "ram0")], fifth(" ")),
    over("memmap-kaslr", "the fifth in a list", on_dax(), [], fifth(",")),
    over("memmap-kaslr", "nokaslr", on_dax(), [], fifth(" ", "nokaslr")),
    over("memmap-kaslr", "the first", on_dax()),
    over("memmap-kaslr", "a disk", guest(disks=(replace(DEVDAX, path="/mnt/disk"),)), [(B, "/mnt/disk")], fifth(" ")),
    over("memmap-kaslr", "an NVDIMM",
         on_dax(ram=(dax(storage=replace(DEVDAX, pmem=replace(REGION, provider="ACPI.NFIT", start=1))),)), [],
         fifth(" ")),
    over("memmap-missing", "a private mapping is lost anyhow", guest(ram=(dax(shared=False),)), [], BARE),
    over("ram-on-disk", "it is", guest(ram=(dax(storage=DISK),)), [(W, "ram0")]),
    over("ram-on-disk", "devdax", on_dax()),
    over("disk-volatile-over-kexec", "tmpfs",
         on_dax(disks=(Storage(kind=Backing.TMPFS, path="/dev/shm/disk"),)), [(B, "/dev/shm/disk")]),
    over("disk-volatile-over-kexec", "a RAM disk",
         on_dax(disks=(replace(DISK, path="/dev/ram0", volatile="it is RAM"),)), [(B, "/dev/ram0")]),
    over("disk-volatile-over-kexec", "disks",
         on_dax(disks=(DISK, Storage(kind=Backing.UNKNOWN, path="nbd://host/x")))),
    over("kexec-impossible", "it is", on_dax(), [(B, "kexec")], next_kernel(obstacles=("built without kexec",))),
    over("kexec-impossible", "it is not", on_dax()),
    over("kexec-kernel-missing", "a file is", on_dax(), [(B, "/boot/x")], next_kernel(missing=("/boot/x",))),
    over("kexec-kernel-missing", "none installed", on_dax(), [(B, "kernel")], next_kernel(image="")),
    over("kexec-kernel-missing", "no initrd", on_dax(), [(W, "/boot/vmlinuz-7.2")], next_kernel(initrd="")),
    over("kexec-kernel-missing", "all there", on_dax()),
    over("guest-not-saved", "two of them", on_dax(), [(B, "db1"), (B, "pid 7")], next_kernel(unsaved=("db1", "pid 7"))),
    over("guest-not-saved", "none", on_dax()),
    over("room-state", "full", on_dax(), [(B, "/var/lib/cpr")], next_kernel(state_directory_free=MIB)),
    over("room-state", "on tmpfs", on_dax(), [(B, "/var/lib/cpr")], next_kernel(state_directory_volatile="tmpfs")),
    over("room-state", "enough", on_dax(), [], next_kernel(state_directory_free=GIB)),
    over("restore-not-enabled", "it is not", on_dax(), [(B, "cpr-restore.service")],
         next_kernel(restores_by_itself=False)),
    over("restore-not-enabled", "it is", on_dax()),
    *(over("save-ram", str(kind), guest(ram=(ram(backing=kind),)), [(W, "ram0")], COPYING) for kind in RAM_KINDS[:4]),
    over("save-ram", "a private mapping of a file that is kept",
         guest(ram=(ram(shared=False, backing=Backing.DISK_FILE, storage=DISK),)), [(W, "ram0")], COPYING),
    over("save-ram", "a private mapping of a file that is gone",
         guest(ram=(ram(shared=False, backing=Backing.DISK_FILE, storage=replace(DISK, volatile="it is RAM")),)), [],
         COPYING),
    over("save-ram", "only blocks that are lost are named", guest(ram=(dax(id="a"), ram("b"))), [(W, "b")], COPYING),
    over("save-ram", "huge pages", guest(ram=(ram(backing=Backing.HUGETLB, page_size=2 * MIB),)),
         [(W, "ram0"), (N, "huge pages")], COPYING),
    over("save-ram", "RAM that is kept", on_dax(), [], COPYING),
    over("save-ram", "not asked for", guest()),
    *(over("save-ram", f"{kind}, that nobody can make anew", guest(ram=(ram(backing=kind),)), [], COPYING)
      for kind in RAM_KINDS[4:]),
    *(over("ram-volatile-over-kexec", f"{kind}, and a directory for it", guest(ram=(ram(backing=kind),)),
           [(B, "ram0")] if kind in RAM_KINDS[4:] else [], COPYING) for kind in RAM_KINDS),
    over("memmap-missing", "no copy makes up for that", on_dax(), [(B, "ram0")],
         next_kernel(command_line="ro quiet", save_ram=COPY)),
    over("save-ram-directory", "on tmpfs", on_dax(), [(B, "/srv/ram")], copying(volatile="it is RAM")),
    over("save-ram-directory", "of others", on_dax(), [(B, "/srv/ram")], copying(unusable="others may enter it")),
    over("save-ram-directory", "all well", guest(), [], COPYING),
    over("save-ram-directory", "none", guest()),
    over("save-ram-space", "too little for one guest", guest(), [(B, "/srv/ram")], copying(free=GIB)),
    over("save-ram-space", "enough", guest(), [], COPYING),
    over("save-ram-space", "of RAM that is kept", on_dax(), [], copying(free=0)),
    over("save-ram-time", "measured", guest(), [(W, "/srv/ram")], COPYING),
    over("save-ram-time", "not measured", guest(), [(W, "/srv/ram")], copying(rate=None, unmeasured="no room")),
    over("save-ram-time", "longer than allowed", guest(), [(B, "/srv/ram")], copying(rate=MIB * 1.0, timeout=120)),
    over("save-ram-time", "of RAM that is kept", on_dax(), [], COPYING),
    over("live-update", "a memfd", guest(), [(N, "/dev/liveupdate")], next_kernel(live_update=True)),
    over("live-update", "no memfd", on_dax(), [], next_kernel(live_update=True)),
    over("vfio-no-agent", "no port", on_dax(devices=NVME), [(B, "nvme0")]),
    over("vfio-no-agent", "by its descriptor", on_dax(open_files=(open_file(40, "vfio", "/dev/vfio/12"),)),
         [(B, "fd 40")]),
    over("vfio-no-agent", "it does not answer",
         on_dax(devices=NVME, agent=GuestAgent(path="/run/qga", error="no answer")), [(B, "nvme0")]),
    over("vfio-no-agent", "it may not suspend",
         on_dax(devices=NVME, agent=replace(AGENT, can_suspend=False)), [(B, "nvme0")]),
    over("vfio-no-agent", "no S3", on_dax(devices=NVME, agent=AGENT, s3_disabled=True), [(B, "nvme0")]),
    over("vfio-no-agent", "all well", on_dax(devices=NVME, agent=AGENT, s3_disabled=False)),
    over("vfio-no-agent", "no vfio", on_dax()),
    over("vfio-mdev", "it is", on_dax("-device", f"vfio-pci,id=g0,sysfsdev={MDEV}"), [(B, "g0")]),
    over("vfio-mdev", "of another bus", on_dax("-device", "vfio-ccw,id=c0,sysfsdev=/sys/bus/css/x"), [(B, "c0")]),
    over("vfio-mdev", "a PCI device", on_dax("-device", "vfio-pci,sysfsdev=/sys/bus/pci/devices/0000:03:00.0")),
    over("descriptor-not-recreated", "a set of descriptors", on_dax(not_had_again=(NO_SET,)), [(B, "-add-fd set 2")]),
    over("descriptor-not-recreated", "RAM that is lost anyhow", guest(not_had_again=(NotHadAgain("ram0", "w", "h"),))),
    over("descriptor-not-recreated", "RAM that would be kept",
         on_dax(not_had_again=(NotHadAgain("ram0", "w", "h"),)), [(B, "ram0")]),
    over("needed-after-boot", "of each kind",
         on_dax(needed_after_boot=(("interface", "tap0"), ("bridge", "br0"), ("socket", "/s"), ("address", "h:1"))),
         [(N, "tap0"), (N, "br0"), (N, "/s"), (N, "h:1")]),
    over("needed-after-boot", "nothing", on_dax()),
    over("namespace-own", "two", on_dax(own_namespaces=("mnt", "net")), [(B, "mnt, net")]),
    over("namespace-own", "none", on_dax(namespaces=(("mnt", 7),))),
    over("stdio-after-boot", "a log", on_dax(open_files=(open_file(2, "file", "/var/log/web1"),)), [(N, "stdio")]),
    over("stdio-after-boot", "a console", on_dax(chardevs=(chardev("c", backend="stdio"),)), [(N, "stdio")]),
    over("stdio-after-boot", "a daemon", on_dax(open_files=(open_file(2, "device", "/dev/null"),))),
    over("supervised-after-boot", "libvirt and a container", on_dax(supervisors=(LIBVIRT, CONTAINER)),
         [(B, "libvirt libvirt"), (B, "container pod")]),
    over("supervised-after-boot", "a service and a shell", on_dax(supervisors=(SERVICE, SHELL)),
         [(N, "systemd web1.service"), (N, "parent bash (pid 7)")]),
    over("supervised-after-boot", "a service that would start again",
         on_dax(supervisors=(SERVICE,), unguarded_unit="web1.service"), [(B, "systemd web1.service")]),
    over("supervised-after-boot", "nobody", on_dax()),
    over("not-migratable", "VFIO, which is judged by its agent",
         on_dax(binary=values.binary("9.0.0"), blocked_reasons=("VFIO migration ...",))),
    over("not-migratable", "VFIO in a QEMU that saves no sleeping guest",
         on_dax(binary=values.binary("8.2.9"), blocked_reasons=("VFIO device ...",)), [(B, "migration")]),
    over("not-migratable", "9p", on_dax(blocked_reasons=("9p is mounted",)), [(B, "migration")]),
]  # fmt: skip

CASES = [*MEMORY, *MIGRATION, *PROCESS, *DRIFT, *BINARY, *DEVICES, *HOST, *KEXEC]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.check}: {c.what}")
def test_check(case: Case) -> None:
    found = said(case.check, of=case.guest, **case.facts)
    assert [(f.severity, f.subject) for f in found] == case.expected
    for finding in found:
        assert finding.message
        if finding.severity is B:
            assert finding.hint, "a blocker has a way out"


def test_every_check_speaks_once_and_is_silent_once() -> None:
    speaking = {c.check for c in CASES if c.expected}
    silent = {c.check for c in CASES if not c.expected}
    assert speaking == set(REGISTRY)
    assert silent == set(REGISTRY)


def test_qemu_is_quoted() -> None:
    [refused] = said("start-refused", of=guest(), rehearsal=rehearsal(started=False, words="no such device"))
    [blocked] = said("not-migratable", of=guest(blocked_reasons=("a reason",)))
    assert '"no such device"' in refused.message
    assert '"a reason"' in blocked.message


def test_supervised_blocks_handover_alone() -> None:
    [finding] = said("supervised", of=guest(supervisors=(Supervisor(kind="systemd", who="vm.service"),)))
    assert finding.engines == ("handover",)
    assert not finding.ignorable
    assert "vm.service" in finding.message


def test_supervised_names_the_engine_that_keeps_the_pid() -> None:
    [finding] = said("supervised", of=guest(supervisors=(Supervisor(kind="systemd", who="vm.service"),)))
    assert "--engine reexec" in finding.hint


def test_what_cannot_be_traced_goes_over_by_handover_if_nobody_watches() -> None:
    watched = (Supervisor(kind="systemd", who="vm.service"),)
    traced = Untraceable(why="traced by pid 7")
    [alone] = said("ptrace", of=guest(untraceable=traced))
    [served] = said("ptrace", of=guest(untraceable=traced, supervisors=watched))
    assert alone.engines == served.engines == ("reexec",)
    assert not alone.ignorable
    assert "--engine handover" in alone.hint
    assert "handover" not in served.hint
    assert served.hint
    [lacking] = said("ptrace", of=guest(untraceable=YAMA))
    assert "CAP_SYS_PTRACE is missing" in lacking.message
    assert "handover" not in lacking.hint, "it takes descriptors by the same right"


def engines_blocked(check: str, of: Guest) -> set[str]:
    """Those of handover and re-exec that a blocker of this check concerns."""
    found = [f for f in said(check, of=of) if f.severity is B]
    return {engine for f in found for engine in f.engines or ("handover", "reexec")}


@pytest.mark.parametrize("kind", ["pty", "stdio", "pipe", "serial", "parallel", "spicevmc", "spiceport", "udp"])
def test_re_exec_keeps_what_two_processes_cannot_share(kind: str) -> None:
    held = guest(chardevs=(chardev(backend=kind, server=False, listener=None, movable=False),))
    assert engines_blocked("chardev-not-movable", held) == {"handover"}


@pytest.mark.parametrize(
    ("check", "of"),
    [
        ("chardev-not-movable", guest(chardevs=(chardev(movable=False),))),
        ("vhost-vsock", guest(devices=(device("vhost-vsock-pci"),))),
        ("monitor-client", guest(chardevs=(chardev("mon1", monitor="control", connected=True),))),
        ("monitor-client", guest(chardevs=(chardev("mon1", monitor="readline", connected=True),))),
        ("monitor-held", guest(monitor_held=True)),
        ("vnc-websocket", guest(vnc=(browsers(),))),
        ("spice", guest(spice="none")),
    ],
)
def test_re_exec_has_no_second_qemu(check: str, of: Guest) -> None:
    assert engines_blocked(check, of) == {"handover"}


@pytest.mark.parametrize(
    ("check", "of"),
    [
        ("chardev-not-movable", guest(chardevs=(chardev(backend="dbus", server=False, listener=None),))),
        ("chardev-not-movable", guest(chardevs=(chardev(backend="braille", server=False, listener=None),))),
        ("chardev-not-movable", guest(chardevs=(chardev(backend="something", server=False, listener=None),))),
        ("chardev-not-movable", guest(chardevs=(chardev(server=False, listener=None),))),
        ("chardev-not-movable", guest(chardevs=(chardev(listener=None),))),
        ("chardev-framing", guest(chardevs=(chardev(plain=False, connected=True, server=False),))),
        ("monitor-client", guest(chardevs=(chardev("mon1", monitor="readline", connected=True, plain=False),))),
        ("vnc-websocket", guest(vnc=(browsers(number=None),))),
        ("listener-unknown", guest(open_files=(open_file(12, "listener", "0.0.0.0:10809"),))),
        ("netdev-unsupported", guest(netdevs=(netdev("vhost-user", fds=()),))),
        ("netdev-unsupported", guest(netdevs=(netdev("stream", fds=()),))),
        ("vfio", guest(devices=(device("vfio-pci"),))),
        ("vhost-user", guest(devices=(device("vhost-user-fs-pci"),))),
        ("device-exclusive", guest(devices=(device("usb-host"),))),
        ("tpm", guest("-tpmdev", "emulator,id=tpm0,chardev=c0")),
        ("ram-volatile", guest(ram=(ram(shared=False),))),
    ],
)
def test_what_no_new_program_can_open_again_is_refused_before_the_old_one_is_gone(check: str, of: Guest) -> None:
    assert engines_blocked(check, of) == {"handover", "reexec"}


def test_sessions_that_no_engine_keeps_are_told_alike() -> None:
    framed = chardev(plain=False, connected=True, movable=False)
    telling = guest(chardevs=(framed, pty("serial1")), vnc=(vnc(clients=2),))
    heard = [f for f in run_checks(telling, host(), target(), rehearsal()) if "will disconnect: " in f.message]
    assert {(f.check, f.engines) for f in heard} == {
        ("chardev-framing", ()), ("vnc-client", ()),
    }  # fmt: skip
    assert {f.severity for f in heard} == {W}
    assert {f.engines for f in said("chardev-not-movable", of=telling)} == {("handover",)}


V1 = frozenset({"cprsave", "cprload", "cprinfo", "quit"})


@pytest.mark.parametrize(
    ("kept", "commands", "words"),
    [
        (False, V1, ""),
        (False, frozenset({"quit"}), ""),
        (True, frozenset({"quit"}), "only a QEMU with cprsave"),
        (True, V1 | {"cprexec"}, "only a QEMU with cprsave"),
        (True, V1, "could keep it"),
    ],
)
def test_private_ram_on_a_kernel_that_keeps_it_over_exec(kept: bool, commands: frozenset[str], words: str) -> None:
    """It is refused all the same; the hint says what would be possible."""
    private = guest(ram=(ram(shared=False),))
    on, to = host(keeps_memory_over_exec=kept), target(commands=commands)
    [finding] = said("ram-volatile", of=private, host=on, target=to)
    [without] = said("ram-volatile", of=private)
    assert finding.severity is B
    assert (words in finding.hint) if words else finding.hint == without.hint
    assert keeps_private_ram(on, to) is (words == "could keep it")


def test_the_word_that_is_missing_is_in_the_hint() -> None:
    [missing] = said("memmap-missing", of=on_dax(), mode="reboot", kexec=BARE)
    assert "memmap=1G!4G" in missing.message
    assert "memmap=1G!4G" in missing.hint


def test_vfio_is_not_refused_twice() -> None:
    reasons = ("0000:03:00.0: VFIO migration is not supported",)
    passed = {"devices": NVME, "agent": AGENT, "blocked_reasons": reasons, "binary": values.binary("10.0.13")}
    of = on_dax("-device", "vfio-pci,id=nvme0,host=03:00.0", **passed)
    assert run_checks(of, host(), target(), None, mode="reboot", kexec=next_kernel()) == ()
