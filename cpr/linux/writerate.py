"""How quickly a file system takes data: a short measurement, in a file without a name that is gone with us.

What comes first goes into caches, below the file system too, so the slowest of several rounds is taken; it is still
said of a disk whose cache holds all of them, and of one that others use meanwhile, with reserve.

Out of scope: what is made of it.
"""

from __future__ import annotations

import os
import time

ROUND = 64 << 20
ROUNDS = 4
PIECE = 4 << 20
LONGEST = 2.0


def write_rate(directory: str, *, size: int = ROUND, rounds: int = ROUNDS, longest: float = LONGEST) -> float:
    """Bytes per second at which `size` bytes are written to a new file in `directory` and synced: the slowest of
    `rounds`, or of fewer where they take more than `longest` seconds.

    Raises:
        OSError: it cannot be written there, is full, or knows no files without a name (O_TMPFILE; NFS).
    """
    data = os.urandom(min(PIECE, size))  # nothing that a file system could make smaller
    fd = os.open(directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        began, rates = time.monotonic(), list[float]()
        while not rates or (len(rates) < rounds and time.monotonic() < began + longest):
            rates.append(_round(fd, data, size))
        return min(rates)
    finally:
        os.close(fd)


def _round(fd: int, data: bytes, size: int) -> float:
    began, written = time.monotonic(), 0
    while written < size:
        written += os.write(fd, data)
    os.fdatasync(fd)
    return written / max(time.monotonic() - began, 1e-6)
