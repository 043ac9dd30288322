"""`cpr --help` is quick: it imports nothing that takes time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]
SECONDS = 0.3
HEAVY = ("qemu", "asyncio", "psutil", "subprocess", "rich", "cpr.app", "cpr.engines", "cpr.linux", "cpr.checks")


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=env, check=True, timeout=20, cwd="/"
    )


def test_help_is_quick() -> None:
    call("-m", "cpr", "--help")  # once for the caches
    times = []
    for _ in range(5):
        began = time.monotonic()
        assert "update" in call("-m", "cpr", "--help").stdout
        times.append(time.monotonic() - began)
    assert min(times) < SECONDS


def test_the_command_line_imports_nothing_heavy() -> None:
    script = "import sys, cpr.cli.main; print('\\n'.join(sys.modules))"
    loaded = set(call("-c", script).stdout.split()) - {"subprocess"}  # typer itself does
    assert not {name for name in HEAVY if name in loaded}


