"""The commands over a fake world: what is printed where, the documents, and the exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cpr.cli import main
from cpr.cli.output import use_color
from cpr.errors import BinaryUnusable, Exit, MonitorHeld, PrivilegeError
from cpr.model import Backing, RamDirectory, Storage
from tests.unit import values
from tests.unit.fake_world import FakeHost

if TYPE_CHECKING:
    from pathlib import Path

VOLATILE = (replace(values.ram(), shared=False, backing=Backing.ANONYMOUS),)
UP_TO_DATE = replace(values.binary("11.1.3"), inode=200)


class Cpr:
    """Calls of the command: the exit code, and what was printed."""

    def __init__(self, host: FakeHost, capsys: pytest.CaptureFixture[str]) -> None:
        self.host = host
        self.capsys = capsys
        self.out = ""
        self.err = ""

    def __call__(self, *arguments: str) -> int:
        code = main.run(list(arguments))
        self.out, self.err = self.capsys.readouterr()
        return code

    def json(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        """Exactly one document on standard output, whatever happened."""
        code = self(*arguments, "--json")
        document = json.loads(self.out)
        assert document["format"] == f"cpr.{arguments[0]}/1"
        return code, document


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHost:
    made = FakeHost()
    for module in ("examine", "modes", "rebootable", "update"):
        monkeypatch.setattr(f"cpr.app.{module}.real_world", made.world)
    monkeypatch.setenv("CPR_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("CPR_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr("cpr.config.FILES", ())
    use_color("auto")
    return made


@pytest.fixture
def cpr(host: FakeHost, capsys: pytest.CaptureFixture[str]) -> Cpr:
    return Cpr(host, capsys)


def test_list(cpr: Cpr) -> None:
    cpr.host.add("web1")
    cpr.host.add("db", ram=VOLATILE)
    cpr.host.guests["far"] = PrivilegeError("CAP_SYS_PTRACE is missing", ability="CAP_SYS_PTRACE")
    assert cpr("list") == Exit.OK
    head, first, second, third = cpr.out.splitlines()
    assert head.split() == ["PID", "NAME", "RUNNING", "INSTALLED", "OUTDATED", "RAM", "ENGINE"]
    assert first.split() == ["4242", "web1", "7.2.22", "11.1.3", "yes", "1", "GiB", "memfd", "handover"]
    assert "ram-volatile" in second
    assert "CAP_SYS_PTRACE" in third
    assert len({line.index("7.2.22") for line in (first, second, third)}) == 1


def test_list_of_nothing(cpr: Cpr) -> None:
    assert cpr("list") == Exit.OK
    assert "no guests" in cpr.out
    assert cpr.json("list") == (0, {"format": "cpr.list/1", "guests": []})


def test_list_document(cpr: Cpr) -> None:
    cpr.host.add("web1")
    cpr.host.add("db", ram=VOLATILE)
    _, document = cpr.json("list")
    first, second = document["guests"]
    assert (first["name"], first["pid"], first["outdated"]) == ("web1", 4242, True)
    assert first["engines"] == {"handover": "ok"}
    assert first["ram"] == [{"id": "ram0", "size": 1 << 30, "backing": "memfd", "shared": True}]
    assert second["engines"]["handover"][0]["check"] == "ram-volatile"
    assert set(second["engines"]["handover"][0]) == {"check", "severity", "subject", "message", "hint", "engines"}


def test_show_ends_with_the_next_command(cpr: Cpr) -> None:
    cpr.host.add("web1")
    assert cpr("show", "web1") == Exit.OK
    assert cpr.out.splitlines()[-1] == "next: cpr update --dry-run web1, then cpr update web1"
    assert "ram0" in cpr.out
    cpr.host.add("db", ram=VOLATILE)
    cpr("show", "db")
    assert "cpr check db" in cpr.out.splitlines()[-1]
    assert "way out:" in cpr.out


def test_show_document_has_the_facts(cpr: Cpr) -> None:
    cpr.host.add("web1")
    code, document = cpr.json("show", "web1")
    assert code == Exit.OK
    assert document["guest"]["facts"]["machine"] == "pc-q35-7.2"


def test_show_of_what_cannot_be_read(cpr: Cpr) -> None:
    cpr.host.guests["far"] = PrivilegeError("CAP_SYS_PTRACE to read pid 1", ability="CAP_SYS_PTRACE", hint="be root")
    assert cpr("show", "far") == Exit.PRIVILEGES
    assert "CAP_SYS_PTRACE" in cpr.err
    assert "hint: be root" in cpr.err


def test_check(cpr: Cpr) -> None:
    cpr.host.add("web1")
    cpr.host.add("db", ram=VOLATILE, jobs=("backup j0",))
    assert cpr("check", "web1") == Exit.OK
    assert "can be updated with handover" in cpr.out
    assert cpr("check", "--all") == Exit.BLOCKED
    assert "[ram-volatile]" in cpr.out
    assert "[busy-job]" in cpr.out
    code, document = cpr.json("check")
    assert (code, document["status"], document["exit_code"]) == (3, "blocked", 3)
    assert [f["check"] for f in document["guests"][1]["findings"]] == ["ram-volatile", "busy-job"]


ON_DISK = Storage(kind=Backing.DISK_FILE, path="/vm/ram", filesystem="ext4", disks=("sda",))
SAVABLE = (replace(values.ram(), backing=Backing.DISK_FILE, storage=ON_DISK),)


def test_check_of_a_jump(cpr: Cpr) -> None:
    cpr.host.add("web1", ram=SAVABLE)
    assert cpr("check", "--kexec") == Exit.OK
    assert "jump into 7.2" in cpr.out
    assert "web1 (pid 4242), QEMU 7.2.22 -> 11.1.3: can be saved, and restored after the boot, 1 warning(s)" in cpr.out
    assert "this host can go on" in cpr.out
    assert cpr("check", "--kexec", "--exit-code") == Exit.WOULD_UPDATE
    cpr.host.add("db", ram=VOLATILE)
    assert cpr("check", "--kexec") == Exit.BLOCKED
    assert "cannot be saved, 1 blocker(s)" in cpr.out
    assert "[ram-volatile-over-kexec] ram0" in cpr.out
    assert cpr.out.rstrip().endswith("nothing is saved")
    assert cpr("check", "web1", "--kexec") == Exit.BLOCKED
    assert "[guest-not-saved] db (pid 4243)" in cpr.out
    assert cpr("check", "web1", "--kexec", "--abandon", "db") == Exit.OK
    assert "db: will be lost, as asked" in cpr.out


def test_the_document_of_a_jump(cpr: Cpr) -> None:
    cpr.host.add("web1", ram=SAVABLE)
    cpr.host.add("db", ram=VOLATILE)
    code, document = cpr.json("check", "--kexec", "--abandon", "db", "--append", "ro", "--reuse-cmdline")
    assert (code, document["status"], document["mode"], document["abandoned"]) == (0, "ok", "reboot", ["db"])
    assert document["kernel"]["release"] == "7.2"
    assert [g["name"] for g in document["guests"]] == ["web1"]
    assert document["findings"] == []
    assert (cpr.host.kernels[-1]["append"], cpr.host.kernels[-1]["reuse"]) == ("ro", True)
    code, document = cpr.json("check", "web1", "--kexec")
    assert (code, document["status"], document["exit_code"]) == (3, "blocked", 3)
    assert [f["check"] for f in document["findings"]] == ["guest-not-saved"]


@pytest.mark.parametrize(
    "words",
    [
        ("--kernel", "/k"),
        ("--append", "ro"),
        ("--reuse-cmdline",),
        ("--abandon", "x"),
        ("--save-ram", "/srv/ram"),
        ("--kexec", "--engine", "handover"),
        ("--kexec", "--initrd", "/i"),
        ("--kexec", "--ignore", "no-such-check"),
    ],
)
def test_what_cannot_be_meant_of_a_jump(cpr: Cpr, words: tuple[str, ...]) -> None:
    cpr.host.add("web1", ram=VOLATILE)
    assert cpr("check", *words) == Exit.USAGE
    assert cpr.err


def test_a_jump_that_copies_ram(cpr: Cpr) -> None:
    cpr.host.add("db", ram=VOLATILE)
    assert cpr("check", "--kexec") == Exit.BLOCKED
    assert "--save-ram DIR" in cpr.out
    cpr.host.kernel = replace(cpr.host.kernel, save_ram=RamDirectory(path="/srv/ram", free=4 << 30, rate=1e9))
    code, document = cpr.json("check", "--kexec", "--save-ram", "/srv/../srv/ram")
    assert (code, [f["check"] for f in document["guests"][0]["findings"]]) == (0, ["save-ram"])
    assert [f["check"] for f in document["findings"]] == ["save-ram-time"]
    assert cpr.host.kernels[-1]["save_ram"] == "/srv/ram"
    assert cpr("check", "--kexec", "--save-ram", "/srv/ram") == Exit.OK
    assert "no guest runs meanwhile" in cpr.out
    assert cpr("save", "db", "/srv/db", "--mode", "restart", "--save-ram", "/srv/ram") == Exit.USAGE


def test_check_with_exit_code(cpr: Cpr) -> None:
    cpr.host.add("new", binary=UP_TO_DATE)
    assert cpr("check", "--exit-code") == Exit.OK
    cpr.host.add("old")
    assert cpr("check", "--exit-code") == Exit.WOULD_UPDATE


def test_check_with_a_held_monitor(cpr: Cpr) -> None:
    cpr.host.guests["a"] = MonitorHeld("/run/a.qmp", "no greeting within 3 s")
    assert cpr("check", "a") == Exit.BLOCKED
    assert "[monitor-held]" in cpr.out


def test_info(cpr: Cpr) -> None:
    cpr.host.add("web1")
    assert cpr("info", "web1") == Exit.OK
    assert "restart: handover" in cpr.out
    assert "reboot: no (ram0: a memfd is RAM of this kernel" in cpr.out
    assert "[ram-volatile-over-kexec] ram0" in cpr.out
    _, document = cpr.json("info", "web1")
    assert (document["guest"]["restart"], document["guest"]["reboot"]) == (["handover"], False)
    assert [f["check"] for f in document["guest"]["reboot_blockers"]] == ["ram-volatile-over-kexec"]
    assert [(r["id"], r["kept"]) for r in document["guest"]["ram"]] == [("ram0", False)]
    cpr.host.add("disk", ram=SAVABLE)
    assert cpr("info", "disk") == Exit.OK
    assert "reboot: yes (ram0: a file on a disk (sda))" in cpr.out


def test_update(cpr: Cpr) -> None:
    cpr.host.add("web1")
    assert cpr("update", "-y", "web1") == Exit.OK
    assert "web1: updated by handover, QEMU 7.2.22 -> 11.1.3, pid 4242 -> 5242, paused 4.1 ms" in cpr.out
    assert "web1: continue (no way back from here)" in cpr.err
    assert "\x1b" not in cpr.out + cpr.err


def test_update_document(cpr: Cpr) -> None:
    cpr.host.add("web1")
    cpr.host.add("db", ram=VOLATILE)
    code, document = cpr.json("update", "-y", "--restart", "--all")
    assert (code, document["status"], document["mode"]) == (3, "blocked", "restart")
    assert document["run"] == "20261120T101500-3f2a"
    done, blocked = document["guests"]
    assert (done["status"], done["pid_before"], done["pid_after"], done["error"]) == ("updated", 4242, 5242, None)
    assert done["binary_before"]["version"] == "7.2.22"
    assert done["blackout_seconds"] == 0.0041
    assert (blocked["status"], blocked["findings"][0]["check"]) == ("blocked", "ram-volatile")
    assert cpr.json("update", "-y", "--blocked", "skip", "web1", "db")[1]["guests"][1]["status"] == "skipped"


@pytest.mark.parametrize(
    ("ending", "word"),
    [(Exit.ROLLED_BACK, "rolled_back"), (Exit.NEEDS_ATTENTION, "needs_attention"), (Exit.DIFFERS, "differs")],
)
def test_update_that_ends_otherwise(cpr: Cpr, ending: Exit, word: str) -> None:
    cpr.host.add("web1")
    cpr.host.endings["web1"] = ending
    code, document = cpr.json("update", "-y", "web1")
    assert (code, document["status"]) == (int(ending), word)
    assert cpr("update", "-y", "web1") == ending
    assert "  now: the guest" in cpr.out


def test_update_not_on_a_terminal_asks_nobody(cpr: Cpr) -> None:
    cpr.host.add("web1")
    assert cpr("update", "web1") == Exit.USAGE
    assert "-y" in cpr.err
    assert (cpr.host.asked, cpr.host.keepers) == ([], [])


class Terminal:
    """Standard input of a person who types `answer`."""

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def isatty(self) -> bool:
        return True

    def readline(self, *_: Any) -> str:
        return self.answer


@pytest.mark.parametrize(("answer", "code", "begun"), [("y\n", Exit.OK, 1), ("\n", 130, 0), ("n\n", 130, 0)])
def test_update_on_a_terminal_shows_the_plan_and_asks_once(
    cpr: Cpr, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, begun: int
) -> None:
    cpr.host.add("web1")
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    assert cpr("update") == code
    assert len(cpr.host.keepers) == begun
    assert "commit: no way back from here" in cpr.err
    assert "Update 1 guest(s)? [y/N]" in cpr.err


def test_dry_run(cpr: Cpr) -> None:
    cpr.host.add("web1")
    assert cpr("update", "-n", "web1") == Exit.OK
    marked = [line for line in cpr.out.splitlines() if "<- commit" in line]
    assert len(marked) == 1
    assert "continue" in marked[0]
    assert cpr.host.keepers == []
    code, document = cpr.json("update", "--dry-run", "--exit-code", "web1")
    assert (code, document["status"], document["exit_code"], document["run"]) == (9, "ok", 9, None)
    assert [s["commit"] for s in document["guests"][0]["plan"]["steps"]] == [False, True, False]
    cpr.host.add("db", ram=VOLATILE)
    assert cpr("update", "-n", "web1", "db") == Exit.BLOCKED


def test_a_dry_run_of_nothing_to_do(cpr: Cpr) -> None:
    cpr.host.add("new", binary=UP_TO_DATE)
    assert cpr("update", "-n", "--exit-code") == Exit.OK
    assert "nothing to do" in cpr.out


def test_events_to_a_file_and_a_descriptor(cpr: Cpr, tmp_path: Path) -> None:
    cpr.host.add("web1")
    path = tmp_path / "events"
    assert cpr("update", "-y", "--events", str(path), "web1") == Exit.OK
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["step"] * 6 + ["blackout", "outcome"]
    assert {line["guest"] for line in lines} == {"web1"}
    assert lines[0]["time"].endswith("+00:00")
    reading, writing = os.pipe()
    assert cpr("update", "-y", "--events", str(writing), "web1") == Exit.OK
    os.close(writing)
    with os.fdopen(reading) as file:
        assert len(file.readlines()) == 8
    assert cpr("update", "-y", "--events", "/nonexistent/x", "web1") == Exit.USAGE


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_undo(cpr: Cpr, number: signal.Signals, code: int) -> None:
    cpr.host.add("web1")
    cpr.host.waiting = True

    def send() -> None:
        cpr.host.started.wait(5)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    before = signal.getsignal(number)
    thread.start()
    assert cpr("update", "-y", "web1") == code
    thread.join()
    assert cpr.host.keepers[0].code == code
    assert "undoing" in cpr.err
    assert signal.getsignal(number) is before


def test_a_signal_before_anything_was_done(cpr: Cpr) -> None:
    cpr.host.add("web1")
    survey = cpr.host.survey

    def interrupted(candidate: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return survey(candidate)

    cpr.host.survey = interrupted  # type: ignore[method-assign]
    code, document = cpr.json("update", "-y", "web1")
    assert (code, document["error"]["where"]) == (143, "the guest was not touched")
    assert cpr.host.keepers == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["show", "nobody"], 5, "no guest 'nobody'"),
        (["update", "-y", "--engine", "copy", "--all"], 2, "not in this release"),
        (["update", "-y", "--engine", "x", "--all"], 2, "no such engine"),
        (["update", "-y", "--ignore", "x", "web1"], 2, "no such check"),
        (["update", "-y", "--ignore", "ram-volatile", "web1"], 2, "cannot be ignored"),
        (["update", "-y", "--all", "web1"], 2, "exclude each other"),
        (["update", "-y"], 2, "nobody would be asked which"),
        (["update", "-y", "--jobs", "0", "--all"], 2, "greater than zero"),
        (["update", "-y", "--blocked", "perhaps", "--all"], 2, "fail or skip"),
        (["update", "--frobnicate"], 2, "No such option"),
        (["show"], 2, "Missing argument"),
        (["update", "--kexec"], 2, "nobody can be asked"),
        (["log", "nothing"], 5, "no run 'nothing'"),
    ],
)
def test_errors(cpr: Cpr, arguments: list[str], code: int, words: str) -> None:
    cpr.host.add("web1")
    assert cpr(*arguments) == code
    assert words in cpr.err
    assert cpr.out == ""
    assert "Traceback" not in cpr.err
    got, document = cpr.json(*arguments)
    assert (got, document["status"], document["exit_code"]) == (code, "error", code)
    assert words in document["error"]["message"]


@pytest.mark.parametrize("command", ["attach", "stop", "report", "frobnicate"])
def test_what_comes_later_is_not_offered(cpr: Cpr, command: str) -> None:
    assert cpr(command) == Exit.USAGE
    assert f"No such command '{command}'" in cpr.err


def test_an_unusable_binary(cpr: Cpr) -> None:
    cpr.host.add("web1")
    cpr.host.target = BinaryUnusable("/opt/qemu", "is no program")
    code, document = cpr.json("update", "-y", "--qemu", "/opt/qemu", "web1")
    assert (code, document["guests"][0]["error"]) == (5, "/opt/qemu: is no program")


def test_a_bug_has_no_traceback_unless_asked_for(cpr: Cpr, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CPR_DEBUG", raising=False)
    monkeypatch.setattr("cpr.app.examine.real_world", lambda: 1 / 0)
    assert cpr("list") == Exit.FAILED
    assert "a bug in cpr: ZeroDivisionError" in cpr.err
    assert "Traceback" not in cpr.err
    monkeypatch.setenv("CPR_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main.run(["list"])


def test_help_and_version(cpr: Cpr) -> None:
    for arguments in (["--help"], ["-h"], ["update", "--help"], ["run", "--help"]):
        assert cpr(*arguments) == Exit.OK
        assert "Usage: cpr" in cpr.out
    assert cpr("--version") == Exit.OK
    assert cpr.out.startswith("cpr ")
    assert cpr() == Exit.USAGE
    assert "Usage: cpr" in cpr.err + cpr.out


def test_color(cpr: Cpr, monkeypatch: pytest.MonkeyPatch) -> None:
    cpr.host.add("db", ram=VOLATILE)
    assert "\x1b" in (cpr("--color", "always", "check"), cpr.out)[1]
    assert "\x1b" not in (cpr("--color", "never", "check"), cpr.out)[1]
    assert "\x1b" in (cpr("check", "--color=always"), cpr.out)[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b" in (cpr("--color", "auto", "check"), cpr.out)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in (cpr("--color", "auto", "check"), cpr.out)[1]
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in (cpr("--color", "auto", "check"), cpr.out)[1]
    assert cpr("--color", "sometimes", "list") == Exit.USAGE
