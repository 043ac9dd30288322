"""What the guest itself would swear to: its RAM, its clock, its disk.

The strictest question is asked of a paused guest: of every byte of its RAM, before and after. The new QEMU has then
been started over those pages and has loaded the state, and nobody was allowed to write anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import struct
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pytest

from cpr.errors import Exit, MonitorError
from cpr.model import MonitorAddress
from cpr.qemu import qmp
from tests.lab import counting, linux, qemu, tools
from tests.lab.console import Console, ConsoleLog
from tests.lab.start import Guest, Lab
from tests.qemu.conftest import build, qemus_of
from tests.qemu.moving import backend, descriptors, goes_on, monitor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Orphan
    from tests.qemu.conftest import Command

PAGE = 4096
DIMM = 64 << 20


# -- configurations that might write into RAM as they start


@dataclass(frozen=True)
class Config:
    """A guest's words besides the usual ones. said: what it prints once it is up."""

    words: Callable[[Lab, QemuBuild], list[str]]
    said: bytes = b"c 10 "
    memory: str = "128M"
    more: str = ""
    """For -m."""
    machine: str = ""


def boot_disk(lab: Lab) -> Path:
    return counting.disk(lab.directory / "guest.disk")


def with_disk(*words: str) -> Config:
    """The counting guest on a disk."""
    return Config(lambda lab, _: [*counting.arguments(boot_disk(lab)), *words])


def with_kernel(*words: str) -> Config:
    """The Linux guest, loaded by QEMU."""
    return Config(lambda *_: ["-cpu", "max", *linux.obtain().arguments(), *words], said=b"tick 10 ", memory="256M")


def with_memory(device: str, machine: str = "", size: int = DIMM) -> Config:
    """The counting guest with a device that is RAM too."""

    def words(lab: Lab, born: QemuBuild) -> list[str]:
        memory = ["-object", f"{backend(born, lab, 'more.ram')},id=more,size={size}"]
        return [*counting.arguments(boot_disk(lab)), *memory, "-device", f"{device},memdev=more"]

    return Config(words, machine=machine, more=",slots=4,maxmem=1G")


def floppy(lab: Lab, _: QemuBuild) -> list[str]:
    return ["-drive", f"file={boot_disk(lab)},format=raw,if=floppy"]


def ovmf(lab: Lab, _: QemuBuild) -> list[str]:
    """UEFI firmware and its variables, in flash."""
    directory = tools.unpacked("ovmf") / "usr" / "share" / "OVMF"
    variables = Path(shutil.copy(directory / "OVMF_VARS_4M.fd", lab.directory / "vars.fd"))
    return [
        *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={directory / 'OVMF_CODE_4M.fd'}"),
        *("-drive", f"if=pflash,unit=1,format=raw,file={variables}"),
    ]


def multiboot(lab: Lab, _: QemuBuild) -> list[str]:
    """A kernel by the Multiboot specification, which prints M for ever."""
    load, magic, flags = 0x200000, 0x1BADB002, 0x10000
    header = struct.pack("<8I", magic, flags, -(magic + flags) & 0xFFFFFFFF, load, load, 0, 0, load + 32)
    # cli; mov edx, 0x3f8; again: mov al, 'M'; out dx, al; mov ecx, 0x100000; here: loop here; jmp again
    code = bytes.fromhex("fa baf8030000 b04d ee b900001000 e2fe ebf4")
    (lab.directory / "kernel").write_bytes(header + code)
    return ["-kernel", str(lab.directory / "kernel")]


NET = ("-netdev", "user,id=n0")
CONFIGS = {
    "seabios": with_disk(),
    "kernel": with_kernel(),
    "multiboot": Config(multiboot, said=b"MMMM"),
    "floppy": Config(floppy),
    "ovmf": Config(ovmf, said=b"BdsDxe"),
    "ovmf-kernel": Config(lambda *of: [*ovmf(*of), *with_kernel().words(*of)], said=b"tick 10 ", memory="256M"),
    "vga": with_disk("-device", "VGA"),
    "vga-std": with_disk("-vga", "std"),
    "cirrus": with_disk("-device", "cirrus-vga"),
    "bochs": with_disk("-device", "bochs-display"),
    "ramfb": with_disk("-device", "ramfb"),
    "virtio-vga": with_disk("-device", "virtio-vga"),
    "virtio-gpu": with_disk("-device", "virtio-gpu-pci"),
    "vmgenid": with_disk("-device", "vmgenid,guid=auto"),
    "vmcoreinfo": with_kernel("-device", "vmcoreinfo"),
    "pvpanic": with_disk("-device", "pvpanic"),
    "network-rom": with_disk(*NET, "-device", "e1000,netdev=n0"),
    "virtio-net": with_kernel(*NET, "-device", "virtio-net-pci,netdev=n0"),
    "balloon": with_kernel("-device", "virtio-balloon-pci"),
    "usb": with_disk("-device", "qemu-xhci", "-device", "usb-tablet", "-device", "usb-kbd"),
    "smbios": with_disk("-smbios", "type=1,serial=x", "-fw_cfg", "name=opt/x,string=y"),
    "acpi-table": Config(lambda lab, _: [*counting.arguments(boot_disk(lab)), "-acpitable", acpi_table(lab)]),
    "pc-dimm": with_memory("pc-dimm"),
    "nvdimm": with_memory("nvdimm", ",nvdimm=on"),
    "ivshmem": with_memory("ivshmem-plain,master=on"),
    "virtio-pmem": with_memory("virtio-pmem-pci"),
}

MUCH_AT_ONCE = Config(
    lambda lab, born: [
        *with_memory("nvdimm").words(lab, born),
        *("-device", "VGA", "-device", "vmgenid,guid=auto", "-device", "vmcoreinfo"),
        *("-device", "qemu-xhci", "-device", "usb-tablet", *NET, "-device", "e1000,netdev=n0"),
    ],
    machine=",nvdimm=on",
    more=",slots=4,maxmem=1G",
)
PAIRS = [("7.2", "7.2", "pc"), ("11.1.a", "11.1.a", "q35"), ("7.2", "11.1.a", "q35")]


def acpi_table(lab: Lab) -> str:
    (lab.directory / "table").write_bytes(b"\1\2\3\4")
    return f"sig=TEST,data={lab.directory / 'table'}"


@contextlib.contextmanager
def started(lab: Lab, born: QemuBuild, machine: str, config: Config) -> Iterator[Guest[ConsoleLog]]:
    """A guest of this configuration, up."""
    path = lab.directory / "guest.console"
    memory = f"{backend(born, lab, 'ram')},id=ram0,size={config.memory}"
    command = [
        *born.command,
        *("-name", "guest", "-nodefaults", "-display", "none", "-accel", "tcg", "-m", config.memory + config.more),
        *("-machine", f"{machine}{config.machine},memory-backend=ram0", "-object", memory),
        *("-chardev", f"socket,id=console,path={path},server=on,wait=off", "-serial", "chardev:console"),
        *("-qmp", f"unix:{lab.directory}/guest.qmp,server=on,wait=off"),
        *config.words(lab, born),
    ]
    process = lab.start(command, name="guest")
    with Console(ConsoleLog()).connect(path) as console:
        console.log.wait(lambda: config.said in console.log.text, 120, f"not {config.said!r}")
        yield Guest(process, lab.directory / "guest.qmp", console)


@contextlib.contextmanager
def ram_of(process: Orphan) -> Iterator[dict[str, BinaryIO]]:
    """The files that are the guest's RAM, held open."""
    with contextlib.ExitStack() as held:
        files: dict[str, BinaryIO] = {}
        for number, target in descriptors(process.pid):
            if target.startswith("/memfd:memory-backend") or target.endswith("ram"):
                file = held.enter_context(open(f"/proc/{process.pid}/fd/{number}", "rb", buffering=0))
                files.setdefault(f"{target} {os.fstat(file.fileno()).st_ino}", file)
        assert files
        yield files


def digests(files: dict[str, BinaryIO]) -> dict[str, list[bytes]]:
    """Of every page of every file."""
    found = {}
    for name, file in files.items():
        size = os.fstat(file.fileno()).st_size
        pages = (os.pread(file.fileno(), PAGE, at) for at in range(0, size, PAGE))
        found[name] = [hashlib.blake2b(page, digest_size=8).digest() for page in pages]
    return found


def differing(before: dict[str, list[bytes]], after: dict[str, list[bytes]]) -> list[str]:
    """The pages that are not the same, as NAME at ADDRESS."""
    return [
        f"{name} at {number * PAGE:#x}"
        for name in before
        for number, (one, other) in enumerate(zip(before[name], after[name], strict=True))
        if one != other
    ]


def paused_and_moved(lab: Lab, cpr: Command, old: str, new: str, machine: str, config: Config) -> dict[str, Any]:
    """Pause a guest, update it, and assert that not a byte of its RAM is another; then let it go on."""
    with started(lab, build(old), machine, config) as guest, ram_of(guest.process) as ram:
        with monitor(guest) as session:
            session.execute("stop")
        before = digests(ram)
        outcome = cpr.update(guest.pid, build(new)).guest
        assert differing(before, digests(ram)) == [], outcome
        assert outcome["runstate"] == "paused", outcome
        assert qemus_of(lab) == [outcome["pid_after"]], outcome
        said = len(guest.log.text)
        with monitor(guest) as session:
            session.execute("cont")
            if config.said != b"BdsDxe":  # firmware that waits for somebody has no more to say
                guest.log.wait(lambda: len(guest.log.text) > said + 8, 60, "the guest is silent")
            assert session.execute("query-status")["status"] == "running"
        return outcome


@pytest.mark.timeout(300)
def test_ram_of_a_paused_guest_is_the_same_after_an_update(lab: Lab, cpr: Command) -> None:
    """Everything at once that can be had in one guest."""
    paused_and_moved(lab, cpr, "7.2", "11.1.a", "q35", MUCH_AT_ONCE)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("old", "new", "machine"), PAIRS)
@pytest.mark.parametrize("name", CONFIGS)
def test_ram_is_the_same_in_every_configuration(
    lab: Lab, cpr: Command, name: str, old: str, new: str, machine: str
) -> None:
    outcome = paused_and_moved(lab, cpr, old, new, machine, CONFIGS[name])
    assert old != new or outcome["status"] == "updated", outcome


# -- what does write at start, and is refused

LOADED_AT = 0x5000000


def loader_words(_: Lab) -> list[str]:
    return ["-device", f"loader,id=it,addr={LOADED_AT:#x},data=0x4711,data-len=4"]


def loader_json(_: Lab) -> list[str]:
    return ["-device", f'{{"driver":"loader","id":"it","addr":{LOADED_AT},"data":18193,"data-len":4}}']


def loader_file(lab: Lab) -> list[str]:
    path = lab.directory / "loader.cfg"
    path.write_text(
        f'[device "it"]\n  driver = "loader"\n  addr = "{LOADED_AT:#x}"\n  data = "0x4711"\n  data-len = "4"\n'
    )
    return ["-readconfig", str(path)]


def with_loader(words: list[str]) -> Config:
    """The counting guest, which by round 1 has written over what was loaded."""
    return replace(with_disk(*words), said=b"round 1 ")


LOADERS = {"words": loader_words, "json": loader_json, "readconfig": loader_file}


def changed_by_a_second_start(lab: Lab, born: QemuBuild, words: list[str]) -> list[str]:
    """What another QEMU of this kind changes in the guest's RAM by waiting for state over it."""
    config = with_loader(words)
    with started(lab, born, "q35", config) as guest, ram_of(guest.process) as ram:
        guest.process.kill()  # two would want its disk; the RAM is in our hands
        assert guest.process.wait(10)
        before = digests(ram)
        (file,) = ram.values()
        monitor_path = lab.directory / "second.qmp"
        command = [
            *born.command,
            *("-nodefaults", "-display", "none", "-accel", "tcg", "-m", config.memory, "-S", "-incoming", "defer"),
            *("-machine", "q35,memory-backend=ram0", "-qmp", f"unix:{monitor_path},server=on,wait=off"),
            "-object",
            f"memory-backend-file,share=on,mem-path=/proc/{os.getpid()}/fd/{file.fileno()},id=ram0,size={config.memory}",
            *config.words(lab, born),
        ]
        second = lab.start(command, name="second")
        wait_answers(monitor_path)
        second.kill()
        return differing(before, digests(ram))


def wait_answers(path: Path, seconds: float = 30.0) -> None:
    """Wait until a QEMU's monitor answers; by then the start is over."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, MonitorError):
            with qmp.connect(MonitorAddress(label="", path=str(path))) as session:
                session.execute("query-status")
                return
        assert time.monotonic() < end, "it does not come up"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("spelling", "key"),
    [
        ("words", "7.2"),
        *(
            pytest.param(s, k, marks=pytest.mark.full)
            for s in LOADERS
            for k in qemu.SUITES
            if (s, k) != ("words", "7.2")
        ),
    ],
)
def test_loader_writes_into_ram_and_is_refused(cpr: Command, spelling: str, key: str) -> None:
    words = LOADERS[spelling](cpr.lab)
    with Lab() as other:
        changed = changed_by_a_second_start(other, build(key), words)
    assert [page.partition(" at ")[2] for page in changed] == [f"{LOADED_AT:#x}"], "this is why"
    with started(cpr.lab, build(key), "q35", with_loader(words)) as guest:
        result = cpr.update(guest.pid, build(key))
        assert result.code == Exit.BLOCKED, result
        assert "writes-ram-at-start" in [f["check"] for f in result.guest["findings"] if f["severity"] == "blocker"]
        ignored = cpr.update(guest.pid, build(key), "--ignore", "writes-ram-at-start")
        assert ignored.code == Exit.USAGE, ignored
        assert qemus_of(cpr.lab) == [guest.pid]
        said = len(guest.log.text)
        guest.log.wait(lambda: len(guest.log.text) > said + 50)


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "pair", [("7.2", "7.2"), ("7.2", "10.0"), ("10.0", "10.0"), ("11.1.a", "11.1.b")], ids="-".join
)
def test_memory_of_virtio_mem_is_kept_or_the_update_is_refused(lab: Lab, cpr: Command, pair: tuple[str, str]) -> None:
    """Before 8.1 the device throws its pages away when a QEMU starts, incoming state or not."""
    born = build(pair[0])
    size = 128 << 20  # the least that Linux takes at a time
    guest = lab.linux(
        born,
        *("-m", "256M,slots=4,maxmem=1G", "-object", f"{backend(born, lab, 'more.ram')},id=more,size={size}"),
        *("-device", f"virtio-mem-pci,memdev=more,requested-size={size}"),
        words=["memhp_default_state=online"],
        backend=backend(born, lab),
    )
    with monitor(guest) as session:
        if session.execute("query-memory-devices")[0]["data"]["size"] < size:
            session.wait_event({"MEMORY_DEVICE_SIZE_CHANGE"}, lambda e: e.data["size"] == size, timeout=60)
    with ram_of(guest.process) as ram:
        (more,) = [file for file in ram.values() if os.fstat(file.fileno()).st_size == size]
        with open(f"/proc/{os.getpid()}/fd/{more.fileno()}", "r+b", buffering=0) as writable:
            os.pwrite(writable.fileno(), b"kept" * 1024, size - PAGE)  # the kernel takes from the other end
        outcome = cpr.update(guest.pid, build(pair[1])).guest
        assert os.pread(more.fileno(), 4, size - PAGE) == b"kept", outcome
    assert outcome["status"] in ("updated", "blocked"), outcome
    goes_on(guest)


# -- what the guest says itself


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("old", "new"), [("7.2", "11.1.a"), ("11.1.a", "11.1.b")])
def test_eight_gibibytes_without_a_lost_or_torn_page(lab: Lab, cpr: Command, old: str, new: str) -> None:
    """More than fits below 4 GiB, all of it written by the guest, while it goes on writing as fast as it can."""
    born = build(old)
    guest = lab.counting(born, memory="8G", pace=None, backend=backend(born, lab))
    guest.log.wait_rounds(1, 120)
    outcome = cpr.update(guest.pid, build(new)).guest
    assert outcome["status"] == "updated", outcome
    guest.log.wait_rounds(2, 120)
    assert guest.log.pages * PAGE > 8 * 0.99 * (1 << 30)
    assert guest.log.sound, guest.log.problems()


@pytest.mark.parametrize("old", ["11.1.a", pytest.param("7.2", marks=pytest.mark.full)])
def test_a_guest_that_writes_all_the_time_loses_no_page(lab: Lab, cpr: Command, old: str) -> None:
    born = build(old)
    guest = lab.counting(born, pace=None, hz=1000, backend=backend(born, lab))
    guest.log.wait_rounds(1)
    for _ in range(2):
        outcome = cpr.update(qemus_of(lab)[0], born).guest
        assert outcome["status"] == "updated", outcome
        guest.log.wait_rounds(2)
        assert guest.log.sound, guest.log.problems()
