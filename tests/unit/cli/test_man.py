"""docs/man/cpr.1 names every command, option and exit code that there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cpr.cli import main
from cpr.errors import Exit

PAGE = (Path(__file__).parents[3] / "docs/man/cpr.1").read_text().replace("\\-", "-")
COMMANDS = (
    *("list", "show", "check", "info", "update", "run", "save", "load", "restore", "may-start"),
    *("recover", "runs", "log"),
)


def options(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    assert main.run([command, "--help"]) == 0
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]+", capsys.readouterr().out))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_is_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(rf"^\.B cpr {command}$", PAGE, re.MULTILINE)
    missing = {o for o in options(command, capsys) if o not in PAGE} - {"--help"}
    assert not missing


def test_every_exit_code_is_there() -> None:
    table = PAGE[PAGE.index(".SH EXIT STATUS") : PAGE.index(".TE")]
    assert {int(n) for n in re.findall(r"\d+(?=[|,])", table)} >= set(map(int, Exit))
