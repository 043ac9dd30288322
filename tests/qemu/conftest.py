"""Fixtures for tests with real QEMUs: a lab, and the command as a user calls it."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.lab import LabError, qemu
from tests.lab.start import MARK, Lab
from tests.qemu.faults.fault import Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.qemu import QemuBuild
    from tests.qemu.faults.subject import Victim


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/tests/qemu/" in str(item.path):
            item.add_marker(pytest.mark.qemu)


@functools.cache
def build(key: str) -> QemuBuild:
    """A QEMU of the lab; a test that names one which cannot be had is reported as not run, with the reason."""
    try:
        return qemu.obtain(key)
    except LabError as error:
        pytest.skip(f"QEMU {key}: {error}")


@dataclass(frozen=True)
class Result:
    """What a call of the command came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one document on standard output."""
        value: dict[str, Any] = json.loads(self.out)
        return value

    @property
    def documents(self) -> list[dict[str, Any]]:
        """Where there may be several, one after the other."""
        found: list[dict[str, Any]] = []
        rest = self.out.strip()
        while rest:
            value, end = json.JSONDecoder().raw_decode(rest)
            found.append(value)
            rest = rest[end:].lstrip()
        return found

    @property
    def guest(self) -> dict[str, Any]:
        """The only guest of an update's document."""
        (guest,) = self.json["guests"]
        result: dict[str, Any] = guest
        return result

    def __str__(self) -> str:
        return f"exit {self.code}\n{self.out}\n{self.err}"


class Command:
    """Calls cpr with a run directory of its own. `engine`: what its updates ask for, if anything."""

    def __init__(self, lab: Lab, engine: str = "") -> None:
        self.lab = lab
        self.engine = engine
        self.prefix: tuple[str, ...] = ()
        """Comes before the program (setpriv, ...)."""
        self.run_directory = lab.directory / "run"
        self.environment = {**os.environ, **lab.environment, "CPR_RUN_DIR": str(self.run_directory)}

    def start(self, *words: object, **environment: str) -> subprocess.Popen[str]:
        """Start it and do not wait."""
        return subprocess.Popen(
            [*self.prefix, sys.executable, "-m", "cpr", *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**self.environment, **environment},
        )

    def __call__(self, *words: object, timeout: float = 120, **environment: str) -> Result:
        with self.start(*words, **environment) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return Result(process.returncode, out, err)

    def update(self, guest: object, target: QemuBuild, *words: object, **environment: str) -> Result:
        """`cpr update --restart GUEST --qemu TARGET -y --json`; the new process ends with the lab."""
        engine = ("--engine", self.engine) if self.engine else ()
        call = ("update", "--restart", guest, "--qemu", target.binary, "-y", "--json", *engine, *words)
        result = self(*call, timeout=120, **environment)
        if result.out.startswith("{"):
            for entry in result.json.get("guests", []):
                for pid in {entry.get("pid_before"), entry.get("pid_after")} - {None, 0}:
                    try:
                        self.lab.adopt(pid)
                    except ProcessLookupError:
                        continue
        return result


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as it:
        yield it


BOTH_ENGINES = pytest.mark.parametrize(
    "cpr", ["handover", pytest.param("reexec", marks=pytest.mark.full)], indirect=True
)
"""For a module or a test whose promises hold for both."""


@pytest.fixture
def cpr(lab: Lab, request: pytest.FixtureRequest) -> Command:
    return Command(lab, getattr(request, "param", ""))


@pytest.fixture
def builds() -> Callable[[str], QemuBuild]:
    return build


def qemus_of(lab: Lab) -> list[int]:
    """Pids of the QEMUs that a lab has running, helpers of async teardown not counted."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                mine = f"{MARK}={lab.directory}".encode() in file.read().split(b"\0")
            exe = os.readlink(f"/proc/{name}/exe")
            with open(f"/proc/{name}/comm") as file:
                comm = file.read()
        except OSError:
            continue
        if mine and "qemu-system" in exe and not comm.startswith("cleanup/"):
            found.append(int(name))
    return found


POOL = "/proc/sys/vm/nr_hugepages"


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Room for one guest in huge pages, and not a page more: two would not fit."""
    try:
        with open(POOL) as file:
            before = int(file.read())
        with open(POOL, "w") as file:
            file.write(str(before + 64))
        with open(POOL) as file:
            there = int(file.read())
    except OSError as error:
        pytest.skip(f"{POOL}: {error}")
    try:
        if there < before + 64:
            pytest.skip(f"the kernel finds room for {there} huge pages only")
        yield
    finally:
        with open(POOL, "w") as file:
            file.write(str(before))


@pytest.fixture
def victim(lab: Lab, request: pytest.FixtureRequest) -> Victim:
    """A guest that is moved by the module's ENGINE (handover if it says nothing) while things go wrong."""
    from tests.qemu.faults.subject import Victim  # which needs this module

    return Victim.start(lab, engine=getattr(request.module, "ENGINE", "handover"))


@pytest.fixture
def stage(lab: Lab) -> Iterator[Stage]:
    with Stage(lab.directory / "stage") as it:
        yield it
