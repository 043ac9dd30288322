"""The layers of docs/hacking.md, held against the imports of every module: nothing points up.

Imports inside functions and under TYPE_CHECKING count too: a type that has to be known is knowledge all the same.
"""

from __future__ import annotations

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "cpr").rglob("*.py"))
LONGEST = 450
LONGER = {"cpr/model.py": 680}
"""The nouns stand in one place, and half of that file is what they mean."""

ONLY = {
    "typer": ("cpr.cli.*",),
    "ptrace": ("cpr.linux.ptrace",),
    "qemu": ("cpr.qemu.qmp",),
    "psutil": ("cpr.linux.proc", "cpr.discover"),
}
"""Packages of others, and who alone may import them."""

FORBIDDEN = {
    "cpr.model": ("cpr*",),
    "cpr.errors": ("cpr*",),
    "cpr.kernelargs": ("cpr*",),
    "cpr.linux*": (
        *("cpr.qemu*", "cpr.engines*", "cpr.checks*", "cpr.app*", "cpr.cli*", "cpr.run", "cpr.plan", "cpr.reboot*"),
    ),
    "cpr.qemu*": (
        *("cpr.engines*", "cpr.checks*", "cpr.app*", "cpr.cli*", "cpr.run", "cpr.plan", "cpr.keeper", "cpr.reboot*"),
    ),
    "cpr.engines*": ("cpr.app*", "cpr.cli*", "cpr.checks*", "cpr.reboot*"),
    "cpr.reboot*": ("cpr.app*", "cpr.cli*"),
    "cpr.checks*": (
        *("cpr.app*", "cpr.cli*", "cpr.engines*", "cpr.run", "cpr.plan", "cpr.linux*", "cpr.qemu.qmp", "cpr.reboot*"),
    ),
    "cpr.[!c_]*": ("cpr.cli*",),
    "cpr.config": ("cpr.cli*", "cpr.app*"),
}
"""Who may not import what. `cpr.checks` is pure: it also knows no system calls and no monitor."""

OURS = ("psutil", "qemu", "typer", "ptrace", "cpr")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, source: str) -> list[tuple[int, str]]:
    """(line, module) of everything imported; `from cpr import app` counts as cpr.app."""
    found = []
    for node in ast.walk(ast.parse(source, str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            base = node.module or ""
            found += [(node.lineno, f"{base}.{a.name}" if base == "cpr" else base) for a in node.names]
    return sorted(set(found))


def trespasses(name: str, found: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The imports of module `name` that the layers do not allow, with the reason."""
    wrong = []
    for line, target in found:
        top = target.split(".")[0]
        allowed = ONLY.get(top)
        if allowed is not None and not any(fnmatch(name, p) for p in allowed):
            wrong.append((line, f"imports {target}: only {', '.join(allowed)} may"))
        for layer, patterns in FORBIDDEN.items():
            if fnmatch(name, layer) and target != name and any(fnmatch(target, p) for p in patterns):
                wrong.append((line, f"imports {target}, which lies above it or beside it"))
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_layers(path: Path) -> None:
    source = path.read_text()
    lines = source.splitlines()
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {lines[line - 1].strip()}  <- {why}"
        for line, why in trespasses(module_name(path), imports(path, source))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_length(path: Path) -> None:
    length, name = len(path.read_text().splitlines()), str(path.relative_to(ROOT))
    assert length <= LONGER.get(name, LONGEST), f"{name} has {length} lines: look for a second noun"


@pytest.mark.parametrize(
    ("name", "source", "speaks"),
    [
        ("cpr.run", "import typer", True),
        ("cpr.cli.update", "import typer", False),
        ("cpr.linux.fds", "from cpr.qemu import qmp", True),
        ("cpr.linux.fds", "from cpr.errors import CprError", False),
        ("cpr.qemu.qmp", "from qemu.qmp import QMPClient", False),
        ("cpr.qemu.block", "def f():\n    from cpr.checks import run_checks", True),
        ("cpr.model", "from cpr import errors", True),
        ("cpr.checks.memory", "from cpr.qemu.cmdline import devices", False),
        ("cpr.checks.memory", "from cpr.linux import proc", True),
        ("cpr.app.update", "from cpr.cli import output", True),
        ("cpr.reboot.manifest", "from cpr.linux import traits", False),
        ("cpr.checks.reboot", "from cpr.reboot import manifest", True),
    ],
)
def test_the_rules_bite(name: str, source: str, speaks: bool) -> None:
    assert bool(trespasses(name, imports(Path(name), source))) is speaks
