"""PCI devices and their drivers, by sysfs: what a device is bound to, and binding it to another driver.

`root` is where sys is looked up, for trees recorded elsewhere.

Out of scope: which guest has which device.
"""

from __future__ import annotations

import contextlib
import os
import re
import time

from cpr.linux import process

_ADDRESS = re.compile(r"(?:([0-9a-fA-F]{4,8}):)?([0-9a-fA-F]{2}):([0-9a-fA-F]{2})\.([0-7])")
BIND_SECONDS = 10.0


def full_address(text: str) -> str:
    """0000:03:00.0 of an address as host= of -device vfio-pci takes it, which may leave out the domain.

    Raises:
        ValueError: it is none.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise ValueError(f"not the address of a PCI device: {text[:40]!r}")
    domain, bus, slot, function = match.groups()
    return f"{(domain or '0000').lower()}:{bus.lower()}:{slot.lower()}.{function}"


def passed_through(driver: str, host: str | None, sysfsdev: str | None) -> str | None:
    """Address of the PCI device that a `-device` of QEMU passes through; None where it is none of the kind.

    `host` and `sysfsdev` are its parameters; QEMU goes by the second where it has both.

    Raises:
        ValueError: it names none.
    """
    if not driver.startswith("vfio-pci"):  # vfio-pci-nohotplug is one, too
        return None
    return full_address(os.path.basename((sysfsdev or "").rstrip("/")) or host or "")


def _device(address: str, root: str) -> str:
    return os.path.join(root, "sys/bus/pci/devices", address)


def driver(address: str, *, root: str = "/") -> str:
    """Name of the driver that the device is bound to; "" where it is bound to none.

    Raises:
        FileNotFoundError: there is no such device.
    """
    os.stat(_device(address, root))
    try:
        return os.path.basename(os.readlink(os.path.join(_device(address, root), "driver")))
    except FileNotFoundError:
        return ""


def iommu_group(address: str, *, root: str = "/") -> str:
    """Number of its IOMMU group; "" where it has none, and VFIO cannot have it."""
    try:
        return os.path.basename(os.readlink(os.path.join(_device(address, root), "iommu_group")))
    except FileNotFoundError:
        return ""


def load_driver(name: str, *, root: str = "/") -> None:
    """Have the module of a driver loaded where the kernel does not know the driver yet, as after a boot.

    What fails shows when a device is bound to it.
    """
    if not os.path.isdir(os.path.join(root, "sys/bus/pci/drivers", name)):
        with contextlib.suppress(process.RunFailed, OSError):
            process.run(["modprobe", "--", name], timeout=BIND_SECONDS)


def bind(address: str, name: str, *, root: str = "/", timeout: float = BIND_SECONDS) -> None:
    """Bind the device to driver `name` and no other, taking it from the one it has. Safe to repeat.

    `driver_override` keeps other drivers away from it until the next boot (Documentation/ABI/testing/sysfs-bus-pci).

    Raises:
        FileNotFoundError: no such device. TimeoutError: the driver does not take it (its module is not loaded).
        OSError.
    """
    place = _device(address, root)
    before = driver(address, root=root)
    _write(os.path.join(place, "driver_override"), name)
    if before == name:
        return
    if before:
        _write(os.path.join(place, "driver/unbind"), address)
    end = time.monotonic() + timeout
    while True:
        _write(os.path.join(root, "sys/bus/pci/drivers_probe"), address)
        if driver(address, root=root) == name:
            return
        if time.monotonic() >= end:
            raise TimeoutError(f"{address} was not taken by {name} within {timeout:g} s: is its module loaded?")
        time.sleep(0.05)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode() + b"\n")
    finally:
        os.close(fd)
