"""hooks/systemd: what can be said of the units without a systemd. (With one: tests/host/test_kexec_systemd.py.)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cpr.cli import main
from cpr.journal import DEFAULT_DIRECTORY as RUN_DIRECTORY
from cpr.reboot.store import CURRENT
from cpr.reboot.store import DEFAULT_DIRECTORY as STATE_DIRECTORY

TOP = Path(__file__).parents[2]
HOOKS = TOP / "hooks" / "systemd"


def settings(name: str) -> dict[tuple[str, str], list[str]]:
    """(section, key) -> values, in a unit file, whose keys may come several times."""
    found: dict[tuple[str, str], list[str]] = {}
    section = ""
    for line in (HOOKS / name).read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault((section, key), []).append(value)
    return found


@pytest.mark.parametrize("name", ["cpr-restore.service", "cpr-guest.conf"])
def test_commands_of_units_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    called = [value for key, values in settings(name).items() if key[1].startswith("Exec") for value in values]
    ours = [value.lstrip("+-!@:").split()[1:] for value in called if re.match(r"[+\-!@:]*cpr ", value)]
    assert ours
    for command, *words in ours:
        assert main.run([command, "--help"]) == 0
        said = capsys.readouterr().out
        assert all(word in said for word in words if word.startswith("--"))


def test_the_guests_outlive_the_unit() -> None:
    unit = settings("cpr-restore.service")
    assert unit["Service", "Type"] == ["oneshot"]
    assert unit["Service", "RemainAfterExit"] == ["yes"]
    assert unit["Service", "KillMode"] == ["process"]


def test_it_waits_only_where_something_is_saved() -> None:
    unit = settings("cpr-restore.service")
    assert unit["Unit", "ConditionPathExists"] == [f"{STATE_DIRECTORY}/reboot/{CURRENT}"]
    assert unit["Unit", "RequiresMountsFor"] == [STATE_DIRECTORY]
    assert "libvirtd.service" in " ".join(unit["Unit", "Before"]).split()
    assert ("Unit", "Wants") not in unit


def test_directories_are_those_of_cpr() -> None:
    lines = [line.split() for line in (HOOKS / "cpr.tmpfiles.conf").read_text().splitlines() if line[:1] == "d"]
    modes = {path: mode for _, path, mode, *_ in lines}
    assert modes[RUN_DIRECTORY] == "0755"
    assert modes[STATE_DIRECTORY] == "0700"
    assert modes[f"{RUN_DIRECTORY}/locks"] == modes[f"{RUN_DIRECTORY}/runs"] == "1777"


def test_documents_name_every_file() -> None:
    page = (TOP / "docs/man/cpr-restore.service.8").read_text().replace("\\-", "-")
    text = (TOP / "docs/systemd.md").read_text()
    for file in HOOKS.iterdir():
        assert file.name in page
        assert file.name in text
