"""The nouns, all frozen: what a guest is, what was found about it, what is going to be done, and what came out.

`discover` and `survey` make these from the machine; `checks`, `plan` and `verify` are functions on them. The standard
library only; nothing here does I/O. Sizes are bytes, times are seconds, process start times are clock ticks since boot.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, order=True)
class ProcessId:
    """A process: a pid alone is reused, a pid with its start time is not."""

    pid: int
    start_time: int

    def __str__(self) -> str:
        return str(self.pid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Binary:
    """A QEMU program: the file a process runs (through /proc/PID/exe), or one installed on disk."""

    path: str
    version: str | None = None
    package: str = ""
    device: int = 0
    inode: int = 0
    build_id: str | None = None
    deleted: bool = False
    """The path no longer leads to a file."""
    replaced: bool = False
    """Another file stands at the path now."""

    @property
    def identity(self) -> tuple[int, int]:
        return self.device, self.inode

    def __str__(self) -> str:
        return f"{self.version or 'version unknown'} ({self.path})"


class Runstate(StrEnum):
    """QEMU's RunState, as `query-status` names it; only those that cpr treats differently have a meaning here."""

    RUNNING = "running"
    PAUSED = "paused"
    PRELAUNCH = "prelaunch"
    INMIGRATE = "inmigrate"
    POSTMIGRATE = "postmigrate"
    FINISH_MIGRATE = "finish-migrate"
    SUSPENDED = "suspended"
    SHUTDOWN = "shutdown"
    IO_ERROR = "io-error"
    INTERNAL_ERROR = "internal-error"
    GUEST_PANICKED = "guest-panicked"
    WATCHDOG = "watchdog"
    SAVE_VM = "save-vm"
    RESTORE_VM = "restore-vm"
    DEBUG = "debug"
    COLO = "colo"
    PRECONFIG = "preconfig"


class Backing(StrEnum):
    """What a RAM block's pages are."""

    ANONYMOUS = "anonymous"
    MEMFD = "memfd"
    TMPFS = "tmpfs"
    HUGETLB = "hugetlb"
    DISK_FILE = "file"
    FSDAX = "fsdax"
    DEVDAX = "devdax"
    GUEST_MEMFD = "guest_memfd"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class PmemRegion:
    """A region of persistent memory (the kernel's nvdimm bus) and the namespace in it."""

    provider: str
    """Who described it: `e820` (a memmap= of this boot), `ACPI.NFIT` (a real or emulated NVDIMM), ..."""
    start: int | None
    """Physical address; None where it could not be read (root alone may)."""
    size: int
    """Bytes of the whole region; the namespace's own book-keeping lies in it."""
    namespace_uuid: str = ""
    mode: str = ""
    """devdax, fsdax, sector or raw."""
    align: int = 0
    bus: str = ""
    region: str = ""
    namespace: str = ""
    """Names (ndbus0, region0, namespace0.0) are counted anew at every boot: not part of the identity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """What a path or a descriptor leads to, and on what that lies."""

    kind: Backing
    path: str = ""
    filesystem: str = ""
    """Type: ext4, tmpfs, ...; empty for device DAX."""
    device: tuple[int, int] = (0, 0)
    """(major, minor) of the character device, else of the file system (st_dev): counted anew at every boot."""
    inode: int = 0
    size: int = 0
    fs_uuid: str = ""
    pmem: PmemRegion | None = None
    disks: tuple[str, ...] = ()
    """Names of the block devices at the bottom: sda, nvme0n1, pmem0."""
    volatile: str = ""
    """Why it is the RAM of this kernel though it looks like a disk, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RamBlock:
    """One memory backend of the guest, and the mapping behind it."""

    id: str
    size: int
    qom_type: str
    backing: Backing
    shared: bool
    """Mapped MAP_SHARED: a second process can map the same pages."""
    named_file: bool
    """A `memory-backend-file`: the only kind that QEMU >= 8.1 leaves out of the stream (x-ignore-shared)."""
    path: str = ""
    fd: int | None = None
    """A descriptor of the guest's process that is this memory."""
    device: int = 0
    inode: int = 0
    offset: int = 0
    page_size: int = 4096
    discard_data: bool = False
    prealloc: bool = False
    policy: str = "default"
    host_nodes: tuple[int, ...] = ()
    qom_path: str = ""
    in_argv: bool = True
    storage: Storage | None = None
    """What is really behind it; read for a reboot only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorAddress:
    """Where a QMP monitor of the guest listens: a UNIX path (as the guest's process sees it) or TCP host and port."""

    label: str
    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chardev:
    """A character device. `listener` and `clients` are descriptors of the guest's process."""

    label: str
    backend: str
    """socket, pty, stdio, file, null, vc, ... ; `unknown` where argv does not name the chardev."""
    filename: str
    """QEMU's own description from query-chardev."""
    frontend_open: bool
    connected: bool = False
    server: bool = False
    listener: int | None = None
    client: int | None = None
    peer: str = ""
    """Path or HOST:PORT at the other end of a connection that QEMU has made; read for a reboot only."""
    queued: int = 0
    """Clients that wait in the listener's backlog."""
    monitor: str = ""
    """`control` or `readline` where a monitor sits on it."""
    plain: bool = True
    """False for telnet, tn3270, websocket and TLS, whose framing lives inside QEMU."""
    in_argv: bool = True
    movable: bool = True
    reconnect: bool = False

    @property
    def lends_session(self) -> bool:
        """A QMP monitor on a plain listening socket: the session of whoever holds it can be borrowed."""
        return self.monitor == "control" and self._plainly_served

    @property
    def lends_prompt(self) -> bool:
        """A human monitor on a plain listening socket: the session of whoever is at it can be borrowed while nothing
        is typed."""
        return self.monitor == "readline" and self._plainly_served and self.movable

    @property
    def _plainly_served(self) -> bool:
        served = self.backend == "socket" and self.server and self.listener is not None
        return served and self.plain and self.in_argv


class VncListener(NamedTuple):
    """Where a VNC display listens: family (ipv4, ipv6, unix), host or path, and the descriptor of the process."""

    family: str
    host: str
    service: str
    number: int | None
    websocket: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VncServer:
    """A VNC display."""

    id: str
    auth: str
    listeners: tuple[VncListener, ...]
    clients: int

    @property
    def websocket(self) -> bool:
        """Whether browsers are served."""
        return any(listener.websocket for listener in self.listeners)


@dataclass(frozen=True, slots=True, kw_only=True)
class Netdev:
    """A network backend. `fds` are the tap queues, `vhost_fds` the vhost-net descriptors of the guest's process."""

    id: str
    type: str
    ifname: str = ""
    fds: tuple[int, ...] = ()
    vhost_fds: tuple[int, ...] = ()
    vhost: bool = False
    hostfwd: tuple[str, ...] = ()
    in_argv: bool = True
    persistent: bool = False
    """Its interface stays when QEMU closes it: somebody else has made it. Read for a reboot only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device of /machine/peripheral (with an id) or /machine/peripheral-anon (without, then `id` is its QOM name)."""

    id: str
    type: str
    anonymous: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockChain:
    """device -> node -> file: what a drive really reads and writes, from the device down to the files."""

    device: str
    """qdev id or QOM path of the device, or the drive's name where nothing is plugged."""
    node: str
    files: tuple[str, ...]
    """File names of the chain, the active layer first."""
    read_only: bool
    size: int = 0
    """Virtual size in bytes."""
    throttle: tuple[tuple[str, int], ...] = ()
    drive: str = ""
    """The drive's own name (`-drive id=`); empty where it is made of `-blockdev` nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNode:
    """A named block node: enough to put an empty one of the same size in its place for a rehearsal."""

    name: str
    driver: str
    filename: str
    size: int
    read_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFile:
    """A descriptor of the guest's process and whose it is (`owner` is empty where nobody could be found)."""

    number: int
    target: str
    kind: str
    """file, socket, listener, memfd, eventfd, epoll, pipe, tap, vhost, vfio, kvm, pty, device, anon."""
    owner: str
    inode: int = 0
    device: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Vcpu:
    index: int
    thread_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervisor:
    """Somebody who knows the guest by its pid."""

    kind: str
    """systemd, libvirt, container, parent"""
    who: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Untraceable:
    """Why system calls cannot be made in the guest's process, as far as /proc tells."""

    why: str
    ability: str = ""
    """What is missing; empty where nothing that could be given would help."""
    way_out: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestAgent:
    """The guest agent's port, and what answered there."""

    path: str
    version: str = ""
    can_suspend: bool = False
    error: str = ""
    """Why it could not be asked."""


class NotHadAgain(NamedTuple):
    """A part of the guest that no start after a boot can be given again, and the way out."""

    subject: str
    why: str
    hint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RamDirectory:
    """Where RAM is copied to that a jump does not leave alone (--save-ram); sizes in bytes, times in seconds."""

    path: str
    free: int
    volatile: str = ""
    """Why what is written there is lost at the jump, in words."""
    unusable: str = ""
    """Why nothing of ours may be written there, in words."""
    rate: float | None = None
    """Bytes per second that were written there, and synced, for a measurement; None: none was made."""
    unmeasured: str = ""
    timeout: float = 0.0
    """After which the save of all guests is undone; 0: never."""
    likely: int = 0
    most: int = 0
    """What all guests write there together, about and at most, where that is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NextKernel:
    """The kernel that the host is going to jump into, and what a decision about that needs to know."""

    image: str
    """Empty: none was found."""
    initrd: str
    release: str
    command_line: str
    missing: tuple[str, ...] = ()
    """Of the files that were named, those that are not there."""
    obstacles: tuple[str, ...] = ()
    """Why no kernel can be loaded, in words."""
    unsaved: tuple[str, ...] = ()
    """QEMU processes on this host that are neither going to be saved nor named as lost."""
    state_directory: str = "/var/lib/cpr"
    state_directory_free: int | None = None
    """Bytes; None: not measured."""
    state_directory_volatile: str = ""
    """Why what is written there is lost at the jump, in words."""
    restores_by_itself: bool = True
    """The unit that restores guests is enabled."""
    live_update: bool = False
    """This kernel has /dev/liveupdate."""
    save_ram: RamDirectory | None = None
    """None: RAM is not to be copied anywhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What a decision needs to know of the host; all sizes in bytes, None where there is no limit."""

    boot_id: str
    uid: int
    capabilities: tuple[str, ...]
    """Names of the effective capabilities that matter here (CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_SYS_RESOURCE, ...)."""
    limits: Mapping[str, tuple[int, int]]
    """Our own rlimits (soft, hard) by RLIMIT_ name."""
    run_directory: str
    run_directory_free: int
    run_directory_inodes: int
    memory_available: int
    architecture: str
    keeps_memory_over_exec: bool = False
    """It has MADV_DOEXEC, and was seen to keep a page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A QEMU process as `discover` finds it, before anybody has spoken with it."""

    process: ProcessId
    argv: tuple[str, ...]
    name: str
    uuid: str
    binary: Binary
    monitors: tuple[MonitorAddress, ...]
    unreadable: tuple[str, ...] = ()
    """What could not be read, for want of privileges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """Everything known about one running guest: a value, so that a recorded one reproduces a decision."""

    process: ProcessId
    name: str
    uuid: str
    binary: Binary
    installed: Binary | None
    """What stands at the binary's path now (or the installed binary of the same name)."""
    argv: tuple[str, ...]
    environ: tuple[tuple[str, str], ...]
    cwd: str
    uid: int
    machine: str
    """The concrete machine type, e.g. pc-q35-7.2."""
    accelerator: str
    runstate: str
    monitor: MonitorAddress | None
    ram: tuple[RamBlock, ...]
    devices: tuple[Device, ...]
    chains: tuple[BlockChain, ...]
    nodes: tuple[BlockNode, ...]
    chardevs: tuple[Chardev, ...]
    vnc: tuple[VncServer, ...]
    spice: str
    """How its SPICE clients log in (none, spice, sasl); "" where that is off."""
    netdevs: tuple[Netdev, ...]
    vcpus: tuple[Vcpu, ...]
    iothreads: tuple[tuple[str, int], ...]
    open_files: tuple[OpenFile, ...]
    fdsets: tuple[tuple[int, tuple[tuple[int, str], ...]], ...]
    """(set, ((fd, opaque), ...)) as query-fdsets has it today."""
    capabilities: tuple[tuple[str, bool], ...]
    """Migration capabilities as they were set."""
    parameters: Mapping[str, Any]
    migration: str
    """Status of query-migrate: "" where there never was one."""
    blocked_reasons: tuple[str, ...]
    jobs: tuple[str, ...]
    supervisors: tuple[Supervisor, ...]
    namespaces: tuple[tuple[str, int], ...]
    cgroups: tuple[str, ...]
    limits: Mapping[str, tuple[int, int]]
    memory_room: int | None
    pids_room: int | None
    resident: int
    threads: int
    seccomp: int
    gone_files: tuple[str, ...]
    """Files that argv names (firmware, secrets, images) and that are not there any more."""
    pidfile: str
    added_options: tuple[str, ...]
    """What an earlier update's --qemu-option added to argv."""
    stats_polling: tuple[tuple[str, int], ...] = ()
    """(QOM path of a balloon, guest-stats-polling-interval) where it is not 0."""
    config_files: tuple[tuple[str, str], ...] = ()
    """(-readconfig path, its text) where argv has one."""
    cpu_features: tuple[tuple[str, bool], ...] = ()
    """The boolean properties of its CPU model as its own QEMU expands them; empty where it was not told."""
    generation_id: str = ""
    """What its vmgenid device tells the guest; "" where it has none."""
    changed_files: tuple[str, ...] = ()
    """Configuration files (-readconfig) that were modified after the guest was started."""
    unreadable: tuple[str, ...] = ()
    pidfile_holds_pid: bool = False
    """The pid file is there, and its pid is what it says."""
    untraceable: Untraceable | None = None
    """None: nothing speaks against tracing it."""
    teardown_helpers: tuple[int, ...] = ()
    """Pids of the processes by which async teardown keeps address spaces of this process alive."""
    seccomp_filters: int | None = None
    """How many are stacked; None where the kernel does not tell (before 5.9)."""
    disks: tuple[Storage, ...] = ()
    """What its images lie on; read for a reboot only."""
    agent: GuestAgent | None = None
    """None: it has no port for one. Asked for a reboot only."""
    not_had_again: tuple[NotHadAgain, ...] = ()
    """What it has by a descriptor that nobody can make again after a boot; found for a reboot only."""
    needed_after_boot: tuple[tuple[str, str], ...] = ()
    """(kind, name) of what somebody else has to have made before it is restored; found for a reboot only."""
    own_namespaces: tuple[str, ...] = ()
    """Names of the namespaces in which it is not with us; found for a reboot only."""
    unguarded_unit: str = ""
    """The service that it is, where systemd would start that afresh over it after a boot; asked for a reboot only."""
    s3_disabled: bool | None = None
    """Its firmware does not offer suspend to RAM; None: not known."""
    monitor_held: bool = False
    """A client holds `monitor`, and every other one: its session has to be borrowed."""

    @property
    def running(self) -> bool:
        return self.runstate == Runstate.RUNNING

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"{self.name} (pid {self.process.pid})" if self.name else f"pid {self.process.pid}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The QEMU to go to, as it answered when asked with `-machine none`."""

    binary: Binary
    machines: frozenset[str]
    machine_aliases: Mapping[str, str]
    device_types: frozenset[str]
    commands: frozenset[str]
    migrate_modes: frozenset[str]
    capabilities: frozenset[str]
    options: Any
    """`qemu.options.OptionKnowledge`: which options and parameters it knows."""
    extra_options: tuple[str, ...] = ()
    """--qemu-option"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What a start of the new QEMU with the guest's own command line, null back ends and throw-away RAM showed."""

    started: bool
    words: str
    """QEMU's own words where it did not start."""
    seconds: float
    devices: tuple[Device, ...] = ()
    drives: tuple[str, ...] = ()
    """Devices and names of the drives that argv gives."""
    chardevs: tuple[str, ...] = ()
    written: tuple[tuple[str, int], ...] = ()
    """(RAM block id, bytes) that the start itself wrote into RAM."""
    cpu_differences: tuple[str, ...] = ()
    options_changed: tuple[str, ...] = ()
    accelerator: str = ""
    """The accelerator that the new QEMU took; "" where it was not asked."""


class Severity(StrEnum):
    BLOCKER = "blocker"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One answer of the pre-check."""

    check: str
    severity: Severity
    subject: str
    message: str
    hint: str = ""
    engines: tuple[str, ...] = ()
    """Engines it concerns; empty means all."""
    ignorable: bool = True
    """False where going on would lose the guest."""

    def json(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "severity": str(self.severity),
            "subject": self.subject,
            "message": self.message,
            "hint": self.hint,
            "engines": list(self.engines),
        }


class StepContext(Protocol):
    """What a step works on; `run.Run` in real life."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing to do. Steps are frozen: what changes while they run lives in the context."""

    commit: bool = False
    """The one step after which there is no way back."""
    blackout: bool = False
    """Done while the vCPUs stand still: nothing may sleep, spawn or sync."""

    @property
    def id(self) -> str:
        return type(self).__name__

    def describe(self) -> str:
        raise NotImplementedError

    def do(self, run: Any) -> None:
        raise NotImplementedError

    def undo(self, run: Any) -> None:
        """Safe to repeat, and to call after a `do` that failed half-way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is going to be done to one guest: shown, journalled and run from the same steps."""

    guest: Guest
    target: Target
    engine: str
    reason: str
    """Why this engine."""
    steps: tuple[Step, ...]
    findings: tuple[Finding, ...]
    passed_over: tuple[tuple[str, str], ...] = ()
    """Engines that were not chosen, and why."""
    ignored: tuple[str, ...] = ()


class Status(StrEnum):
    UPDATED = "updated"
    SAVED = "saved"
    """For a reboot; it goes on after that."""
    UNCHANGED = "unchanged"
    BLOCKED = "blocked"
    ROLLED_BACK = "rolled_back"
    NEEDS_ATTENTION = "needs_attention"
    SKIPPED = "skipped"
    FAILED = "failed"
    """Stopped before any change."""
    BUSY = "busy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one guest in one run."""

    guest: str
    uuid: str
    status: Status
    exit_code: int
    where: str
    engine: str = ""
    pid_before: int = 0
    pid_after: int = 0
    runstate: str = ""
    binary_before: Binary | None = None
    binary_after: Binary | None = None
    blackout_seconds: float | None = None
    total_seconds: float = 0.0
    findings: tuple[Finding, ...] = ()
    error: str = ""
    hint: str = ""
    notes: tuple[str, ...] = field(default_factory=tuple)
