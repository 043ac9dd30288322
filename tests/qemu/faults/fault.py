"""A fault as a value, and the stage where it announces itself."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

PLANTED = Path(__file__).with_name("planted")
PATIENCE = 60.0
"""Seconds until a fault must have happened: a busy host is slow to start a QEMU."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`at` a moment, `do` an action (planted/sitecustomize.py names both)."""

    at: str
    do: str
    argument: str = ""


class Announcement:
    """A fault that is about to happen; where it waits, `go` lets it go on."""

    def __init__(self, sock: socket.socket, said: dict[str, Any]) -> None:
        self._sock = sock
        self.at = str(said["at"])
        self.keeper = int(said["keeper"])
        self.new = int(said["new"])
        """Pid of the new QEMU, 0 where there is none."""
        self.helper = int(said["helper"])

    def go(self) -> None:
        self._sock.close()


class Stage:
    """Where faults announce themselves. A context manager: nobody waits any more when it has closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen(8)
        self._seen: list[Announcement] = []

    def wait(self, seconds: float = PATIENCE) -> Announcement:
        """The next announcement. Raises TimeoutError."""
        self._server.settimeout(seconds)
        sock, _ = self._server.accept()
        sock.settimeout(PATIENCE)
        with sock.makefile("rb") as lines:
            said = json.loads(lines.readline())
        self._seen.append(Announcement(sock, said))
        return self._seen[-1]

    def environment(self, faults: Sequence[Fault]) -> dict[str, str]:
        """What has to be in the command's environment for them."""
        orders = [{"at": f.at, "do": f.do, "argument": f.argument, "stage": str(self.path)} for f in faults]
        path = os.pathsep.join(filter(None, [str(PLANTED), os.environ.get("PYTHONPATH", "")]))
        return {"PYTHONPATH": path, "CPR_TEST_FAULTS": json.dumps(orders)}

    def close(self) -> None:
        for announcement in self._seen:
            announcement.go()
        self._server.close()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
