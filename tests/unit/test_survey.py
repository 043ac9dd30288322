"""The survey against monitors that misbehave, and its pure parts."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cpr import survey, survey_files, survey_host
from cpr.errors import GuestVanished, MonitorError, MonitorHeld
from cpr.linux import proc
from cpr.model import Binary, Candidate, MonitorAddress, ProcessId
from cpr.qemu import cmdline as cl
from tests.unit.fake_monitor import FakeMonitor, answering, saying

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def process() -> Iterator[int]:
    with subprocess.Popen(["sleep", "60"]) as child:
        yield child.pid
        child.kill()


def candidate(pid: int, path: object) -> Candidate:
    return Candidate(
        process=ProcessId(pid, proc.process_start_time(pid)),
        argv=("qemu-system-x86_64",),
        name="fake",
        uuid="",
        binary=Binary(path="/usr/bin/qemu-system-x86_64"),
        monitors=(MonitorAddress(label="m", path=str(path)),),
    )


def names(*commands: str) -> list[dict[str, str]]:
    return [{"name": name} for name in ("query-commands", *commands)]


def threads(pid: int) -> list[dict[str, int]]:
    return [{"cpu-index": 0, "thread-id": pid}]


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"",
        b'{"QMP": ',
        b'{"QMP": 5}\r\n',
        b'{"greetings": true}\r\n',
        b"[]\r\n",
        b"\xff\xfe\x00\r\n",
        b'{"QMP": {"version": "old"}}\r\n',
        b"[" * 100_000 + b"\r\n",
    ],
)
def test_what_does_not_speak_qmp(tmp_path: Path, process: int, said: bytes) -> None:
    with FakeMonitor(tmp_path / "m", saying(said)) as fake, pytest.raises(MonitorError) as raised:
        survey.survey(candidate(process, fake.path))
    assert fake.path in raised.value.message


def test_silence_is_a_held_monitor(tmp_path: Path, process: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpr.qemu.qmp.GREETING_SECONDS", 0.3)
    with FakeMonitor(tmp_path / "m", saying(b"", hang_up=False)) as fake, pytest.raises(MonitorHeld):
        survey.open_monitor(candidate(process, fake.path))


NONSENSE: list[Any] = [None, 5, "text", [], {}, [5], [{}], [None], {"return": []}, [[[]]], True]

QUESTIONS = (
    *("query-commands", "query-cpus-fast", "query-chardev", "query-block", "query-named-block-nodes", "qom-list"),
    *("query-vnc-servers", "query-migrate", "query-status", "query-name", "query-uuid", "query-version", "query-kvm"),
    *("query-iothreads", "query-fdsets", "query-jobs", "query-block-jobs", "query-migrate-capabilities"),
    *("query-migrate-parameters", "query-spice", "qom-list-get"),
)


@pytest.mark.parametrize("question", QUESTIONS)
def test_nonsense_is_a_monitor_error_that_names_the_command(tmp_path: Path, process: int, question: str) -> None:
    """Whatever comes instead of an answer: an error of ours, or a survey, never a traceback."""
    good: dict[str, Any] = {"query-commands": names(*QUESTIONS), "query-cpus-fast": threads(process)}
    good |= {"query-chardev": [], "query-block": [], "query-named-block-nodes": [], "query-vnc-servers": []}
    good |= {"query-migrate": {}, "query-status": {"status": "running"}, "query-name": {}, "query-uuid": {"UUID": ""}}
    good |= {"query-version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}}
    good |= {"query-kvm": {"enabled": False}, "query-iothreads": [], "query-fdsets": [], "query-jobs": []}
    good |= {"query-block-jobs": [], "query-migrate-capabilities": [], "query-migrate-parameters": {}}
    good |= {"query-spice": {"enabled": False}, "qom-list-get": [{"properties": []}]}
    good |= {"qom-list": [{"name": "r", "type": "child<memory-backend-ram>"}] if question == "qom-list-get" else []}
    words = []
    for number, nonsense in enumerate(NONSENSE):
        table = {**good, question: nonsense}
        with FakeMonitor(tmp_path / f"m{number}", answering(table)) as fake:
            try:
                survey.survey(candidate(process, fake.path))
            except MonitorError as error:
                words.append(error.message)
    assert len(words) >= 3
    assert all(question in w or "vCPU" in w or "qom-get" in w for w in words)


@pytest.mark.parametrize("question", ["query-commands", "query-chardev", "query-block"])
def test_a_reply_that_is_cut(tmp_path: Path, process: int, question: str) -> None:
    table = {"query-commands": names("query-chardev", "query-block"), "query-chardev": [], "query-block": []}
    with FakeMonitor(tmp_path / "m", answering(table, cut=question)) as fake, pytest.raises(MonitorError):
        survey.survey(candidate(process, fake.path))


def test_another_process_answers(tmp_path: Path, process: int) -> None:
    table = {"query-commands": names("query-cpus-fast"), "query-cpus-fast": threads(os.getpid())}
    with FakeMonitor(tmp_path / "m", answering(table)) as fake, pytest.raises(MonitorError, match="another QEMU"):
        survey.survey(candidate(process, fake.path))


def test_the_pid_belongs_to_another_process(tmp_path: Path, process: int) -> None:
    table = {"query-commands": names("query-cpus-fast"), "query-cpus-fast": threads(process)}
    with FakeMonitor(tmp_path / "m", answering(table)) as fake:
        found = candidate(process, fake.path)
        stale = replace(found, process=ProcessId(process, 1))
        with pytest.raises(GuestVanished):
            survey.survey(stale)


def test_every_monitor_that_was_tried_is_named(tmp_path: Path, process: int) -> None:
    found = candidate(process, tmp_path / "one")
    two = MonitorAddress(label="b", path=str(tmp_path / "two"))
    both = replace(found, monitors=(*found.monitors, two))
    with pytest.raises(MonitorError) as raised:
        survey.open_monitor(both)
    assert str(tmp_path / "one") in raised.value.message
    assert str(tmp_path / "two") in raised.value.message


def test_parse_migrate() -> None:
    assert survey.parse_migrate({}) == ("", ())
    assert survey.parse_migrate({"status": "failed", "blocked-reasons": ["9p"]}) == ("failed", ("9p",))


# -- files


def gone(tmp_path: Path, *words: str) -> tuple[str, ...]:
    command = cl.CommandLine.parse(["qemu-system-x86_64", *words])
    return survey_files.gone_files(command, os.getpid(), str(tmp_path))


def test_files_that_are_gone(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    assert gone(tmp_path, "-kernel", "there", "-initrd", "away") == ("away",)
    assert gone(tmp_path, "-drive", f"file={tmp_path}/there,if=none", "-cdrom", "file:/no/cd") == ("/no/cd",)
    assert gone(tmp_path, "-blockdev", "driver=raw,node-name=a,file.driver=file,file.filename=/no/img") == ("/no/img",)
    assert gone(tmp_path, "-object", "secret,id=s,file=/no/key") == ("/no/key",)
    assert gone(tmp_path, "-object", '{"qom-type":"secret","id":"s","file":"/no/key"}') == ("/no/key",)
    assert gone(tmp_path, "-fw_cfg", "name=opt/a,file=/no/a", "-acpitable", "file=there:/no/b") == ("/no/a", "/no/b")
    assert gone(tmp_path, "-device", "virtio-net-pci,romfile=/no/rom") == ("/no/rom",)


def test_files_that_are_not_looked_for(tmp_path: Path) -> None:
    """In QEMU's data directory, remote, by descriptor, or made at the start."""
    assert gone(tmp_path, "-bios", "bios.bin", "-device", "virtio-net-pci,romfile=efi.rom") == ()
    assert gone(tmp_path, "-drive", "file=nbd://host/x,if=none", "-drive", "file=/dev/fdset/1,if=none") == ()
    assert gone(tmp_path, "-drive", "file=fat:rw:dir,if=none", "-pidfile", "/no/pid", "-D", "/no/log") == ()
    assert gone(tmp_path, "-object", "memory-backend-file,id=r,size=1M,mem-path=/no/ram") == ()


@pytest.mark.parametrize(
    ("argv", "noted", "believed"),
    [
        (["-boot", "menu=on"], '["-boot", "menu=on"]', ("-boot", "menu=on")),
        (["-boot", "menu=on", "-S", "-incoming", "defer"], '["-boot", "menu=on"]', ("-boot", "menu=on")),
        (["-boot", "menu=on", "-m", "1"], '["-boot", "menu=on"]', ()),
        (["-boot", "menu=off"], '["-boot", "menu=on"]', ()),
        (["-boot"], '"-boot"', ()),
        (["-boot"], "[5]", ()),
        (["-boot"], "{", ()),
        (["-boot"], "[]", ()),
        ([], '["-boot"]', ()),
    ],
)
def test_added_options_are_believed_at_the_end_only(argv: list[str], noted: str, believed: tuple[str, ...]) -> None:
    assert survey_files.added_options(["qemu", *argv], {"CPR_QEMU_OPTIONS": noted}) == believed


def test_pid_file() -> None:
    command = cl.CommandLine.parse(["qemu", "-pidfile", "/run/a.pid"])
    assert survey_files.pidfile(command, {"CPR_PIDFILE": "/run/b.pid"}) == "/run/a.pid"
    assert survey_files.pidfile(cl.CommandLine("qemu"), {"CPR_PIDFILE": "/run/b.pid"}) == "/run/b.pid"
    assert survey_files.pidfile(None, {}) == ""


def test_changed_since(tmp_path: Path) -> None:
    path = tmp_path / "conf"
    path.write_text("")
    start_time = proc.process_start_time(os.getpid())
    os.utime(path, (0, 0))
    assert survey_files.changed_since(os.getpid(), start_time, [(str(path), "")]) == ()
    os.utime(path, (time.time(), time.time() + 60))
    assert survey_files.changed_since(os.getpid(), start_time, [(str(path), ""), ("/no/conf", "")]) == (str(path),)


# -- host


def test_survey_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPR_RUN_DIR", str(tmp_path / "not" / "yet"))
    host = survey_host.survey_host()
    assert host.boot_id == proc.boot_id()
    assert host.uid == os.geteuid()
    assert host.run_directory == str(tmp_path / "not" / "yet")
    assert host.run_directory_free > 0
    assert host.memory_available > 1 << 20
    assert host.architecture == os.uname().machine
    assert "RLIMIT_NOFILE" in host.limits
    assert ("CAP_SYS_PTRACE" in host.capabilities) is (os.geteuid() == 0) or host.capabilities
    json.dumps(host.limits)


def test_parse_meminfo() -> None:
    assert survey_host.parse_meminfo("MemTotal: 5 kB\nMemAvailable:   24313120 kB\n") == 24313120 * 1024
    assert survey_host.parse_meminfo("") == 0
