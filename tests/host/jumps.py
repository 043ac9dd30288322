"""A new kernel under guests of the host VM: persistent memory for them, the jump by cpr, and their way back by hand.

In the small host VM nothing restores guests by itself, so the tests do what a person would; with systemd
``hooks/systemd/cpr-restore.service`` does it.
"""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

from tests.host.machine import MEMMAP, NVDIMM, Machine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.host.vm import Host, Said

MOUNTED = "/mnt"
STATE = "/var/lib/cpr"
FSDAX = "fsdax"
BY_HAND = ("--ignore", "restore-not-enabled")


def persistent(regions: Sequence[int], kind: str = MEMMAP, **how: Any) -> Machine:
    """A host with persistent memory. kind: MEMMAP, NVDIMM, or FSDAX (a file system on the first, by memmap)."""
    return Machine(dax=NVDIMM if kind == NVDIMM else MEMMAP, regions=tuple(regions), **how)


SMOKE = persistent((160, 256), devices=True)
"""For what runs every day: one boot for all of it."""


def device_dax(host: Host) -> list[str]:
    """Make each region a device DAX; their paths."""
    names = [f"namespace{number}.0" for number in range(len(host.machine.regions))]
    for name in names:
        host.sh(f"ndctl create-namespace -f -e {name} -m devdax -a 2M -M mem", 60)
    paths = [f"/dev/dax{number}.0" for number in range(len(names))]
    host.sh(" && ".join(f"test -c {path}" for path in paths))
    return paths


def file_system_dax(host: Host) -> str:
    """Make a file system of the first region and mount it; its directory."""
    host.sh("mkfs.ext4 -q -b 4096 /dev/pmem0", 60)
    return mount_dax(host)


def mount_dax(host: Host) -> str:
    """Mount it, as after each boot."""
    host.sh(f"mount -t ext4 -o dax /dev/pmem0 {MOUNTED} && grep -q 'dax=always' /proc/mounts")
    return MOUNTED


def to_vfio(host: Host, address: str) -> None:
    """Have vfio-pci take a device."""
    device = f"/sys/bus/pci/devices/{address}"
    host.sh(
        f"modprobe -a vfio-pci vfio_iommu_type1; echo vfio-pci > {device}/driver_override; "
        f"test -e {device}/driver && echo {address} > {device}/driver/unbind; "
        f"echo {address} > /sys/bus/pci/drivers_probe; test -e {device}/driver"
    )


def next_kernel(key: str) -> list[str]:
    """The options of cpr that name a kernel of the image; it gets the running one's command line."""
    return ["--kernel", f"/boot/{key}/vmlinuz", "--initrd", f"/boot/{key}/initrd", "--reuse-cmdline"]


def jump(host: Host, key: str, *words: object, seconds: float = 240) -> float:
    """Have `cpr update --kexec` take the guests that `words` name, and wait for the new kernel; seconds it took.

    Raises Stayed if there was no jump.
    """
    given = (*next_kernel(key), *words)
    return host.leave("exec cpr update --kexec -y --json " + shlex.join(map(str, given)), key, seconds)


def restore(host: Host, *words: object, seconds: float = 240) -> Said:
    """Bring the guests back by hand."""
    return host.cpr("restore", *words, "--json", seconds=seconds)


def saved(host: Host) -> dict[str, Any]:
    """The manifest that is open."""
    document: dict[str, Any] = json.loads(host.sh(f"cat {STATE}/reboot/current/manifest.json"))
    body: dict[str, Any] = document["body"]
    return body


def count_qemus(host: Host) -> int:
    """Guests' processes in the host VM."""
    return int(host.sh("ls -l /proc/[0-9]*/exe 2> /dev/null | grep -c 'qemu-system' || true"))


def back(said: Said) -> dict[str, dict[str, Any]]:
    """What `cpr restore` says of each guest, by name."""
    return {guest["name"]: guest for guest in said.json["guests"]}
