"""Names of guests, as they stand in paths."""

from __future__ import annotations

LONGEST = 40
"""Characters of a name: a UNIX socket's path has 107 bytes at most."""


def file_name(name: str) -> str:
    """A guest's name as part of a file name; "guest" where nothing is left of it."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:LONGEST].lstrip(".") or "guest"
