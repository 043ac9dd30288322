"""Bad input: one clear error, the right exit code, and guests that were not touched."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cpr.errors import Exit
from cpr.linux import proc
from tests.qemu.conftest import build, qemus_of
from tests.qemu.fake_monitors import TALKS, FakeMonitor
from tests.qemu.moving import backend, untouched

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.counting import CountingLog
    from tests.lab.start import Guest, Lab
    from tests.qemu.conftest import Command, Result

KEY = "11.1.a"
full = pytest.mark.full


@pytest.fixture
def guest(lab: Lab) -> Guest[CountingLog]:
    """One that could be updated."""
    return lab.counting(build(KEY), memory="32M", backend=backend(build(KEY), lab))


def error_of(result: Result) -> str:
    """The one error of a call that failed as a whole: the same words on standard error and in the document."""
    assert result.json["status"] == "error", result
    assert result.json["exit_code"] == result.code, result
    message: str = result.json["error"]["message"]
    lines = result.err.splitlines()
    assert [line for line in lines if line.startswith("cpr:")] == [f"cpr: {message}"], result
    assert "Traceback" not in result.err
    return message


# -- which guest


WANTED = ["no-such-guest", "4194305", "99999999999999999999", "-", " ", "", "../guest"]


@pytest.mark.parametrize("wanted", [pytest.param(w, marks=() if w == "no-such-guest" else full) for w in WANTED])
def test_no_such_guest(lab: Lab, cpr: Command, guest: Guest[CountingLog], wanted: str) -> None:
    with untouched(lab, guest):
        result = cpr("update", "--restart", "-y", "--json", "--", wanted)
        assert result.code == Exit.NOT_FOUND, result
        assert repr(wanted) in error_of(result)


@full
def test_several_names_of_which_one_is_nobody(lab: Lab, cpr: Command, guest: Guest[CountingLog]) -> None:
    """Before anything is done to any other."""
    with untouched(lab, guest):
        result = cpr.update(guest.pid, build(KEY), "no-such-guest")
        assert result.code == Exit.NOT_FOUND, result
        assert "no-such-guest" in error_of(result)


def test_ambiguous_name(lab: Lab, cpr: Command) -> None:
    name = f"twin-{os.getpid()}"
    both = []
    for number in (1, 2):
        both.append(
            lab.counting(build(KEY), "-name", name, name=f"g{number}", backend=backend(build(KEY), lab, f"r{number}"))
        )
    with untouched(lab, *both):
        result = cpr.update(name, build(KEY))
        assert result.code == Exit.NOT_FOUND, result
        assert all(str(one.pid) in error_of(result) for one in both)


def test_a_pid_that_is_no_qemu(cpr: Command) -> None:
    result = cpr.update(os.getpid(), build(KEY))
    assert result.code == Exit.NOT_FOUND, result
    assert f"pid {os.getpid()} is not a QEMU" in error_of(result)


# -- its monitor


def start_behind(lab: Lab, path: Path) -> Guest[CountingLog]:
    """A guest whose monitor's socket has been moved from `path`, so that somebody else can take its place."""
    guest = lab.counting(build(KEY), memory="32M", backend=backend(build(KEY), lab))
    assert guest.qmp == path
    guest.qmp = path.rename(path.with_suffix(".real"))
    return guest


@pytest.mark.parametrize(
    "talk", [pytest.param(t, marks=() if t in ("silent", "answers-null") else full) for t in TALKS]
)
def test_a_monitor_that_answers_nonsense(lab: Lab, cpr: Command, talk: str) -> None:
    path = lab.directory / "guest.qmp"
    guest = start_behind(lab, path)
    with untouched(lab, guest), FakeMonitor(path, TALKS[talk]):
        result = cpr.update(guest.pid, build(KEY))
        assert result.code in (Exit.BLOCKED, Exit.FAILED), result
        assert result.guest["where"] == "the guest was not touched"
        assert result.guest["error"]
        assert "Traceback" not in result.err + result.out


@full
def test_nobody_at_the_monitors_path(lab: Lab, cpr: Command) -> None:
    path = lab.directory / "guest.qmp"
    guest = start_behind(lab, path)
    with untouched(lab, guest):
        result = cpr.update(guest.pid, build(KEY))
        assert result.code == Exit.BLOCKED, result
        assert str(path) in result.guest["error"]


@full
def test_the_monitor_of_another_guest(lab: Lab, cpr: Command) -> None:
    """Two guests were given one path: the second took it from the first, and answers for itself."""
    guest = start_behind(lab, lab.directory / "guest.qmp")
    other = lab.counting(build(KEY), name="other", memory="32M", backend=backend(build(KEY), lab, "ram1"))
    (lab.directory / "guest.qmp").symlink_to(other.qmp)
    with untouched(lab, guest, other):
        result = cpr.update(guest.pid, build(KEY))
        assert result.code == Exit.BLOCKED, result
        assert "another QEMU answers here" in result.guest["error"]


@full
def test_no_monitor_at_all(lab: Lab, cpr: Command) -> None:
    words = ["-name", "bare", "-nodefaults", "-display", "none", "-accel", "tcg", "-S", "-monitor", "none"]
    bare = lab.start([*build(KEY).command, *words])
    result = cpr.update(bare.pid, build(KEY))
    assert result.code == Exit.BLOCKED, result
    assert [f["check"] for f in result.guest["findings"]] == ["no-monitor"]
    assert qemus_of(lab) == [bare.pid]


# -- the new QEMU


def missing(path: Path) -> None:
    assert not path.exists()


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def not_executable(path: Path) -> None:
    shutil.copy("/bin/true", path)
    path.chmod(0o644)


def text(path: Path) -> None:
    path.write_text("this is no program\n")
    path.chmod(0o755)


def script(path: Path) -> None:
    path.write_text(f'#!/bin/sh\nexec {build(KEY).binary} "$@"\n')
    path.chmod(0o755)


def empty(path: Path) -> None:
    path.touch(0o755)


def cut(path: Path) -> None:
    path.write_bytes(build(KEY).binary.read_bytes()[:100])
    path.chmod(0o755)


def foreign(path: Path) -> None:
    """A program of another architecture, by its ELF header (e_machine at 18: EM_AARCH64)."""
    content = bytearray(Path("/bin/true").read_bytes())
    struct.pack_into("<H", content, 18, 183)
    path.write_bytes(content)
    path.chmod(0o755)


def crashing(path: Path) -> None:
    """A program that is ended by a signal at once: its entry point (e_entry at 24) is nowhere."""
    content = bytearray(Path("/bin/true").read_bytes())
    struct.pack_into("<Q", content, 24, 0x7FFF00000000)
    path.write_bytes(content)
    path.chmod(0o755)


def failing(path: Path) -> None:
    shutil.copy("/bin/false", path)


def no_qemu(path: Path) -> None:
    shutil.copy("/bin/true", path)


def directory(path: Path) -> None:
    path.mkdir()


BINARIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (missing, "no such file"),
    "dangling": (dangling, "no such file"),
    "not-executable": (not_executable, "is not executable"),
    "text": (text, "is "),
    "script": (script, "is "),
    "empty": (empty, "is "),
    "cut": (cut, ""),
    "foreign": (foreign, "is a program for"),
    "crashing": (crashing, "is killed by signal"),
    "failing": (failing, "ends with status 1"),
    "no-qemu": (no_qemu, "ends with status 0"),
    "directory": (directory, "is a directory"),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in ("missing", "foreign", "crashing") else full) for k in BINARIES]
)
def test_a_new_qemu_that_is_none(lab: Lab, cpr: Command, guest: Guest[CountingLog], kind: str) -> None:
    make, words = BINARIES[kind]
    path = lab.directory / "qemu-system-x86_64"
    make(path)
    with untouched(lab, guest):
        result = cpr("update", "--restart", guest.pid, "--qemu", path, "-y", "--json")
        assert result.code == Exit.NOT_FOUND, result
        assert f"{path}: {words}" in result.guest["error"], result
        assert result.guest["where"] == "the guest was not touched"


@full
def test_a_new_qemu_that_is_not_in_path(lab: Lab, cpr: Command, guest: Guest[CountingLog]) -> None:
    with untouched(lab, guest):
        result = cpr("update", guest.pid, "--qemu", "no-such-qemu", "-y", "--json")
        assert result.code == Exit.NOT_FOUND, result
        assert "no-such-qemu" in result.guest["error"]


# -- journals

JOURNALS = {
    "empty": b"",
    "zeroes": b"\0" * 4096,
    "nonsense": b"this is no journal\n",
    "cut": b'{"format": "cpr.journal/1", "run": "r", "boot',
    "of-another-format": b'{"format": "cpr.journal/99"}\n',
    "a-list": b"[1, 2]\n",
    "no-guest": b'{"format": "cpr.journal/1", "run": "r", "boot_id": "b", "steps": []}\n',
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "nonsense" else full) for k in JOURNALS])
def test_a_journal_that_cannot_be_read(lab: Lab, cpr: Command, guest: Guest[CountingLog], kind: str) -> None:
    """Nobody knows what was done to this guest: it is left alone, by recover and by the next update."""
    where = cpr.run_directory / "runs" / "20260101T000000-0000"
    where.mkdir(parents=True)
    path = where / f"{guest.pid}-{proc.process_start_time(guest.pid)}.journal"
    path.write_bytes(JOURNALS[kind])
    with untouched(lab, guest):
        recovered = cpr("recover", "--json")
        assert recovered.code == Exit.NEEDS_ATTENTION, recovered
        assert str(path) in recovered.guest["error"], recovered
        logged = cpr("log", where.name, "--json")
        assert logged.code == Exit.FAILED, logged
        assert str(path) in error_of(logged)
        assert cpr("runs", "--json").code == 0
        result = cpr.update(guest.pid, build(KEY))
        assert result.code == Exit.FAILED, result
        assert str(path) in result.guest["error"], result
        assert path.read_bytes() == JOURNALS[kind]
    path.unlink()
    assert cpr.update(guest.pid, build(KEY)).guest["status"] == "updated"


@full
def test_no_such_run(cpr: Command) -> None:
    for command in ("log", "recover"):
        result = cpr(command, "20260101T000000-0000", "--json")
        assert result.code == Exit.NOT_FOUND, result
        assert "20260101T000000-0000" in error_of(result)


@full
def test_a_run_directory_that_cannot_be_made(lab: Lab, cpr: Command, guest: Guest[CountingLog]) -> None:
    (lab.directory / "file").touch()
    with untouched(lab, guest):
        result = cpr.update(guest.pid, build(KEY), CPR_RUN_DIR=str(lab.directory / "file" / "run"))
        assert result.code == Exit.FAILED, result
        assert str(lab.directory / "file") in result.guest["error"]


# -- how it is called


def test_nobody_to_ask(lab: Lab, cpr: Command, guest: Guest[CountingLog]) -> None:
    """Not on a terminal and without -y: at once, whatever standard input is, and nothing is read from it."""
    with untouched(lab, guest):
        for stdin in (subprocess.DEVNULL, subprocess.PIPE):
            began = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-m", "cpr", "update", "--restart", str(guest.pid), "--json"],
                stdin=stdin if stdin == subprocess.DEVNULL else None,
                input=None if stdin == subprocess.DEVNULL else "y\n",
                capture_output=True,
                text=True,
                env=cpr.environment,
                check=False,
                timeout=20,
            )
            assert done.returncode == Exit.USAGE, done
            assert "not on a terminal" in done.stderr
            assert time.monotonic() - began < 10


@full
@pytest.mark.parametrize(
    "words",
    [
        ["--ignore", "ram-volatile"],
        ["--ignore", "no-such-check"],
        ["--engine", "no-such-engine"],
        ["--timeout", "0"],
        ["--timeout", "soon"],
        ["--max-downtime", "-1"],
        ["--jobs", "0"],
        ["--blocked", "maybe"],
        ["--no-such-option"],
        ["--all"],
        ["--events", "/no/such/directory/file"],
    ],
    ids=" ".join,
)
def test_words_that_cannot_be_meant(lab: Lab, cpr: Command, guest: Guest[CountingLog], words: list[str]) -> None:
    with untouched(lab, guest):
        result = cpr.update(guest.pid, build(KEY), *words)
        assert result.code == Exit.USAGE, result
        assert error_of(result)


def test_dry_run_touches_nothing(lab: Lab, cpr: Command, guest: Guest[CountingLog]) -> None:
    """-n shows the plan, the commit step marked, and exits as the real run would."""
    with untouched(lab, guest):
        result = cpr.update(guest.pid, build("11.1.b"), "-n")
        assert result.code == Exit.OK, result
        assert [s["commit"] for s in result.guest["plan"]["steps"]].count(True) == 1
        assert result.guest["plan"]["engine"] == "handover"
        assert not (cpr.run_directory / "runs").exists(), "no journal"
        shown = cpr("update", "--restart", guest.pid, "--qemu", build("11.1.b").binary, "-n")
        assert shown.code == Exit.OK
        assert "commit" in shown.out
    steps = [s["id"] for s in result.guest["plan"]["steps"]]
    outcome = cpr.update(guest.pid, build("11.1.b"))
    assert outcome.guest["status"] == "updated"
    (logged,) = cpr("log", outcome.json["run"], "--json").json["guests"]
    assert [s["id"] for s in logged["steps"]] == steps, "the plan that is shown is the plan that runs"
