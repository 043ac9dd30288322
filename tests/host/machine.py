"""Which host: a table row of what the outer QEMU emulates, and the command lines that come of it.

Out of scope: running it (see ``vm``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpr.kernelargs import AVOIDED_BY_KASLR
from tests.host import image
from tests.lab import cache

if TYPE_CHECKING:
    from pathlib import Path

APPEND = (
    "console=ttyS0 loglevel=4 panic=-1 oops=panic tsc=reliable mitigations=off nowatchdog no_timer_check "
    "random.trust_cpu=on cryptomgr.notests no5lvl initcall_blacklist=jent_mod_init rodata=off "
    "init_on_alloc=0"
)
"""`no5lvl`: a fifth of the page walk less, which TCG does in software (0.8 s of 10 s of boot); the last three: 1 s."""
MEMMAP, NVDIMM = "memmap", "nvdimm"
DAX_MIB = 768
NVME_ADDRESS, NIC_ADDRESS = "0000:00:10.0", "0000:00:11.0"


@dataclass(frozen=True)
class Machine:
    """Which host. kernel: a key of ``kernels``. systemd: as process 1. memory: MiB.

    dax: MEMMAP or NVDIMM for persistent memory. regions: of it, their sizes in MiB. devices: an NVMe and a NIC, each in
    an IOMMU group. words: for the kernel's command line.
    """

    kernel: str = "6.12"
    systemd: bool = False
    memory: int = 3072
    cpus: int = 1
    dax: str = ""
    regions: tuple[int, ...] = (DAX_MIB,)
    devices: bool = False
    words: tuple[str, ...] = ()

    def append(self) -> str:
        """The kernel's command line."""
        init = "/sbin/init" if self.systemd else "/sbin/init.small"
        words = [APPEND, f"init={init}", f"cpr.lab={cache.root()}", f"cpr.site={image.SITE}", *self.words]
        words += {MEMMAP: self.memmap(), NVDIMM: ["cpr.nvdimm"]}.get(self.dax, [])
        words += ["intel_iommu=on"] if self.devices else []
        return " ".join(words)

    def memmap(self) -> list[str]:
        """The words that set memory aside, from 1 GiB on; regions that touched would be one to the kernel.

        More than four in a list, so that it stays where it is loaded: else it may unpack itself over the fifth.
        """
        parts, start = [], 1024
        for size in self.regions:
            parts.append(f"{size}M!{start}M")
            start = (start + size) // 128 * 128 + 128
        return [f"memmap={','.join(parts)}"] if len(parts) > AVOIDED_BY_KASLR else [f"memmap={p}" for p in parts]

    def arguments(self, disks: image.Disks, directory: Path) -> list[str]:
        """The outer QEMU's options, but for kernel and serial ports; what is written to is in `directory`."""
        nvdimm = self.dax == NVDIMM
        words = f"-machine q35{',nvdimm=on' if nvdimm else ''} -accel tcg,thread=multi -cpu max -smp {self.cpus}"
        words += f" -m {self.memory}M{f',slots={len(self.regions)},maxmem=8G' if nvdimm else ''}"
        words += " -nodefaults -no-user-config -display none -no-reboot"
        if self.devices:  # the IOMMU before what is behind it
            words += " -device intel-iommu,intremap=on,caching-mode=on"
        read_only = "format=raw,readonly=on,file.locking=off"
        for name, file, how in (
            ("root", directory / "root.qcow2", "format=qcow2"),
            ("lab", disks.lab, read_only),
            ("site", disks.site, read_only),
        ):
            words += f" -drive if=none,id={name},file={file},cache=unsafe,{how} -device virtio-blk-pci,drive={name}"
        words += f" -device virtio-serial-pci -chardev socket,id=agent,path={directory}/agent,server=on,wait=off"
        words += " -device virtserialport,chardev=agent,name=org.qemu.guest_agent.0"
        for number, size in enumerate(self.regions if nvdimm else ()):
            words += f" -object memory-backend-file,id=nv{number},share=on,size={size}M"
            words += f",mem-path={directory}/nvdimm{number} -device nvdimm,memdev=nv{number},id=nvdimm{number}"
        if self.devices:
            words += f" -drive if=none,id=nvme,file={directory}/nvme,format=raw"
            words += f" -device nvme,drive=nvme,serial=lab1,addr={NVME_ADDRESS[8:10]}.0"
            words += f" -netdev user,id=nic,restrict=on -device e1000e,netdev=nic,addr={NIC_ADDRESS[8:10]}.0"
        return words.split()


SMALL = Machine()
SYSTEMD = Machine(systemd=True)


def port(serial: Path, *, terminal: bool) -> list[str]:
    """The serial ports: the first is a log, the second, if wanted, our own terminal."""
    words = f"-chardev file,id=serial,path={serial},append=on -serial chardev:serial"
    words += " -chardev stdio,id=shell,signal=off -serial chardev:shell" if terminal else ""
    return words.split()
