"""The new QEMU: whether it is another one, knows the guest's machine, devices and options, and starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cpr.model import Binary


def same_binary(one: Binary, other: Binary) -> bool:
    """Whether both are the same build: by build id where both have one, else by device and inode."""
    if one.build_id and other.build_id:
        return one.build_id == other.build_id
    return one.identity != (0, 0) and one.identity == other.identity
