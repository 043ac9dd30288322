"""The command as a process: what a shell sees of it. The guests are real where there are any."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.lab import LabError, qemu
from tests.lab.start import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]


def call(directory: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """One call of cpr with directories of its own, not on a terminal."""
    own = {"CPR_RUN_DIR": str(directory), "CPR_STATE_DIR": str(directory / "state")}
    env = {**os.environ, "PYTHONPATH": str(ROOT), **own, **environment}
    return subprocess.run(
        [sys.executable, "-m", "cpr", *words],
        capture_output=True,
        text=True,
        env=env,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("update",), 2, "-y"),
        (("update", "--json"), 2, "-y"),
        (("update", "-n", "--engine", "cpr-exec"), 2, "not in this release"),
        (("show", "no such guest"), 5, "no guest"),
        (("log", "no-such-run"), 5, "no run"),
        (("recover", "no-such-run"), 5, "no run"),
        (("run",), 2, "Missing argument"),
        (("run", "--", "no-such-qemu"), 5, "no such program"),
        (("run", "--", "/bin/true"), 5, "/bin/true"),
        (("--frobnicate",), 2, "No such option"),
    ],
)
def test_exit_codes(tmp_path: Path, words: tuple[str, ...], code: int, said: str) -> None:
    done = call(tmp_path, *words)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert said in done.stderr
    if "--json" in words:
        assert json.loads(done.stdout)["exit_code"] == code
    else:
        assert done.stdout == ""


def test_runs_of_an_empty_host(tmp_path: Path) -> None:
    nothing = {"format": "cpr.runs/1", "runs": [], "unreadable": []}
    assert json.loads(call(tmp_path, "runs", "--json").stdout) == nothing
    assert call(tmp_path, "recover").returncode == 0


def test_a_reader_that_leaves_makes_no_traceback(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CPR_RUN_DIR": str(tmp_path)}
    words = f"{sys.executable} -m cpr runs --json | true"
    done = subprocess.run(words, shell=True, capture_output=True, text=True, env=env, check=False, timeout=60)  # noqa: S602
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(tmp_path: Path, shell: str) -> None:
    done = call(tmp_path, _CPR_COMPLETE=f"source_{shell}")
    assert "_CPR_COMPLETE" in done.stdout


@pytest.fixture
def lab() -> Iterator[Lab]:
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(Lab())


@pytest.mark.qemu
@pytest.mark.everyday
@pytest.mark.parametrize("key", ["7.2", *(pytest.param(key, marks=pytest.mark.full) for key in ("10.0", "11.1.a"))])
def test_run_and_what_follows(lab: Lab, key: str) -> None:
    """A guest started by `cpr run` can be seen, checked and moved; named by its pid, as others may run here."""
    try:
        old, new = qemu.obtain(key), qemu.obtain("11.1.a")
    except LabError as error:
        pytest.skip(str(error))
    run_dir = Path(lab.directory) / "run"

    def cpr(*words: str) -> tuple[int, dict[str, Any]]:
        done = call(run_dir, *words, "--json", **lab.environment)
        assert "Traceback" not in done.stderr
        return done.returncode, json.loads(done.stdout)

    pidfile = run_dir / "vm.pid"
    arguments = ("-m", "64M", "-display", "none", "-nodefaults")
    done = call(run_dir, "run", "--json", "--name", "flow", "--pidfile", str(pidfile), "--", *old.command, *arguments,
                **lab.environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    guest = json.loads(done.stdout)["guest"]
    first = str(guest["pid"])
    lab.adopt(int(first))
    assert pidfile.read_text().strip() == first
    assert os.path.exists(guest["monitor"])

    code, document = cpr("check", first, "--qemu", str(new.binary))
    assert (code, document["guests"][0]["engines"]) == (0, {"handover": "ok", "reexec": "ok"}), document
    assert cpr("update", "-n", first, "--qemu", str(new.binary))[0] == 0
    code, document = cpr("update", "-y", first, "--qemu", str(new.binary))
    [outcome] = document["guests"]
    lab.adopt(outcome["pid_after"])
    assert (code, outcome["status"], outcome["binary_after"]["version"]) == (0, "updated", new.version), outcome
    assert pidfile.read_text().strip() == str(outcome["pid_after"])
    assert cpr("show", str(outcome["pid_after"]))[0] == 0
    [run] = cpr("runs")[1]["runs"]
    code, document = cpr("log", run["run"])
    assert (code, {s["state"] for s in document["guests"][0]["steps"]}) == (0, {"done"})


@pytest.mark.qemu
def test_run_says_what_qemu_said(lab: Lab) -> None:
    try:
        build = qemu.obtain("10.0")
    except LabError as error:
        pytest.skip(str(error))
    run_dir = Path(lab.directory) / "run"
    done = call(run_dir, "run", "--", *build.command, "-device", "nonsense", **lab.environment)
    assert done.returncode == 1
    assert "'nonsense' is not a valid device model name" in done.stderr
    assert "now: nothing was started" in done.stderr
