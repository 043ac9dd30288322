"""A stamp of guest RAM: enough of it to tell after a reboot whether it is the same, in a fraction of a second.

Made when the guest's state has been saved and nothing writes any more; compared before the state is loaded, because
QEMU loads a state over any memory, and a guest over foreign or wiped RAM is corrupted.

Pages are sampled, the first and the last among them: most are spread evenly, the others lie at the beginning, which
every guest uses (firmware and kernel), however large and empty it is. Each is hashed by itself, so that a difference
can be named. A change of a few pages between the samples is not seen: the memory is told from foreign, wiped and stale
memory, not proven equal.

Memory is read through mmap(2): a device DAX has no read(2).

Out of scope: what the memory is and where it lies (linux/dax.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpr.errors import CprError

if TYPE_CHECKING:
    from collections.abc import Mapping

PAGE = 4096
SAMPLES = 256
LOW_BYTES = 32 << 20
LOW_SHARE = 4
"""One sample in so many lies in the first LOW_BYTES, besides those that are spread over all."""
DIGEST_BYTES = 8
"""Of BLAKE2b, for each page: an accident is not met in 2^64."""
_NAMED = 3
"""Differing pages that a message names."""


class StampError(CprError):
    """RAM cannot be read to be stamped or compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """`size` bytes from `offset` on, of which the pages at `places` (bytes from `offset`) have these digests (hex)."""

    size: int
    offset: int
    identity: Mapping[str, Any]
    """What the memory is (persistence.identity), as JSON values."""
    places: tuple[int, ...]
    digests: tuple[str, ...]


def places(size: int, samples: int = SAMPLES) -> tuple[int, ...]:
    """Offsets of the sampled pages, ascending: always the same for one size, first and last page included."""
    pages = -(-size // PAGE)
    if pages <= samples:
        return tuple(n * PAGE for n in range(pages))
    low = samples // LOW_SHARE
    return tuple(sorted({*_spread(min(pages, LOW_BYTES // PAGE), low), *_spread(pages, samples - low)}))


def _spread(pages: int, samples: int) -> list[int]:
    return [n * (pages - 1) // (samples - 1) * PAGE for n in range(samples)]


def take(path: str, size: int, identity: Mapping[str, Any], *, offset: int = 0, samples: int = SAMPLES) -> Stamp:
    """Stamp `size` bytes of `path` from `offset` on (both in bytes; `offset` a multiple of what can be mapped).

    Raises:
        StampError: it is missing, too short, or cannot be mapped.
    """
    wanted = places(size, samples)
    digests = _digests(path, size, offset, wanted)
    return Stamp(size=size, offset=offset, identity=dict(identity), places=wanted, digests=digests)


def differences(stamp: Stamp, path: str, identity: Mapping[str, Any]) -> tuple[str, ...]:
    """In what the memory at `path` now differs from the stamped one, in words; none: it may be loaded over.

    The content is not looked at where the identity differs already.

    Raises:
        StampError: it is missing, too short, or cannot be mapped.
    """
    names = sorted(stamp.identity.keys() | identity.keys())
    wrong = [n for n in names if stamp.identity.get(n) != identity.get(n)]
    if wrong:
        return tuple(f"{n.replace('_', ' ')}: {stamp.identity.get(n)} then, {identity.get(n)} now" for n in wrong)
    now = _digests(path, stamp.size, stamp.offset, stamp.places)
    changed = [place for place, old, new in zip(stamp.places, stamp.digests, now, strict=True) if old != new]
    if not changed:
        return ()
    zero = _digest(bytes(PAGE))
    held = [old for old in stamp.digests if old != zero]
    if held and all(new == zero for new in now):
        return (f"its content: all {len(now)} sampled pages are zeroes now: the memory was wiped",)
    where = ", ".join(hex(place) for place in changed[:_NAMED]) + (", ..." if len(changed) > _NAMED else "")
    return (f"its content: {len(changed)} of {len(now)} sampled pages differ (at {where})",)


def _digest(page: bytes) -> str:
    return hashlib.blake2b(page, digest_size=DIGEST_BYTES).hexdigest()


def _digests(path: str, size: int, offset: int, wanted: tuple[int, ...]) -> tuple[str, ...]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise StampError(f"{path}: {error.strerror}") from None
    try:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            if status.st_size < offset + size:
                raise StampError(f"{path} has {status.st_size} bytes, where {offset + size} are needed")
        elif not stat.S_ISCHR(status.st_mode):
            raise StampError(f"{path} is neither a file nor a character device")
        with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset) as memory:
            with contextlib.suppress(OSError):
                memory.madvise(mmap.MADV_RANDOM)  # a file on a disk: no read-ahead around every sample
            return tuple(_digest(memory[place : place + PAGE]) for place in wanted)
    except (OSError, ValueError) as error:
        raise StampError(f"{path} cannot be mapped: {error}") from None
    finally:
        os.close(fd)


def to_json(stamp: Stamp) -> dict[str, Any]:
    return {
        "size": stamp.size,
        "offset": stamp.offset,
        "identity": dict(stamp.identity),
        "places": list(stamp.places),
        "digests": list(stamp.digests),
    }


def from_json(value: Mapping[str, Any]) -> Stamp:
    """Raises KeyError, TypeError, ValueError."""
    size, offset, digests = value["size"], value["offset"], value["digests"]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (size, offset)) or size == 0:
        raise ValueError(f"not the size and offset of RAM: {size!r}, {offset!r}"[:120])
    if not isinstance(digests, list) or not all(isinstance(d, str) for d in digests) or not digests:
        raise TypeError("no digests")
    if not isinstance(value["identity"], dict):
        raise TypeError("no identity")
    where = value["places"]
    if not isinstance(where, list) or not all(isinstance(n, int) and 0 <= n < size and n % PAGE == 0 for n in where):
        raise ValueError("places that are not in the RAM")
    if len(where) != len(digests):
        raise ValueError(f"{len(digests)} digests for {len(where)} pages")
    return Stamp(
        size=size, offset=offset, identity=dict(value["identity"]), places=tuple(where), digests=tuple(digests)
    )
