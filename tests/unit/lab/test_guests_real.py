"""The lab's guests in real QEMUs: they run, and the counting guest notices what it is there for."""

import mmap
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import LabError, counting, linux, qemu, tap
from tests.lab.counting import CountingLog
from tests.lab.start import Guest, Lab

pytestmark = pytest.mark.qemu

PAGE = 4096
RAM = 64 << 20


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as started:
        yield started


@pytest.mark.parametrize("machine", ["pc", "q35"])
@pytest.mark.parametrize("key", qemu.SUITES)
def test_counting_guest_counts_and_answers(lab: Lab, key: str, machine: str) -> None:
    if reason := qemu.why_missing(key):
        pytest.skip(reason)
    guest = lab.counting(qemu.obtain(key), machine=machine, memory="64M")
    assert Path(f"/proc/{guest.pid}/exe").resolve() == qemu.obtain(key).binary.resolve()
    guest.console.send(b"aD\xff")
    guest.log.wait(lambda: guest.log.echoed == b"aD\xff")
    guest.log.wait_rounds(2)
    assert guest.log.sound, guest.log.problems()
    assert guest.log.pages * PAGE > 63 << 20


def test_counting_guest_survives_its_reset_and_says_so(lab: Lab) -> None:
    guest = lab.counting(qemu.obtain("10.0"), memory="64M")
    guest.console.send(b"Z")
    guest.log.wait(lambda: guest.log.starts == 2)
    guest.log.wait_ticks(2)
    assert not guest.log.sound
    assert "the guest started 2 times" in guest.log.problems()


def test_counting_guest_powers_off(lab: Lab) -> None:
    guest = lab.counting(qemu.obtain("10.0"), memory="64M")
    guest.console.send(b"Q")
    assert guest.process.wait(10)


def test_qemu_that_ends_at_once_is_reported_with_its_words(lab: Lab) -> None:
    with pytest.raises(LabError, match="unsupported machine type"):
        lab.counting(qemu.obtain("10.0"), machine="no-such-machine")


class Memory:
    """A guest that halts between lines, with its RAM in our hands."""

    def __init__(self, lab: Lab) -> None:
        file = lab.directory / "ram"
        backend = f"memory-backend-file,mem-path={file},share=on"
        self.guest: Guest[CountingLog] = lab.counting(
            qemu.obtain("7.2"), memory=f"{RAM >> 20}M", backend=backend, pace=0, hz=200
        )
        with file.open("r+b") as opened:
            self.ram = mmap.mmap(opened.fileno(), RAM)

    def walk(self) -> None:
        """Let the guest walk over all of its memory at least once, and stop again."""
        self.guest.console.send(b"D")
        self.guest.log.wait_rounds(2)
        self.guest.console.send(b"I")
        self.guest.log.wait(lambda: self.guest.log.echoed.endswith(b"I"))
        self.guest.log.wait_ticks(2)

    def read(self, page: int) -> bytes:
        return self.ram[page : page + PAGE]

    def write(self, page: int, data: bytes) -> None:
        self.ram[page : page + len(data)] = data

    def pages_found_bad(self) -> set[int]:
        return {stamp.page for stamp in self.guest.log.bad}


@pytest.fixture
def memory(lab: Lab) -> Iterator[Memory]:
    held = Memory(lab)
    held.walk()
    assert held.guest.log.sound, held.guest.log.problems()
    yield held
    assert held.guest.log.contiguous, held.guest.log.problems()


FIRST, MIDDLE, LAST = 0x10000, 0x2345000, RAM - (4 << 20)


@pytest.mark.parametrize("page", [FIRST, MIDDLE, LAST])
def test_older_content_of_a_page_is_noticed(memory: Memory, page: int) -> None:
    old = memory.read(page)
    memory.walk()
    assert memory.read(page) != old
    memory.write(page, old)
    memory.walk()
    assert memory.pages_found_bad() == {page}
    assert all(stamp.got < stamp.want for stamp in memory.guest.log.bad)
    assert len(memory.guest.log.bad) == 3
    assert not memory.guest.log.sound
    memory.walk()
    assert len(memory.guest.log.bad) == 3, "a page found bad is put right"


@pytest.mark.parametrize("half", [0, PAGE // 2])
def test_torn_page_is_noticed(memory: Memory, half: int) -> None:
    old = memory.read(MIDDLE)
    memory.walk()
    memory.write(MIDDLE + half, old[half : half + PAGE // 2])
    memory.walk()
    assert memory.pages_found_bad() == {MIDDLE}
    assert len(memory.guest.log.bad) in (1, 2)


def test_zeroed_page_is_noticed(memory: Memory) -> None:
    memory.write(MIDDLE, bytes(PAGE))
    memory.walk()
    assert [(bad.page, bad.got) for bad in memory.guest.log.bad] == [(MIDDLE, 0)] * 3


def test_pages_that_changed_places_are_noticed(memory: Memory) -> None:
    here, there = memory.read(MIDDLE), memory.read(MIDDLE + PAGE)
    memory.write(MIDDLE, there + here)
    memory.walk()
    assert memory.pages_found_bad() == {MIDDLE, MIDDLE + PAGE}
    assert all(stamp.got == stamp.want for stamp in memory.guest.log.bad)


def test_complaints_do_not_drown_the_count(memory: Memory) -> None:
    memory.write(0x1000000, bytes(32 << 20))
    memory.walk()
    assert 0 < len(memory.guest.log.bad) < 100
    assert memory.guest.log.bad_in_rounds == 3 * (32 << 20) // PAGE


def test_counting_program_fits_its_sectors() -> None:
    program = counting.program()
    assert len(program) == 512 * (1 + counting.SECTORS)
    assert program[510:512] == b"\x55\xaa"
    assert program[counting.HEADER_AT :].startswith(counting.MAGIC)


def test_linux_guest_ticks_writes_its_disk_and_runs_on_every_cpu(lab: Lab) -> None:
    disk = lab.directory / "disk"
    disk.touch()
    os.truncate(disk, 4 << 20)
    drive = ("-drive", f"file={disk},format=raw,if=virtio", "-smp", "2")
    guest = lab.linux(qemu.obtain("7.2"), *drive, words=["cpr.busy"])
    guest.console.send(b"is anybody there\n")
    guest.log.wait(lambda: guest.log.disk_ok >= 20 and len(guest.log.cpus) == 2, 30)
    guest.log.wait(lambda: guest.log.echoed == ["is anybody there"])
    assert guest.log.sound, guest.log.problems()
    assert len(guest.log.boot_ids) == 1
    assert b"block 1 of " + guest.log.boot_ids[0].encode() in disk.read_bytes()


def test_linux_guest_notices_that_its_disk_lost_a_write(lab: Lab) -> None:
    disk = lab.directory / "disk"
    disk.touch()
    os.truncate(disk, 16 * PAGE)
    guest = lab.linux(qemu.obtain("10.0"), "-drive", f"file={disk},format=raw,if=virtio,cache=none")
    guest.log.wait(lambda: guest.log.disk_ok >= 10, 30)
    assert guest.log.sound, guest.log.problems()
    with disk.open("r+b") as file:
        file.write(bytes(16 * PAGE))
    guest.log.wait(lambda: guest.log.disk_bad, 30)
    assert "read back as" in guest.log.problems()[0]


def test_guest_agent_answers(lab: Lab) -> None:
    guest = lab.linux(qemu.obtain("11.1.a"), agent=True)
    with socket.socket(socket.AF_UNIX) as agent:
        agent.settimeout(30)
        agent.connect(str(lab.directory / "guest.agent"))
        agent.sendall(b'{"execute": "guest-ping"}\n')
        assert agent.recv(100) == b'{"return": {}}\n'
    assert guest.log.sound, guest.log.problems()


def test_users_of_the_guest_see_its_pause_and_nothing_else(lab: Lab) -> None:
    if reason := tap.why_not():
        pytest.skip(reason)
    with tap.Tap() as device:
        guest = lab.linux(qemu.obtain("10.0"), *device.arguments(), words=[device.guest_word])
        with tap.Pinger(device.guest) as pinger, tap.Stream(device.guest) as stream:
            pinger.wait_arrivals(20)
            stream.wait_arrivals(20)
            with socket.create_connection((device.guest, linux.ECHO_PORT), timeout=10) as echo:
                echo.sendall(b"hello")
                assert echo.recv(5) == b"hello"
            start = time.monotonic()
            guest.process.kill(signal.SIGSTOP)
            time.sleep(0.4)
            guest.process.kill(signal.SIGCONT)
            pinger.wait_arrivals(20)
            stream.wait_arrivals(20)
            for watcher in (pinger, stream):
                assert 0.35 < watcher.silence(start) < 1
        assert not pinger.lost
        assert stream.sound
        assert 0.35 < guest.log.largest_gap(start) < 1
        assert guest.log.sound, guest.log.problems()
    assert device.name not in os.listdir("/sys/class/net")


def test_flood_of_numbers_is_read_byte_by_byte(lab: Lab) -> None:
    if reason := tap.why_not():
        pytest.skip(reason)
    with tap.Tap() as device:
        lab.linux(qemu.obtain("7.2"), *device.arguments(), words=[device.guest_word])
        with tap.Stream(device.guest, linux.FLOOD_PORT) as stream:
            stream.wait(lambda: stream.received > 1 << 20, 30)
        assert stream.sound
