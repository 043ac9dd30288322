"""QEMU builds of several releases, side by side in the cache, each an ordinary program of this machine.

A build is Debian's package of some suite: the x86_64 system emulator, the libraries it is linked with and
the firmware for PC machines.  Left out: other targets, graphical user interfaces, sound.

The firmware lies in ``qemu-bundle`` beside the binary, where every QEMU since 7.1 looks first
(get_relocated_path in QEMU's util/cutils.c), so that no -L option is needed.

Out of scope: starting them (see ``start``).
"""

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from tests.lab import LabError, cache, debian, elf

RECIPE = "2"

# Which suite each key comes from.  A key names a place in the lab; `QemuBuild.version` is what really came.
SUITES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "7.2": ("bookworm",),
        "10.0": ("trixie",),
        "11.1.a": ("trixie-backports",),
        "11.1.b": ("forky", "sid"),  # the first that is not the same build as 11.1.a
    }
)

FIRMWARE = (
    "share/seabios/*.bin",
    "share/qemu/*.rom",
    "share/qemu/bios-microvm.bin",
    "share/qemu/kvmvapic.bin",
    "share/qemu/linuxboot*.bin",
    "share/qemu/multiboot*.bin",
    "share/qemu/pvh.bin",
    "share/qemu/keymaps/*",
    "lib/ipxe/qemu/*.rom",
)

# In 7.2 the TCG accelerator is a module; of the others, those that need no big library.
MODULES = (
    "accel-*.so",
    "hw-display-virtio-gpu.so",
    "hw-display-virtio-gpu-pci.so",
    "hw-display-virtio-vga.so",
    "hw-usb-host.so",
    "hw-usb-redirect.so",
    # SPICE, which does not load without the library that finds OpenGL
    "ui-spice-core.so",
    "ui-opengl.so",
    "chardev-spice.so",
    "hw-display-qxl.so",
)
MODULE_PACKAGES: Mapping[str, tuple[str, ...]] = MappingProxyType({"bookworm": ()})
"""Of each suite, beside what the emulator depends on."""
SPICE = ("qemu-system-modules-spice",)

TOOLS = ("qemu-img", "qemu-storage-daemon")
TOOLS_SUITE = "trixie"


@dataclasses.dataclass(frozen=True)
class QemuBuild:
    """One QEMU.  `options` must begin its command line (so far none is needed)."""

    key: str
    version: str
    package: str
    suite: str
    build_id: str
    binary: Path
    options: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """The words a command line of this QEMU begins with."""
        return [str(self.binary), *self.options]

    def __str__(self) -> str:
        return f"QEMU {self.version} ({self.package}, {self.suite})"


def builds() -> dict[str, QemuBuild]:
    """All builds, obtained as needed; without 11.1.b where `why_missing` gives a reason."""
    return {key: obtain(key) for key in SUITES if not why_missing(key)}


@functools.cache
def obtain(key: str) -> QemuBuild:
    """The build `key`, from the cache or else from the mirror.  Raises LabError."""
    if key not in SUITES:
        raise LabError(f"the lab has no QEMU {key!r}; it knows {', '.join(SUITES)}")
    if key == "11.1.b":
        if (other := another_than(obtain("11.1.a"))) is None:
            raise LabError(f"no QEMU {key}: {why_missing(key)}")
        return dataclasses.replace(other, key=key)
    return of_suite(key, SUITES[key][0])


def another_than(first: QemuBuild) -> QemuBuild | None:
    """A build of the same age that differs from `first`: by its version if possible, else by its build."""
    second = None
    for suite in SUITES["11.1.b"]:
        candidate = of_suite("11.1.b", suite)
        if candidate.version != first.version:
            return candidate
        if candidate.build_id != first.build_id and second is None:
            second = candidate
    return second


def why_missing(key: str) -> str | None:
    """Why the lab cannot have the build `key`, or None if it can; raises LabError if the mirror fails."""
    if key != "11.1.b" or another_than(obtain("11.1.a")):
        return None
    suites = " and ".join(SUITES[key])
    return f"{suites} carry the very build that {SUITES['11.1.a'][0]} does ({obtain('11.1.a').package})"


def qemu_img() -> Path:
    """A qemu-img."""
    return of_suite("10.0", TOOLS_SUITE).binary.with_name("qemu-img")


def of_suite(key: str, suite: str) -> QemuBuild:
    """The QEMU that `suite` carries."""

    def build(workspace: cache.Workspace) -> None:
        assemble(suite, workspace)

    # the loader's path is written into the binary, so the place is part of the recipe
    prefix = cache.artifact(f"qemu-{suite}", f"{RECIPE} {cache.root()}", build)
    facts = json.loads((prefix / "facts.json").read_text())
    return QemuBuild(key=key, suite=suite, binary=prefix / "bin" / "qemu-system-x86_64", **facts)


def assemble(suite: str, workspace: cache.Workspace) -> None:
    """Make the prefix bin/, bin/qemu-bundle/ and lib/ of the QEMU that `suite` carries."""
    tree = workspace.scratch / "tree"
    packages = ["qemu-system-x86", *MODULE_PACKAGES.get(suite, SPICE)]
    packages += ["qemu-utils"] if suite == TOOLS_SUITE else []
    debian.unpack(suite, packages, tree, workspace.scratch)
    usr, bin_, bundle = tree / "usr", workspace.out / "bin", workspace.out / "bin" / "qemu-bundle" / "usr"
    bin_.mkdir()
    names = ["qemu-system-x86_64", *(tool for tool in TOOLS if (usr / "bin" / tool).exists())]
    programs = [Path(shutil.copy(usr / "bin" / name, bin_ / name)) for name in names]
    module_directory = usr / "lib" / "x86_64-linux-gnu" / "qemu"
    modules = [file for pattern in MODULES for file in module_directory.glob(pattern)]
    elf.copy_libraries(tree, [*programs, *modules], workspace.out / "lib")
    firmware = [file for pattern in FIRMWARE for file in usr.glob(pattern)]
    for file in (*firmware, *modules):
        target = bundle / file.relative_to(usr)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(inside(tree, file), target)
    identity = elf.build_id(programs[0])
    for program in programs:
        elf.make_runnable(program, workspace.final / "lib")
    text = debian.run([*runnable_now(workspace), "-version"])
    version, package = parse_version(text)
    facts = {"version": version, "package": package, "build_id": identity}
    (workspace.out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


def runnable_now(workspace: cache.Workspace) -> list[str]:
    """Starts the QEMU in `workspace`, whose interpreter will only be there after the final rename."""
    library = workspace.out / "lib"
    binary = workspace.out / "bin" / "qemu-system-x86_64"
    return [str(library / elf.LOADER), "--library-path", str(library), str(binary)]


def inside(tree: Path, file: Path) -> Path:
    """What `file` leads to, with absolute symbolic links taken to be relative to `tree`."""
    while file.is_symlink():
        target = file.readlink()
        file = tree / target.relative_to("/") if target.is_absolute() else file.parent / target
    return file


def parse_version(text: str) -> tuple[str, str]:
    """The version and the package's version in what ``-version`` prints."""
    match = re.search(r"version (\S+)(?: \((?:Debian )?(.*)\))?", text)
    if not match:
        raise LabError(f"this is not the version of a QEMU: {text!r}")
    return match[1], match[2] or match[1]
