"""Processes of our own that are not to die with the command that starts them: how they find this package, and what
keeps them alive.

Out of scope: what they do (tracer.py, keeper.py, lend.py, app/guardian.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
"""The directory that this package is imported from."""
OOM_SCORE = "-1000"
"""The kernel ends others first; only root may say so."""
HANG_UPS = (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE)
"""What comes when the terminal or the command goes."""


def environment(**more: str) -> dict[str, str]:
    """Ours, with which a Python finds this package wherever it was imported from."""
    path = os.pathsep.join(filter(None, [PACKAGE, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, **more}


def outlive(ignored: Iterable[signal.Signals] = HANG_UPS) -> None:
    """Called first by such a process: these signals do nothing to it, and memory is taken from others."""
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(OOM_SCORE)
