"""Words that several checks use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def size(count: float) -> str:
    """Bytes for people: 4 GiB, 512 MiB, 1.5 GiB."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        del units[0]
    unit = units[0]
    return f"{count:.0f} {unit}" if count == int(count) else f"{count:.1f} {unit}"


def some(items: Iterable[str], limit: int = 6) -> str:
    """A list for people, cut where it gets long."""
    known = list(items)
    more = f" and {len(known) - limit} more" if len(known) > limit else ""
    return ", ".join(known[:limit]) + more
