"""Guests that are saved and loaded: RAM in a file that stays, and the two commands."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpr.reboot import manifest as manifests
from tests.qemu.moving import monitor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.counting import CountingLog
    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Guest, Lab
    from tests.qemu.conftest import Command, Result

MEMORY = "32M"
VIRTIO = (
    *("-drive", "if=none,id=d0,file={path},format=raw", "-device", "virtio-blk-pci,drive=d0,id=disk0"),
    *("-device", "virtio-balloon-pci", "-device", "virtio-rng-pci"),
)
"""Of these Debian's 11.1 refuses the queues as its 10.0 has made them."""


def virtio(lab: Lab) -> list[str]:
    """Words for devices that no other QEMU than the old one takes."""
    image = lab.directory / "extra.disk"
    image.write_bytes(bytes(1 << 20))
    return [word.format(path=image) for word in VIRTIO]


@contextlib.contextmanager
def shared_memory(lab: Lab) -> Iterator[Path]:
    """A directory on /dev/shm."""
    path = Path("/dev/shm", lab.directory.name)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextlib.contextmanager
def changed(path: Path, at: int, data: bytes) -> Iterator[None]:
    """Other bytes in a file, for a while; its times are put back as well."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        before = file.read(len(data))
        file.seek(at)
        file.write(data)
    try:
        yield
    finally:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@dataclass
class Subject:
    """A counting guest, its RAM and the file that it is saved to. `pid` is that of its QEMU now."""

    lab: Lab
    cpr: Command
    guest: Guest[CountingLog]
    ram: Path
    pid: int
    file: Path = Path()

    def __post_init__(self) -> None:
        self.file = self.lab.directory / "saved"

    @classmethod
    def start(cls, lab: Lab, cpr: Command, build: QemuBuild, *words: str, name: str = "web1", ram: Path | None = None,
              **how: Any) -> Subject:  # fmt: skip
        cpr.environment["CPR_STATE_DIR"] = str(lab.directory / "state")
        path = ram or lab.directory / f"{name}.ram"
        backend = f"memory-backend-file,share=on,mem-path={path}"
        guest = lab.counting(build, *words, name=name, memory=MEMORY, hz=50, backend=backend, **how)
        return cls(lab, cpr, guest, path, guest.pid)

    @property
    def manifest(self) -> Path:
        return self.file.with_name(f"{self.file.name}.manifest")

    def status(self) -> str:
        with monitor(self.guest) as session:
            return str(session.execute("query-status")["status"])

    def stop(self) -> None:
        with monitor(self.guest) as session:
            session.execute("stop")

    def cont(self) -> None:
        with monitor(self.guest) as session:
            session.execute("cont")

    def save(self, *words: object, mode: str = "restart") -> Result:
        return self.cpr("save", self.pid, self.file, "--mode", mode, "--json", *words)

    def saved(self, *words: object, mode: str = "restart") -> dict[str, Any]:
        """It was saved, and its QEMU is gone."""
        result = self.save(*words, mode=mode)
        assert result.code == 0, str(result)
        assert self.guest.process.wait(5), "the old QEMU is still there"
        return result.json

    def load(self, *words: object) -> Result:
        result = self.cpr("load", self.file, "--json", *words)
        with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
            self.pid = result.json["guest"]["pid_after"]
            self.lab.adopt(self.pid)
        return result

    def loaded(self, *words: object) -> dict[str, Any]:
        result = self.load(*words)
        assert result.code == 0, str(result)
        outcome: dict[str, Any] = result.json["guest"]
        return outcome

    def counts_on(self, before: int) -> None:
        """It goes on where it was, its memory is what it left, and nothing is left switched on."""
        log = self.guest.log
        log.wait_ticks(3, 20)
        self.guest.console.send(b"D")  # go through the memory as quickly as it can
        assert before < log.number < before + 5000
        log.wait_rounds(2, 60)
        assert not log.bad, log.bad
        assert not log.complaints, log.complaints
        assert log.starts == 1
        with monitor(self.guest) as session:
            on = [c["capability"] for c in session.execute("query-migrate-capabilities") if c["state"]]
            assert "x-ignore-shared" not in on
            assert session.execute("query-migrate-parameters").get("mode", "normal") == "normal"

    def result(self) -> str:
        """What the manifest says became of it."""
        (guest,) = manifests.read_file(str(self.manifest)).guests
        return str(guest.restore.result)
