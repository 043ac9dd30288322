"""What a file must be to be asked, and what its answers are made of; with fake programs where no QEMU would do it."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING, Any

import pytest

from cpr.errors import BinaryUnusable
from cpr.linux import elf, proc
from cpr.qemu import features

if TYPE_CHECKING:
    from pathlib import Path


def unusable(path: object) -> str:
    before = set(proc.children(os.getpid()))
    with pytest.raises(BinaryUnusable) as raised:
        features.ask(str(path))
    assert set(proc.children(os.getpid())) <= before
    return raised.value.reason


def program(path: Path, content: bytes, mode: int = 0o755) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_what_is_no_program(tmp_path: Path) -> None:
    assert unusable(tmp_path / "missing") == "no such file"
    assert unusable(tmp_path) == "is a directory"
    assert unusable("/dev/null") == "is not a file"
    assert unusable(program(tmp_path / "a", b"\x7fELF", 0o644)) == "is not executable"
    assert "script" in unusable(program(tmp_path / "b", b"#!/bin/sh\nexec qemu-system-x86_64\n"))
    assert "text file" in unusable(program(tmp_path / "c", b"hello\n"))
    assert "empty" in unusable(program(tmp_path / "d", b""))
    assert "cut short" in unusable(program(tmp_path / "e", b"\x7fELF\x02\x01\x01"))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert unusable(tmp_path / "link") == "no such file"
    os.mkfifo(tmp_path / "fifo", 0o755)
    assert unusable(tmp_path / "fifo") == "is not a file"


def test_another_architecture(tmp_path: Path) -> None:
    real = elf_of_this_host()
    other = bytearray(real)
    other[18:20] = (183 if elf.host_machine() != 183 else 62).to_bytes(2, "little")
    assert "which this host does not run" in unusable(program(tmp_path / "qemu", bytes(other)))


def elf_of_this_host() -> bytes:
    with open(os.path.realpath(sys.executable), "rb") as file:
        return file.read()


@pytest.mark.parametrize("name", ["true", "false", "ls", "cat", "sleep"])
def test_programs_that_are_no_qemu(name: str) -> None:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} here")
    reason = unusable(path)
    assert "when started" in reason or "misbehaves" in reason


def test_a_program_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This interpreter, with something to sleep on in place of QEMU's options."""
    path = os.path.realpath(sys.executable)
    startup = tmp_path / "sitecustomize.py"
    startup.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = set(proc.children(os.getpid()))
    with pytest.raises(BinaryUnusable) as raised, features.started(path, timeout=0.5):
        pytest.fail("it should not have answered")
    assert "does not answer" in raised.value.reason
    assert set(proc.children(os.getpid())) <= before


@pytest.mark.parametrize(
    "script",
    [
        "s.sendall(b'garbage\\n')",
        "s.sendall(b'{\"QMP\": {\"version\": {}, \"capabilities\": []}}\\n')",
        "import os; os.write(2, b'something is wrong\\n'); os.kill(os.getpid(), 11)",
        "import os; os.write(2, b'something is wrong\\n'); os._exit(3)",
    ],
)
def test_a_program_that_talks_nonsense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import re, socket, sys\n"
        "number = re.search(r'fd=(\\d+)', ' '.join(sys.orig_argv))\n"
        "s = socket.socket(fileno=int(number[1]))\n"
        f"{script}\n"
        "import os; os._exit(0)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reason = unusable(os.path.realpath(sys.executable))
    if "something" in script:
        assert "something is wrong" in reason
        assert "signal 11" in reason or "status 3" in reason


def test_last_words() -> None:
    number = os.memfd_create("said")
    try:
        os.write(number, b"qemu: warning: old\nqemu: cannot do it\n\n")
        assert features.last_words(number) == "qemu: cannot do it"
        os.ftruncate(number, 0)
        os.lseek(number, 0, os.SEEK_SET)
        os.write(number, b"qemu: warning: only this\n")
        assert features.last_words(number) == "qemu: warning: only this"
        os.write(number, b"x" * 100_000)
        assert len(features.last_words(number)) <= 600
    finally:
        os.close(number)


def test_the_environment_is_marked_and_nothing_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPR_RUN", "x/1")
    monkeypatch.setenv("CPR_RUN_DIR", "/x")
    found = features.environment()
    assert {k: v for k, v in found.items() if k.startswith("CPR_RUN")} == {"CPR_RUN_PENDING": "1"}


def test_parse_machines() -> None:
    reply = [{"name": "pc-q35-7.2", "alias": "q35"}, {"name": "none"}, {"name": "microvm"}]
    assert features.parse_machines(reply) == (frozenset({"pc-q35-7.2", "microvm"}), {"q35": "pc-q35-7.2"})


SCHEMA: list[dict[str, Any]] = [
    {"name": "migrate-set-capabilities", "meta-type": "command", "arg-type": "1", "ret-type": "0"},
    {"name": "1", "meta-type": "object", "members": [{"name": "capabilities", "type": "[2]"}]},
    {"name": "[2]", "meta-type": "array", "element-type": "2"},
    {"name": "2", "meta-type": "object", "members": [{"name": "capability", "type": "3"}]},
    {"name": "3", "meta-type": "enum", "values": ["xbzrle", "x-ignore-shared"], "members": [{"name": "xbzrle"}]},
    {"name": "migrate-set-parameters", "meta-type": "command", "arg-type": "4", "ret-type": "0"},
    {"name": "4", "meta-type": "object", "members": [{"name": "mode", "type": "5"}]},
    {"name": "5", "meta-type": "enum", "members": [{"name": "normal"}, {"name": "cpr-transfer"}]},
]


def test_enumerations_of_the_schema() -> None:
    assert features.capabilities(SCHEMA) == {"xbzrle", "x-ignore-shared"}
    assert features.migrate_modes(SCHEMA) == {"normal", "cpr-transfer"}
    without_mode = [{**e, "members": []} if e["name"] == "4" else e for e in SCHEMA]
    assert features.migrate_modes(without_mode) == frozenset()
    assert features.capabilities([]) == frozenset()
