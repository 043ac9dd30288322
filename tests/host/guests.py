"""Guests in the host VM, started as their users do: bare, with another likeness, or as a systemd unit.

It is the counting guest, whose console QEMU itself writes to a file in the host VM; so nobody needs to listen there.
For a guest whose network and disk are watched too see ``inside.moves``.
"""

from __future__ import annotations

import shlex
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.lab import LabError, counting, qemu
from tests.lab.counting import CountingLog

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.host.vm import Host

PLACE = "/run/guests"
HZ = 25


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


@dataclass
class Guest:
    """A guest in the host VM."""

    host: Host
    name: str
    pid: int

    @property
    def console(self) -> str:
        """The file in the host VM with everything it ever said."""
        return f"{PLACE}/{self.name}.log"

    def log(self) -> CountingLog:
        """What it has said so far, understood."""
        log = CountingLog()
        log.feed(self.host.get(self.console))
        return log

    def goes_on(self, lines: int = 20, seconds: float = 30) -> CountingLog:
        """Wait until it has counted on, and return its log.  Raises TimeoutError."""
        end = time.monotonic() + seconds
        target = self.log().number + lines
        while (log := self.log()).number < target:
            if time.monotonic() > end:
                raise TimeoutError(f"{self.name} is at {log.number}, not at {target}, after {seconds:g} s")
            time.sleep(0.2)
        return log

    def alive(self) -> bool:
        """The QEMU that was started, or the one that `pid` was set to, runs."""
        return self.host.run(f"kill -0 {self.pid}").code == 0

    def end(self) -> None:
        """Kill it, and remove its RAM, which is the host VM's, and its disk."""
        self.host.run(f"kill -9 {self.pid}; rm -f /dev/shm/{self.name}.ram {PLACE}/{self.name}.*")

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


def start(
    host: Host,
    key: str,
    *,
    name: str = "guest",
    memory: str = "128M",
    likeness: Likeness | None = None,
    unit: bool = False,
    extra: Sequence[str] = (),
    seconds: float = 60,
) -> Guest:
    """Start the counting guest on the lab's QEMU `key` and return when it counts.

    unit: as the systemd service NAME.service.  Raises LabError if it does not come up.
    """
    likeness = likeness or Likeness()
    with tempfile.TemporaryDirectory() as directory:
        disk = counting.disk(Path(directory, "disk"), hz=HZ, pace=counting.IDLE_PACE).read_bytes().rstrip(b"\0")
    host.sh(f"mkdir -p {PLACE} && chmod 1777 {PLACE}")
    host.put(f"{PLACE}/{name}.disk", disk)
    host.sh(f"truncate -s {counting.DISK_SIZE} {PLACE}/{name}.disk; chown {likeness.uid} {PLACE}/{name}.disk")
    words = [*command(key, name, memory), *network(host, name, likeness), *extra]
    said = f"{PLACE}/{name}.out"
    if unit:
        host.sh(f"systemd-run --quiet --unit={name} --property=Type=exec {shlex.join(words)}")
        pid = int(host.sh(f"systemctl show -P MainPID {name}.service"))
    else:
        background = f"setsid {wrapped(words, name, likeness)} < /dev/null > {said} 2>&1 & echo $!"
        pid = int(host.sh(f"{prepared(name, likeness)} {background}"))
    guest = Guest(host, name, pid)
    end = time.monotonic() + seconds
    while time.monotonic() < end and guest.alive():
        if host.run(f"grep -aqs '^c ' {guest.console}").code == 0:
            guest.pid = pid if unit else int(host.sh(f"cat {PLACE}/{name}.pid"))
            return guest
        time.sleep(0.2)
    raise LabError(f"the guest {name} did not count: {host.run(f'cat {said} {guest.console} | tail -c 2000').out}")


def command(key: str, name: str, memory: str) -> list[str]:
    """The guest's QEMU as a user would call it; the QEMUs are in the same place as here."""
    ram = f"memory-backend-file,id=ram,size={memory},share=on,mem-path=/dev/shm/{name}.ram"
    console = f"socket,id=console,path={PLACE}/{name}.console,server=on,wait=off,logfile={PLACE}/{name}.log"
    return [
        *qemu.obtain(key).command,
        *f"-name {name} -nodefaults -display none -accel kvm -cpu max -m {memory}".split(),
        *f"-machine q35,memory-backend=ram -object {ram}".split(),
        *f"-chardev {console},logappend=on -serial chardev:console".split(),
        *f"-qmp unix:{PLACE}/{name}.qmp,server=on,wait=off -pidfile {PLACE}/{name}.pid".split(),
        *counting.arguments(Path(f"{PLACE}/{name}.disk")),
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
        inner = f"setpriv --reuid {likeness.uid} --regid {likeness.uid} --groups 104 --bounding-set -all -- {inner}"
    if likeness.mounts:
        steps.append("mount -t tmpfs -o size=1m private /mnt")
    script = " && ".join([*steps, f"exec {inner}"])
    return ("unshare --mount --propagation private " if likeness.mounts else "") + shlex.join(["sh", "-c", script])
