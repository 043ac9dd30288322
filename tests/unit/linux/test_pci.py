"""PCI devices in a fake sysfs, whose kernel binds when `drivers_probe` is written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from cpr.linux import pci

NVME = "0000:03:00.0"


class FakeSysfs:
    """One device. What is written to it is done as the kernel does it, by a replaced `_write`."""

    def __init__(self, root: Path, driver: str, *, takes: bool = True) -> None:
        self.root, self.takes = root, takes
        self.written: list[tuple[str, str]] = []
        self.override = ""
        self.device = root / "sys/bus/pci/devices" / NVME
        self.device.mkdir(parents=True)
        os.symlink("../../../kernel/iommu_groups/12", self.device / "iommu_group")
        if driver:
            os.symlink(f"../../drivers/{driver}", self.device / "driver")

    def write(self, path: str, text: str) -> None:
        name = os.path.relpath(path, self.root / "sys/bus/pci")
        self.written.append((name, text))
        if name.endswith("driver_override"):
            self.override = text
        elif name.endswith("unbind"):
            (self.device / "driver").unlink()
        elif name == "drivers_probe" and self.takes and not (self.device / "driver").is_symlink():
            os.symlink(f"../../drivers/{self.override}", self.device / "driver")


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str, *, takes: bool = True) -> FakeSysfs:
    made = FakeSysfs(tmp_path, driver, takes=takes)
    monkeypatch.setattr(pci, "_write", made.write)
    return made


@pytest.mark.parametrize("before", ["nvme", ""])
def test_bind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    sysfs, root = fake(tmp_path, monkeypatch, before), str(tmp_path)
    assert pci.driver(NVME, root=root) == before
    pci.bind(NVME, "vfio-pci", root=root)
    assert pci.driver(NVME, root=root) == "vfio-pci"
    unbind = [(f"devices/{NVME}/driver/unbind", NVME)] if before else []
    expected = [(f"devices/{NVME}/driver_override", "vfio-pci"), *unbind, ("drivers_probe", NVME)]
    assert sysfs.written == expected
    pci.bind(NVME, "vfio-pci", root=root)
    assert sysfs.written == [*expected, (f"devices/{NVME}/driver_override", "vfio-pci")], "nothing is taken from it"


def test_a_driver_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, "", takes=False)
    with pytest.raises(TimeoutError, match="module"):
        pci.bind(NVME, "vfio-pci", root=str(tmp_path), timeout=0.1)


def test_no_such_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sysfs = fake(tmp_path, monkeypatch, "nvme")
    with pytest.raises(FileNotFoundError):
        pci.driver("0000:99:00.0", root=str(tmp_path))
    with pytest.raises(FileNotFoundError):
        pci.bind("0000:99:00.0", "vfio-pci", root=str(tmp_path))
    assert sysfs.written == []


def test_iommu_group(tmp_path: Path) -> None:
    sysfs = FakeSysfs(tmp_path, "nvme")
    assert pci.iommu_group(NVME, root=str(tmp_path)) == "12"
    (sysfs.device / "iommu_group").unlink()
    assert pci.iommu_group(NVME, root=str(tmp_path)) == ""


@pytest.mark.parametrize(
    ("text", "address"),
    [("03:00.0", NVME), ("0000:03:00.0", NVME), ("0001:AB:1f.7", "0001:ab:1f.7"), ("10000:e1:00.0", "10000:e1:00.0")],
)
def test_addresses(text: str, address: str) -> None:
    assert pci.full_address(text) == address


@pytest.mark.parametrize("text", ["", "3:0.0", "03:00", "0000:03:00.8", "../../etc", "03:00.0/../x"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="not the address"):
        pci.full_address(text)


@pytest.mark.parametrize(
    ("driver", "host", "sysfsdev", "address"),
    [
        ("vfio-pci", "03:00.0", None, NVME),
        ("vfio-pci-nohotplug", "03:00.0", None, NVME),
        ("vfio-pci", None, f"/sys/bus/pci/devices/{NVME}", NVME),
        ("vfio-pci", "04:00.0", f"/sys/devices/pci0000:00/0000:00:01.0/{NVME}/", NVME),
        ("nvme", "03:00.0", None, None),
    ],
)
def test_which_device_is_passed_through(
    driver: str, host: str | None, sysfsdev: str | None, address: str | None
) -> None:
    assert pci.passed_through(driver, host, sysfsdev) == address


def test_a_mediated_device_is_no_pci_device() -> None:
    with pytest.raises(ValueError, match="not the address"):
        pci.passed_through("vfio-pci", None, "/sys/bus/mdev/devices/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001")


def test_the_module_of_an_unknown_driver_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake modprobe, which fails: that is seen when the device is bound."""
    calls: list[Sequence[str]] = []

    def run(words: Sequence[str], *, timeout: float) -> None:
        calls.append(words)
        raise FileNotFoundError("modprobe")

    monkeypatch.setattr("cpr.linux.process.run", run)
    pci.load_driver("vfio-pci", root=str(tmp_path))
    assert calls == [["modprobe", "--", "vfio-pci"]]
    (tmp_path / "sys/bus/pci/drivers/vfio-pci").mkdir(parents=True)
    pci.load_driver("vfio-pci", root=str(tmp_path))
    assert len(calls) == 1
