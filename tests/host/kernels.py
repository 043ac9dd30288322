"""The host VM's kernels: one table, and the few modules of each that a host needs.

Another kernel is another line of KERNELS.  The modules are flat in ``modules/``, uncompressed, in no order; those of
FIRST and BESIDE are also in the initramfs, numbered, because the root disk is behind them or they take long.

Out of scope: modules.dep (see ``image``, which has a depmod), installing kernels as a package would.
"""

from __future__ import annotations

import functools
import lzma
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from tests.lab import LabError, cache, debian, linux, tools

if TYPE_CHECKING:
    from collections.abc import Mapping

RECIPE = "3"
PACKAGE = "linux-image-amd64"


@dataclass(frozen=True)
class Source:
    """Where a kernel comes from, and modules that only this one has. first: of those, what the initramfs needs."""

    suite: str
    first: tuple[str, ...] = ()


# A key names a place in the lab; `Kernel.release` is what really came.
KERNELS: Mapping[str, Source] = MappingProxyType(
    {
        "6.1": Source("bookworm", first=("crc32c_generic",)),  # ext4 asks for it by name, which no `depends` tells
        "6.12": Source("trixie", first=("crc32c_generic",)),
        "7.2": Source("forky"),
    }
)

FIRST = ("virtio_pci", "virtio_blk", "virtio_console", "ext4")
BESIDE = ("kvm_amd",)
"""Loaded by the initramfs meanwhile; a second of the boot where there are two processors (`Machine.cpus`)."""
MODULES = (
    *("kvm_amd", "kvm_intel", "tun", "vhost_net", "bridge", "veth", "virtio_net", "e1000e", "nvme", "loop", "overlay"),
    *("nd_e820", "nfit", "nd_pmem", "dax_pmem", "device_dax"),
    *("vfio-pci", "vfio_iommu_type1", "autofs4"),
)


@dataclass(frozen=True)
class Kernel:
    """One kernel, unpacked: ``vmlinuz``, ``vmlinux``, ``modules/``, ``first/`` and ``beside/`` in `directory`."""

    key: str
    release: str
    directory: Path

    @property
    def image(self) -> Path:
        """What kexec loads."""
        return self.directory / "vmlinuz"

    @property
    def unpacked(self) -> Path:
        """What QEMU loads: emulated, the kernel takes 2 s to unpack itself."""
        return self.directory / "vmlinux"


@functools.cache
def obtain(key: str) -> Kernel:
    """The kernel `key`, from the cache or else from the mirror.  Raises LabError."""
    if key not in KERNELS:
        raise LabError(f"the host VM has no kernel {key!r}; it knows {', '.join(KERNELS)}")
    source = KERNELS[key]
    recipe = " ".join((RECIPE, source.suite, PACKAGE, *source.first, *FIRST, "-", *BESIDE, "-", *MODULES))
    directory = cache.artifact(f"host-kernel-{key}", recipe, lambda workspace: build(source, workspace))
    return Kernel(key, (directory / "release").read_text(), directory)


def build(source: Source, workspace: cache.Workspace) -> None:
    """Unpack the kernel and keep what is needed of it."""
    first = (*source.first, *FIRST)
    tree = workspace.scratch / "tree"
    for archive in debian.download(source.suite, [PACKAGE], workspace.scratch / "apt"):
        # 7.x has the image, the modules and the rest in packages of their own
        if archive.name.startswith(("linux-image-", "linux-binary-", "linux-modules-", "linux-base-")):
            debian.run(["dpkg-deb", "-x", str(archive), str(tree)])
        archive.unlink()
    debian.merge_usr(tree)
    image = next(file for pattern in ("boot/vmlinuz-*", "usr/lib/modules/*/vmlinuz") for file in tree.glob(pattern))
    shutil.copy(image, workspace.out / "vmlinuz")
    unpack(image.read_bytes(), workspace.out / "vmlinux", workspace.scratch)
    (modules,) = (tree / "usr" / "lib" / "modules").iterdir()
    (workspace.out / "release").write_text(modules.name)
    builtin = (modules / "modules.builtin").read_text()
    for name in ("first", "beside", "modules"):
        (workspace.out / name).mkdir()
    for file in modules.glob("modules.builtin*"):
        shutil.copy(file, workspace.out / "modules" / file.name)
    shutil.copy(modules / "modules.order", workspace.out / "modules" / "modules.order")
    for place, names in (("first", first), ("beside", BESIDE)):
        for number, (name, content) in enumerate(linux.modules_in_order(modules, builtin, names)):
            (workspace.out / place / f"{number:02}-{name}.ko").write_bytes(content)
    for name, content in linux.modules_in_order(modules, builtin, (*first, *MODULES)):
        (workspace.out / "modules" / f"{name}.ko").write_bytes(content)


def unpack(image: bytes, into: Path, scratch: Path) -> None:
    """Write the ELF within a bzImage, whose header tells where it is.  Raises LabError.

    Source: Documentation/arch/x86/boot.rst (setup_sects, payload_offset, payload_length).
    """
    start = ((image[0x1F1] or 4) + 1) * 512
    offset, length = struct.unpack_from("<II", image, 0x248)
    payload = image[start + offset : start + offset + length]
    if payload.startswith(b"\xfd7zXZ"):
        into.write_bytes(lzma.LZMADecompressor().decompress(payload))
    elif payload.startswith(b"\x28\xb5\x2f\xfd"):
        packed = scratch / "vmlinux.zst"
        packed.write_bytes(payload[:-4])  # without its size, which is behind it
        debian.run([*tools.command("zstd"), "-dq", "-o", str(into), str(packed)])
    else:
        raise LabError(f"the kernel is compressed in a way that is not known: it begins with {payload[:6].hex()}")
