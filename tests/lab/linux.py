"""The Linux guest: Debian's kernel, busybox, and an init that counts, writes its disk and serves TCP.

`linux-init.sh` says what the guest does and prints.  Here: putting it together, and understanding that.
The kernel is Debian 12's cloud kernel because it is packed with LZ4 and thus boots fastest under TCG.

Out of scope: starting a QEMU with it (see ``start``), the host's end of its network (see ``tap``).
"""

import dataclasses
import lzma
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tests.lab import LabError, cache, debian, elf
from tests.lab.console import ConsoleLog, largest_gap
from tests.lab.cpio import Archive

RECIPE = "3"
SUITE = "bookworm"
INIT = Path(__file__).with_name("linux-init.sh")
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_balloon", "virtio-rng", "virtio_mem")
APPLETS = (
    *("cat", "cmp", "dd", "head", "insmod", "ip", "mkfifo", "mount", "nc", "nproc", "poweroff", "reboot"),
    *("seq", "sh", "stty", "taskset", "yes"),
)
PACED = """\
#!/bin/sh
n=1
while printf '%d\\n' $n $((n + 1)) $((n + 2)) $((n + 3)) $((n + 4)) $((n + 5)) $((n + 6)) $((n + 7)); do
    n=$((n + 8))
    read -r -t 0.01 nothing <> /run/never
done
"""
APPEND = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check random.trust_cpu=on cryptomgr.notests"

ECHO_PORT, FLOOD_PORT, PACED_PORT = 7, 19, 20


@dataclasses.dataclass(frozen=True)
class LinuxGuest:
    """What QEMU boots.  `release` is the kernel's, `append` the least its command line must say."""

    kernel: Path
    initrd: Path
    release: str
    append: str = APPEND

    def arguments(self, *words: str) -> list[str]:
        """QEMU's options to boot it; `words`, ``cpr.ip=10.0.0.2/24`` say, go to the command line."""
        append = " ".join((self.append, *words))
        return ["-kernel", str(self.kernel), "-initrd", str(self.initrd), "-append", append]


def agent_arguments(socket: Path) -> list[str]:
    """QEMU's options for the port that qemu-ga in the guest answers on."""
    return [
        *("-device", "virtio-serial-pci"),
        *("-chardev", f"socket,id=agent,path={socket},server=on,wait=off"),
        *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
    ]


def obtain(*, agent: bool = False) -> LinuxGuest:
    """The guest, from the cache or the mirror; with qemu-ga in it if `agent`.  Raises LabError."""
    recipe = " ".join((RECIPE, SUITE, PACED, *MODULES, *APPLETS, INIT.read_text()))
    directory = cache.artifact("linux", recipe, build)
    initrd = directory / ("initrd-agent" if agent else "initrd")
    return LinuxGuest(directory / "vmlinuz", initrd, (directory / "release").read_text())


def build(workspace: cache.Workspace) -> None:
    """Make the kernel image and both initrds."""
    tree = workspace.scratch / "tree"
    packages = ["linux-image-cloud-amd64", "busybox-static", "qemu-guest-agent"]
    debian.unpack(SUITE, packages, tree, workspace.scratch)
    (kernel,) = (tree / "boot").glob("vmlinuz-*")
    shutil.copy(kernel, workspace.out / "vmlinuz")
    release = kernel.name.removeprefix("vmlinuz-")
    (workspace.out / "release").write_text(release)
    archive = Archive()
    for name in ("dev", "proc", "sys", "run", "tmp"):
        archive.directory(name)
    archive.character_device("dev/console", 5, 1)
    archive.file("init", INIT.read_bytes(), 0o755)
    archive.file("bin/paced", PACED.encode(), 0o755)
    archive.copy("bin/busybox", tree / "usr" / "bin" / "busybox")
    for applet in APPLETS:
        archive.symlink(f"bin/{applet}", "busybox")
    modules = tree / "usr" / "lib" / "modules" / release
    builtin = (modules / "modules.builtin").read_text()
    for number, (name, content) in enumerate(modules_in_order(modules, builtin, MODULES)):
        archive.file(f"modules/{number:02}-{name}", content)
    (workspace.out / "initrd").write_bytes(archive.data())
    libraries = workspace.scratch / "lib"
    elf.copy_libraries(tree, [tree / "usr" / "sbin" / "qemu-ga"], libraries)
    archive.copy("usr/sbin/qemu-ga", tree / "usr" / "sbin" / "qemu-ga")
    archive.symlink("bin/qemu-ga", "/usr/sbin/qemu-ga")
    archive.symlink("sbin/hwclock", "/bin/busybox")  # by which qemu-ga sets the time
    for library in sorted(libraries.iterdir()):
        directory = "lib64" if library.name == elf.LOADER else "lib/x86_64-linux-gnu"
        archive.copy(f"{directory}/{library.name}", library)
    (workspace.out / "initrd-agent").write_bytes(archive.data())


def modules_in_order(directory: Path, builtin: str, names: Iterable[str]) -> list[tuple[str, bytes]]:
    """The modules `names` and what they need, each behind what it needs.  Raises LabError."""
    files = {module_name(file.name): file for file in directory.rglob("*.ko*")}
    included = {module_name(Path(line).name) for line in builtin.splitlines()}
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered or name in included:
            return
        if name not in files:
            raise LabError(f"the kernel in {directory} has no module {name}")
        content = files[name].read_bytes()
        content = lzma.decompress(content) if files[name].suffix == ".xz" else content
        for needed in needed_modules(content):
            add(needed)
        ordered[name] = content

    for name in names:
        add(module_name(name))
    return list(ordered.items())


def module_name(name: str) -> str:
    """The name of the module in the file `name`: no suffix, and - and _ are the same."""
    return name.partition(".")[0].replace("-", "_")


def needed_modules(content: bytes) -> list[str]:
    """The modules that a module says, in its .modinfo section, it depends on."""
    match = re.search(rb"\0depends=([^\0]*)\0", content)
    return [module_name(name) for name in match[1].decode().split(",") if name] if match else []


class Tick(NamedTuple):
    """One line of the count: its number, the guest's uptime in seconds, and when it arrived."""

    number: int
    uptime: float
    arrived: float


class LinuxLog(ConsoleLog):
    """What the Linux guest said."""

    def __init__(self) -> None:
        super().__init__()
        self.ticks: list[Tick] = []
        self.jumps: list[tuple[int, int]] = []
        self.boot_ids: list[str] = []
        self.disk_ok = -1
        self.disk_bad: list[str] = []
        self.cpus: dict[int, int] = {}
        self.echoed: list[str] = []
        self.complaints: list[str] = []

    @property
    def contiguous(self) -> bool:
        """Every tick came, once, and in order."""
        return not self.jumps

    @property
    def monotonic(self) -> bool:
        """The uptime never went back."""
        uptimes = [tick.uptime for tick in self.ticks]
        return uptimes == sorted(uptimes)

    @property
    def sound(self) -> bool:
        """One boot, all ticks, a clock that goes forward, and nothing wrong with the disk or the kernel."""
        return not self.problems()

    def problems(self) -> list[str]:
        """Everything that is not as it should be, in words."""
        found = [f"count goes from {a} to {b}" for a, b in self.jumps] + self.disk_bad + self.complaints
        if len(self.boot_ids) > 1:
            found.append(f"booted {len(self.boot_ids)} times")
        if not self.monotonic:
            found.append("the uptime went back")
        return found

    def largest_gap(self, since: float = 0, until: float | None = None) -> float:
        """The longest silence between two ticks, in seconds of time.monotonic."""
        with self.changed:
            return largest_gap([tick.arrived for tick in self.ticks], since, until)

    def largest_uptime_gap(self) -> float:
        """The longest time between two ticks by the guest's own clock, in seconds, to a hundredth."""
        with self.changed:
            return largest_gap([tick.uptime for tick in self.ticks])

    def wait_ticks(self, count: int = 5, seconds: float = 30) -> None:
        """Wait for `count` more ticks."""
        end = len(self.ticks) + count
        self.wait(lambda: len(self.ticks) >= end, seconds, f"not {count} more ticks")

    def line(self, text: str, when: float) -> None:
        kind, _, rest = text.partition(" ")
        words = rest.split()
        if kind == "tick" and len(words) == 2:
            number = int(words[0])
            if self.ticks and number != self.ticks[-1].number + 1:
                self.jumps.append((self.ticks[-1].number, number))
            self.ticks.append(Tick(number, float(words[1]), when))
        elif kind == "boot" and len(words) == 1:
            self.boot_ids.append(rest)
        elif kind == "disk" and words[:1] == ["ok"]:
            self.disk_ok = int(words[1])
        elif kind == "disk":
            self.disk_bad.append(text)
        elif kind == "cpu" and len(words) == 2:
            cpu, number = map(int, words)
            if number != self.cpus.get(cpu, -1) + 1:
                self.complaints.append(f"cpu {cpu} counts from {self.cpus.get(cpu)} to {number}")
            self.cpus[cpu] = number
        elif kind == "e":
            self.echoed.append(rest)
        elif re.search(r"\b(BUG|Oops|panic|Call Trace|lockup|unstable|I/O error|hung)\b", text):
            self.complaints.append(text)
