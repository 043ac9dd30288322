"""Guests in the host VM, started as their users do: bare, with another likeness, or as a systemd unit.

It is the counting guest or the Linux guest, whose console QEMU itself writes to a file in the host VM; so nobody needs
to listen there. For a guest whose network is watched too see ``inside.moves``.
"""

from __future__ import annotations

import json
import shlex
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from tests.lab import LabError, counting, linux, qemu
from tests.lab.counting import CountingLog
from tests.lab.linux import LinuxLog

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.host.vm import Host

PLACE = "/run/guests"
LASTING = "/state/guests"
"""On the root disk: there after a kexec."""
HZ = 25
PACE = {PLACE: counting.IDLE_PACE, LASTING: 160}
"""Pages walked between two lines: in a lasting guest all of its RAM within some seconds."""
GROUP = 104
"""Of guests that are not root's, beside their own."""
DISK_BYTES = 16 << 20
"""Of the Linux guest's disk."""

L = TypeVar("L", CountingLog, LinuxLog)


@dataclass(frozen=True)
class Likeness:
    """How a guest's QEMU is started, other than by root without further ado.

    uid: whose it is. mounts: in a mount namespace of its own, with something mounted that only it sees.
    memory_max, cpu_max: limits of a cgroup of its own. vhost: a tap with vhost-net. oom: oom_score_adj.
    """

    uid: int = 0
    mounts: bool = False
    memory_max: str = ""
    cpu_max: str = ""
    vhost: bool = False
    oom: int = 0


@dataclass(frozen=True)
class Lies:
    """Where a guest's memory and files are, and what its disk is.

    place: a directory in the host VM. ram: a mem-path; nothing: a file in /dev/shm. nvme: the PCI address of the disk
    that is passed through, of the Linux guest, which then has an agent and can be suspended.
    """

    place: str = PLACE
    ram: str = ""
    nvme: str = ""


@dataclass
class AnyGuest(Generic[L]):
    """A guest in the host VM."""

    host: Host
    name: str
    pid: int
    lies: Lies = Lies()
    understand: ClassVar[type[L]]

    @property
    def stem(self) -> str:
        """What the paths of its files begin with."""
        return f"{self.lies.place}/{self.name}"

    @property
    def console(self) -> str:
        """The file in the host VM with everything it ever said."""
        return f"{self.stem}.log"

    def log(self) -> L:
        """What it has said so far, understood."""
        log = self.understand()
        log.feed(self.host.get(self.console))
        return log

    def goes_on(self, lines: int = 20, seconds: float = 30) -> L:
        """Wait until it has counted on, and return its log.  Raises TimeoutError."""
        end = time.monotonic() + seconds
        target = len(self.log().ticks) + lines
        while len((log := self.log()).ticks) < target:
            if time.monotonic() > end:
                raise TimeoutError(f"{self.name} is at {len(log.ticks)}, not at {target}, after {seconds:g} s")
            time.sleep(0.2)
        return log

    def qmp(self, command: str, **arguments: Any) -> Any:
        """One command to its monitor, which nobody else may hold meanwhile; its return value.  Raises LabError."""
        lines = (
            "import json, socket, sys",
            "monitor = socket.socket(socket.AF_UNIX)",
            f"monitor.connect('{self.stem}.qmp')",
            "file = monitor.makefile('rw')",
            "next(l for l in file if '\"QMP\"' in l)",
            "call = lambda text: [file.write(text), file.flush()] and next(l for l in file if '\"event\"' not in l)",
            "call('{\"execute\": \"qmp_capabilities\"}')",
            "print(call(sys.stdin.read()))",
        )
        request = json.dumps({"execute": command, "arguments": arguments})
        said = self.host.run(f"python3 -S -c {shlex.quote('; '.join(lines))}", 30, request.encode())
        if said.code or "return" not in said.json:
            raise LabError(f"{self.name}: {command}: {said}")
        return said.json["return"]

    def runstate(self) -> str:
        """As its QEMU says."""
        return str(self.qmp("query-status")["status"])

    def alive(self) -> bool:
        """The QEMU that was started, or the one that `pid` was set to, runs."""
        return self.host.run(f"kill -0 {self.pid}").code == 0

    def end(self) -> None:
        """Kill it, and remove its RAM, which is the host VM's, and its disk."""
        self.host.run(f"kill -9 {self.pid}; rm -f /dev/shm/{self.name}.ram {self.stem}.*")

    def properties(self) -> dict[str, str]:
        """What an update may not change of the process, read from /proc and the cgroup file system."""
        proc = f"/proc/{self.pid}"
        keys = "Uid|Gid|Groups|Cap(Inh|Prm|Eff|Bnd|Amb)|NoNewPrivs|Seccomp|Cpus_allowed_list|Umask"
        group = f"/sys/fs/cgroup$(cut -d: -f3 {proc}/cgroup)"
        scripts = {
            "status": f"grep -E '^({keys}):' {proc}/status",
            "namespaces": f"for each in {proc}/ns/*; do readlink $each; done",
            "mounts": f"cut -d' ' -f3- {proc}/mountinfo",
            "cgroup": f"cat {proc}/cgroup",
            "limits of the cgroup": f"cd {group} && grep -s . cpu.max memory.max memory.high pids.max || true",
            # a newer QEMU raises its soft limit of open files itself
            "limits": f"sed -E 's/^(Max open files +)[0-9]+ +/\\1/' {proc}/limits",
            "oom": f"cat {proc}/oom_score_adj",
            "nice": f"cut -d')' -f2- {proc}/stat | cut -d' ' -f17,18",
            "directory": f"readlink {proc}/cwd; readlink {proc}/root",
            "vhost": f"ls -l {proc}/fd | grep -c vhost-net || true",
            "tap": f"ls -l {proc}/fd | grep -c net/tun || true",
        }
        return {name: self.host.sh(script) for name, script in scripts.items()}


class Guest(AnyGuest[CountingLog]):
    """The counting guest."""

    understand = CountingLog

    def whole(self, seconds: float = 120) -> CountingLog:
        """Wait until it has walked over all of its RAM, and return its log: sound if every page is as it was left."""
        began = self.log().round
        end = time.monotonic() + seconds
        # a round that had begun, and one that saw every page
        while self.log().round < began + 2:
            if time.monotonic() > end:
                raise TimeoutError(f"{self.name} is in round {self.log().round}, not past {began + 2}")
            time.sleep(0.5)
        return self.goes_on()


class LinuxGuest(AnyGuest[LinuxLog]):
    """The Linux guest."""

    understand = LinuxLog

    def whole(self, seconds: float = 60) -> LinuxLog:
        """Wait until it has written and verified some more of its disk, and return its log."""
        end = time.monotonic() + seconds
        before = self.log().disk_ok
        while (log := self.log()).disk_ok < before + 20:
            if time.monotonic() > end:
                raise TimeoutError(f"{self.name} wrote block {log.disk_ok}, not yet {before + 20}")
            time.sleep(0.3)
        return log


def start(
    host: Host,
    key: str,
    *,
    name: str = "guest",
    memory: str = "128M",
    likeness: Likeness | None = None,
    lies: Lies | None = None,
    unit: bool = False,
    extra: Sequence[str] = (),
    seconds: float = 60,
) -> Guest:
    """Start the counting guest on the lab's QEMU `key` and return when it counts.

    unit: as the systemd service NAME.service.  Raises LabError if it does not come up.
    """
    guest, likeness = Guest(host, name, 0, lies or Lies()), likeness or Likeness()
    words = [*prepare_counting(guest, key, memory, likeness.uid), *network(host, name, likeness), *extra]
    launch(guest, words, likeness, unit=unit)
    counts(guest, "^c ", seconds, unit=unit)
    return guest


def prepare_counting(guest: Guest, key: str, memory: str, uid: int = 0) -> list[str]:
    """Make the counting guest's disk, which belongs to `uid`; the words that start it."""
    with tempfile.TemporaryDirectory() as directory:
        disk = counting.disk(Path(directory, "disk"), hz=HZ, pace=PACE[guest.lies.place]).read_bytes().rstrip(b"\0")
    make_disk(guest, disk, counting.DISK_SIZE, uid)
    return [*command(key, guest, memory), *counting.arguments(Path(f"{guest.stem}.disk"))]


def start_linux(
    host: Host,
    key: str,
    *,
    name: str = "linux",
    memory: str = "192M",
    lies: Lies | None = None,
    words: Sequence[str] = (),
    seconds: float = 90,
) -> LinuxGuest:
    """The same with the Linux guest, whose agent is at NAME.agent.  words: for its kernel's command line."""
    guest = LinuxGuest(host, name, 0, lies or Lies())
    address = guest.lies.nvme
    disk = ["cpr.disk=nvme0n1"] if address else []
    boot = linux.obtain(agent=True).arguments(*disk, *words)
    device = ["-device", f"vfio-pci,host={address},id=nvme"] if address else []
    drive = ["-drive", f"file={guest.stem}.disk,format=raw,if=virtio"]
    sleeps = ["-global", "ICH9-LPC.disable_s3=0", *linux.agent_arguments(Path(f"{guest.stem}.agent"))]
    line = [*command(key, guest, memory), *boot, *(device or drive), *sleeps]
    make_disk(guest, b"", DISK_BYTES)
    launch(guest, line, Likeness(), unit=False)
    counts(guest, "^tick ", seconds, unit=False)
    return guest


def make_disk(guest: AnyGuest[Any], content: bytes, size: int, uid: int = 0) -> None:
    """Write the image of its disk."""
    place, disk = guest.lies.place, f"{guest.stem}.disk"
    guest.host.sh(f"mkdir -p {place} && chmod 1777 {place}")
    guest.host.put(disk, content)
    guest.host.sh(f"truncate -s {size} {disk}; chown {uid} {disk}")


def launch(guest: AnyGuest[Any], words: Sequence[str], likeness: Likeness, *, unit: bool) -> None:
    """Start its QEMU; `guest.pid` is that of what was started, which may be a shell for a moment.

    The console's log is appended to, so that of an earlier guest with the name goes first.
    """
    host, name = guest.host, guest.name
    host.sh(f"rm -f {guest.console}")
    if unit:
        properties = "--property=Type=exec --property=Restart=always"  # whoever loses sight of it counts a restart
        asks = shlex.quote(f"--property=ExecCondition=+cpr may-start --unit {name}.service")  # hooks/systemd
        host.sh(f"systemd-run --quiet --unit={name} {properties} {asks} {shlex.join(words)}")
        guest.pid = int(host.sh(f"systemctl show -P MainPID {name}.service"))
    else:
        background = f"setsid {wrapped(words, name, likeness)} < /dev/null > {guest.stem}.out 2>&1 & echo $!"
        guest.pid = int(host.sh(f"{prepared(name, likeness)} {background}"))


def counts(guest: AnyGuest[Any], line: str, seconds: float, *, unit: bool) -> None:
    """Wait for the first line of its count.  Raises LabError."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and guest.alive():
        if guest.host.run(f"grep -aqs '{line}' {guest.console}").code == 0:
            guest.pid = guest.pid if unit else int(guest.host.sh(f"cat {guest.stem}.pid"))
            return
        time.sleep(0.2)
    said = guest.host.run(f"cat {guest.stem}.out {guest.console} | tail -c 2000").out
    raise LabError(f"the guest {guest.name} did not count: {said}")


def command(key: str, guest: AnyGuest[Any], memory: str) -> list[str]:
    """The guest's QEMU as a user would call it; the QEMUs are in the same place as here."""
    name, stem = guest.name, guest.stem
    path = guest.lies.ram or f"/dev/shm/{name}.ram"
    align = ",align=2M" if path.startswith("/dev/dax") else ""  # else it is mapped at any address, and refused (EINVAL)
    ram = f"memory-backend-file,id=ram,size={memory},share=on,mem-path={path}{align}"
    console = f"socket,id=console,path={stem}.console,server=on,wait=off,logfile={stem}.log"
    return [
        *qemu.obtain(key).command,
        *f"-name {name} -nodefaults -display none -accel kvm -cpu max -m {memory}".split(),
        *f"-machine q35,memory-backend=ram -object {ram}".split(),
        *f"-chardev {console},logappend=on -serial chardev:console".split(),
        *f"-qmp unix:{stem}.qmp,server=on,wait=off -pidfile {stem}.pid".split(),
    ]


def network(host: Host, name: str, likeness: Likeness) -> list[str]:
    """A tap that belongs to the guest's user, with vhost-net."""
    if not likeness.vhost:
        return []
    tap = f"{name}0"
    host.sh(f"ip tuntap add dev {tap} mode tap user {likeness.uid} && ip link set {tap} up")
    netdev = f"tap,id=net0,ifname={tap},script=no,downscript=no,vhost=on"
    return ["-netdev", netdev, "-device", "virtio-net-pci,netdev=net0,romfile="]


def prepared(name: str, likeness: Likeness) -> str:
    """The beginning of a script that makes the cgroup."""
    group = f"/sys/fs/cgroup/{name}"
    steps = [f"mkdir -p {group}"] if likeness.memory_max or likeness.cpu_max else []
    steps += [f"echo {likeness.memory_max} > {group}/memory.max"] if likeness.memory_max else []
    steps += [f"echo {likeness.cpu_max} > {group}/cpu.max"] if likeness.cpu_max else []
    return "".join(f"{step} && " for step in steps) + "true;"


def wrapped(words: Sequence[str], name: str, likeness: Likeness) -> str:
    """A shell's words that exec `words` with the likeness."""
    steps = []
    if likeness.memory_max or likeness.cpu_max:
        steps.append(f"echo $$ > /sys/fs/cgroup/{name}/cgroup.procs")
    if likeness.oom:
        steps.append(f"echo {likeness.oom} > /proc/self/oom_score_adj")
    inner = shlex.join(words)
    if likeness.uid:
        inner = f"setpriv --reuid {likeness.uid} --regid {likeness.uid} --groups {GROUP} --bounding-set -all -- {inner}"
    if likeness.mounts:
        steps.append("mount -t tmpfs -o size=1m private /mnt")
    script = " && ".join([*steps, f"exec {inner}"])
    return ("unshare --mount --propagation private " if likeness.mounts else "") + shlex.join(["sh", "-c", script])
