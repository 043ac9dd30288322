"""A guest's name in a path stays in its directory, whatever it is."""

from __future__ import annotations

import pytest

from cpr.names import file_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("web1", "web1"),
        ("", "guest"),
        ("...", "guest"),
        ("../../etc/passwd", "_.._etc_passwd"),
        ("a b\n", "a_b_"),
        (".hidden", "hidden"),
        ("x" * 100, "x" * 40),
    ],
)
def test_file_names(name: str, expected: str) -> None:
    assert file_name(name) == expected
