"""`cpr --help` is quick: it imports nothing that takes time."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
SECONDS = 0.3
"""Of processor time: the clock on the wall also counts whatever else the machine is doing."""
HEAVY = ("qemu", "asyncio", "psutil", "subprocess", "rich", "cpr.app", "cpr.engines", "cpr.linux", "cpr.checks")


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=env, check=True, timeout=20, cwd="/"
    )


def test_help_is_quick(tmp_path: Path) -> None:
    compiled = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}  # as an installed package is
    call("-m", "cpr", "--help", **compiled)
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "update" in call("-m", "cpr", "--help", **compiled).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < SECONDS, times


def test_the_command_line_imports_nothing_heavy() -> None:
    script = "import sys, {}; print('\\n'.join(sys.modules))"
    typers = set(call("-c", script.format("typer")).stdout.split())
    ours = set(call("-c", script.format("cpr.cli.main")).stdout.split()) - typers
    assert not {name for name in HEAVY if name in ours}
