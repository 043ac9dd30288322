"""The host VM's disks, each an artifact of the cache: what changes seldom is not built again with what changes often.

====== =========================================== =================================================
disk   content                                     built again when
====== =========================================== =================================================
root   Debian's userland, all kernels              the tables here and in ``kernels``, or ``files/``, change
lab    QEMUs and guests, where the lab has them    the lab has other ones
site   cpr from its wheel, what it needs, `tests`  a file of them changes
====== =========================================== =================================================

The QEMUs are relocated to the cache's directory; the lab's disk is mounted at that very path, so that they and
everything of ``tests.lab`` work in the host VM as they do here.

Out of scope: running it (see ``vm``).
"""

from __future__ import annotations

import functools
import shutil
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.host import kernels
from tests.lab import LabError, cache, counting, debian, elf, linux, qemu, tools
from tests.lab.cpio import Archive

if TYPE_CHECKING:
    from collections.abc import Sequence

RECIPE = "3"  # a change of this module that its tables do not show
SUITE = "trixie"
PACKAGES = (
    *("base-files", "base-passwd", "bash", "busybox-static", "coreutils", "dash", "daxctl", "e2fsprogs", "findutils"),
    *("gawk", "grep", "gzip", "iproute2", "kexec-tools", "kmod", "libpython3-stdlib", "login", "mount", "ndctl"),
    *("passwd", "pciutils", "procps", "python3-minimal", "qemu-guest-agent", "sed", "strace", "sudo", "systemd"),
    *("util-linux",),
)
TRIMMED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/lintian", "usr/games")
FILES = Path(__file__).with_name("files")
PLACES = {
    "setup.sh": "usr/lib/cpr-host/setup",
    "agent.sh": "usr/lib/cpr-host/agent",
    "init.sh": "sbin/init.small",
    "setup.service": "etc/systemd/system/cpr-host-setup.service",
    "agent.service": "etc/systemd/system/cpr-host-agent.service",
    "shell.service": "etc/systemd/system/cpr-host-shell.service",
}
HOOKS = Path(__file__).parents[2] / "hooks" / "systemd"
HOOK_PLACES = {
    "cpr-restore.service": "usr/lib/systemd/system/cpr-restore.service",
    "cpr.tmpfiles.conf": "usr/lib/tmpfiles.d/cpr.conf",
    "cpr-guest.conf": "usr/share/doc/cpr/cpr-guest.conf",
}
# Not `get 1000`, the usual uid: somebody else shall own guests.
USERS = "root:x:0:0:root:/root:/bin/bash\nguest:x:2000:2000::/home/guest:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n"
GROUPS = "root:x:0:\ntty:x:5:\nkvm:x:104:guest\nguest:x:2000:\nnogroup:x:65534:\n"
UNITS = {
    "cpr-host-agent.service": "/etc/systemd/system",
    "cpr-host-shell.service": "/etc/systemd/system",
    "cpr-restore.service": "/usr/lib/systemd/system",
}
"""What is enabled, and where it is."""
UNWANTED = (
    *("getty.target", "ldconfig.service", "proc-sys-fs-binfmt_misc.automount", "sys-fs-fuse-connections.mount"),
    *("sys-kernel-debug.mount", "sys-kernel-tracing.mount", "systemd-binfmt.service", "systemd-firstboot.service"),
    *("systemd-hwdb-update.service", "systemd-journal-catalog-update.service", "systemd-pcrphase.service"),
    *("systemd-sysext.socket", "systemd-sysusers.service", "systemd-tpm2-setup.service", "systemd-update-done.service"),
    *("systemd-update-utmp.service", "systemd-user-sessions.service", "systemd-random-seed.service"),
)
SITE = "/opt/cpr"


@dataclass(frozen=True)
class Disks:
    """What a host VM is started with; none of it is written to."""

    root: Path
    lab: Path
    site: Path
    boot: Path

    def kernel(self, key: str) -> tuple[Path, Path]:
        """The image, unpacked, and the initramfs of a kernel."""
        return kernels.obtain(key).unpacked, self.boot / key / "initrd"


def obtain() -> Disks:
    """All of it, built as needed.  Raises LabError."""
    root = root_directory()
    return Disks(root=root / "root.ext4", lab=lab_disk(), site=site_disk(root), boot=root / "boot")


# -- root


@functools.cache
def root_directory() -> Path:
    """The artifact with ``root.ext4``, ``boot/`` and a ``python/`` like the one in the image."""
    with ThreadPoolExecutor(2) as pool:
        available = list(pool.map(kernels.obtain, kernels.KERNELS))
    recipe = "\n".join(
        [RECIPE, SUITE, USERS, GROUPS, SITE, *PACKAGES, *TRIMMED, *UNITS, *UNWANTED]
        + [str(kernel.directory) for kernel in available]
        + [f"{name} {FILES.joinpath(name).read_text()}" for name in ("initramfs.sh", *PLACES)]
        + [f"{place} {HOOKS.joinpath(name).read_text()}" for name, place in HOOK_PLACES.items()]
    )
    return cache.artifact("host-root", recipe, lambda workspace: build_root(available, workspace))


def build_root(available: Sequence[kernels.Kernel], workspace: cache.Workspace) -> None:
    """Make the root disk."""
    tree = workspace.scratch / "tree"
    debian.unpack(SUITE, PACKAGES, tree, workspace.scratch)
    for name in TRIMMED:
        shutil.rmtree(tree / name, ignore_errors=True)
    (tree / "usr" / "lib" / "modprobe.d" / "nvdimm-security.conf").unlink(missing_ok=True)  # runs ndctl for each module
    (tree / "etc" / "modprobe.d" / "nvdimm-security.conf").unlink(missing_ok=True)
    for name in ("dev", "mnt", "proc", "sys", "run", "tmp", "state", "home/guest", "root", SITE.lstrip("/")):
        (tree / name).mkdir(parents=True, exist_ok=True)
    (tree / "root").chmod(0o755)  # the lab may be below, and guests of other users look there
    (tree / "tmp").chmod(0o1777)
    configure(tree)
    for kernel in available:
        add_kernel(kernel, tree, workspace.out / "boot" / kernel.key)
    keep_python(tree, workspace.out / "python")
    compile_all(workspace.out / "python", [tree / "usr" / "lib" / "python3.13"])
    make_disk(tree, workspace.out / "root.ext4", spare=512 << 20, journal=True)


def configure(tree: Path) -> None:
    """What the packages' own scripts would have left, as far as it is needed, and what makes it the host VM."""
    texts = {
        "etc/passwd": USERS,
        "etc/group": GROUPS,
        "etc/hostname": "cpr-host\n",
        "etc/hosts": "127.0.0.1 localhost cpr-host\n",
        "etc/machine-id": "c9000000000000000000000000000001\n",
        "etc/fstab": "",
        "etc/systemd/journald.conf.d/host.conf": "[Journal]\nStorage=volatile\n",
        "usr/lib/python3/dist-packages/cpr.pth": f"{SITE}\n",
        "usr/local/bin/cpr": "#!/usr/bin/python3\nimport sys\n\nfrom cpr.cli.main import main\n\nsys.exit(main())\n",
    }
    for name, text in texts.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    (tree / "usr/local/bin/cpr").chmod(0o755)
    sources = {FILES / name: place for name, place in PLACES.items()}
    sources |= {HOOKS / name: place for name, place in HOOK_PLACES.items()}
    for source, place in sources.items():
        (tree / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tree / place)
        (tree / place).chmod(0o755 if source.suffix == ".sh" else 0o644)
    system = tree / "etc" / "systemd" / "system"
    (system / "multi-user.target.wants").mkdir(parents=True, exist_ok=True)
    for unit, where in UNITS.items():
        (system / "multi-user.target.wants" / unit).symlink_to(f"{where}/{unit}")
    for unit in UNWANTED:
        (system / unit).symlink_to("/dev/null")
    (system / "default.target").unlink(missing_ok=True)
    (system / "default.target").symlink_to("/usr/lib/systemd/system/multi-user.target")
    if not (tree / "sbin" / "init").is_symlink():
        (tree / "sbin" / "init").symlink_to("../lib/systemd/systemd")
    if not (tree / "bin" / "sh").exists():
        (tree / "bin" / "sh").symlink_to("dash")
    if not (tree / "usr" / "bin" / "awk").exists():  # alternatives
        (tree / "usr" / "bin" / "awk").symlink_to("gawk")
    if not (tree / "sbin" / "poweroff").exists():  # it is in systemd-sysv, which is not here
        (tree / "sbin" / "poweroff").symlink_to("../bin/busybox")


def add_kernel(kernel: kernels.Kernel, tree: Path, boot: Path) -> None:
    """Put a kernel and its initramfs into the image and, for QEMU to load, into `boot`."""
    directory = tree / "usr" / "lib" / "modules" / kernel.release
    shutil.copytree(kernel.directory / "modules", directory)
    run_in(tree, "depmod", tree / "usr" / "bin" / "kmod", "-b", str(tree), kernel.release)
    archive = Archive()
    for name in ("dev", "proc", "new"):
        archive.directory(name)
    archive.character_device("dev/console", 5, 1)
    archive.copy("bin/busybox", tree / "usr" / "bin" / "busybox")
    archive.file("init", (FILES / "initramfs.sh").read_bytes(), 0o755)
    for place in ("first", "beside"):
        for file in sorted((kernel.directory / place).iterdir()):
            archive.copy(f"{place}/{file.name}", file)
    boot.mkdir(parents=True)
    shutil.copy(kernel.image, boot / "vmlinuz")
    (boot / "initrd").write_bytes(archive.data())
    shutil.copytree(boot, tree / "boot" / kernel.key)


def run_in(tree: Path, name: str, program: Path, *words: str) -> str:
    """Run a program of the image here, with its own libraries, under the name `name`."""
    libraries = tree / "usr" / "lib" / "x86_64-linux-gnu"
    loader = [str(libraries / elf.LOADER), "--library-path", str(libraries), "--argv0", name]
    return debian.run([*loader, str(program), *words])


# -- Python's byte code, which packages compile when they are installed; under TCG it saves seconds at each start


def keep_python(tree: Path, into: Path) -> None:
    """Keep the image's Python runnable here."""
    (into / "lib").mkdir(parents=True)
    binary = tree / "usr" / "bin" / "python3.13"
    shutil.copy(binary, into / "python3.13")
    elf.copy_libraries(tree, [binary], into / "libraries")
    shutil.copytree(tree / "usr" / "lib" / "python3.13", into / "lib" / "python3.13", symlinks=True)


def compile_all(python: Path, directories: Sequence[Path]) -> None:
    """Compile what is below `directories` for the image's Python."""
    libraries = python / "libraries"
    command = [str(libraries / elf.LOADER), "--library-path", str(libraries), str(python / "python3.13")]
    words = ["-m", "compileall", "-q", "-j1", "-x", r"/(test|idlelib|lib2to3|turtledemo|pydoc_data)/"]
    subprocess.run(
        [*command, *words, *map(str, directories)],
        env={"PYTHONHOME": str(python)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,  # a file that does not compile will not be compiled in the image either
    )


# -- lab


def lab_disk() -> Path:
    """A disk with what the lab has: every QEMU, the counting guest, the Linux guest, under the same names."""
    wanted = [build.binary.parent.parent for build in qemu.builds().values()]
    wanted += [counting.directory(), linux.obtain().kernel.parent]
    wanted = sorted(set(wanted))

    def build(workspace: cache.Workspace) -> None:
        for directory in wanted:
            shutil.copytree(directory, workspace.scratch / "lab" / directory.name, symlinks=True)
        make_disk(workspace.scratch / "lab", workspace.out / "lab.ext4", spare=8 << 20)

    return cache.artifact("host-lab", f"{RECIPE} {' '.join(map(str, wanted))}", build) / "lab.ext4"


def make_disk(tree: Path, disk: Path, *, spare: int, journal: bool = False) -> None:
    """Make an ext4 of all that is below `tree`, with `spare` bytes of room; no mounting, no root needed."""
    size = sum(4096 + (entry.lstat().st_size + 4095 & -4096) for entry in tree.rglob("*") if not is_device(entry))
    blocks = (size * 21 // 20 + spare + (32 << 20)) // 4096
    options = ["-q", "-F", "-t", "ext4", "-b", "4096", "-O", "has_journal" if journal else "^has_journal"]
    root = ["-E", "root_owner=0:0,lazy_itable_init=1,nodiscard"]
    debian.run([*tools.command("mke2fs"), *options, *root, "-d", str(tree), str(disk), str(blocks)])


def is_device(path: Path) -> bool:
    """Whether `path` is a device node."""
    mode = path.lstat().st_mode
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


# -- site


def site_disk(root: Path) -> Path:
    """The disk with cpr as its wheel has it."""
    from tests.host import site  # it needs `make_disk`

    return site.obtain(root / "python") / "site.ext4"


def why_not() -> str | None:
    """Why the host VM cannot be had here, or None if it can."""
    try:
        obtain()
    except LabError as error:
        return str(error)
    return None
