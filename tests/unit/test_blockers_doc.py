"""docs/blockers.md has an entry for every id of a check or an engine, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from cpr.checks import REGISTRY

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/blockers.md").read_text()
ENTRIES = dict(re.findall(r"^### (\S+)\n\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL))


def ids_of_engines() -> set[str]:
    """Ids that the engines give their own findings: `check=` of a Finding, or the first word of `blocker`."""
    found = set()
    for path in (ROOT / "cpr/engines").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            said = [k.value for k in node.keywords if k.arg == "check" and name == "Finding"]
            said += node.args[:1] if name == "blocker" else []
            found |= {a.value for a in said if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return found


def test_every_id_has_an_entry_and_every_entry_an_id() -> None:
    assert set(ENTRIES) == set(REGISTRY) | ids_of_engines()


@pytest.mark.parametrize("id", sorted(ENTRIES))
def test_an_entry_says_what_it_means_why_and_the_way_out(id: str) -> None:
    entry = ENTRIES[id]
    assert not entry.startswith("*")
    assert re.search(r"^\*Why\*: \S", entry, re.MULTILINE)
    assert re.search(r"^\*Way out\*: \S", entry, re.MULTILINE)


@pytest.mark.parametrize("id", sorted(REGISTRY))
def test_an_entry_says_whether_it_can_be_ignored(id: str) -> None:
    assert ("annot be ignored" in ENTRIES[id]) is not REGISTRY[id].ignorable
