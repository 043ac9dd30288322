"""A host of its own for `cpr update --all`: guests that no other test's cpr sees, and none of others that it sees.

Run by `test_fleet` as `unshare --pid --mount-proc --fork ... python -m tests.qemu.fleet COUNT WORDS...`: in a process
namespace of its own, with its own /proc. It starts the guests, calls the command once with WORDS, asks every guest
whether it is well, and prints one JSON document. Nothing is judged here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.lab import qemu
from tests.lab.start import Lab
from tests.qemu.conftest import Command, qemus_of
from tests.qemu.moving import backend

if TYPE_CHECKING:
    from tests.lab.counting import CountingLog
    from tests.lab.start import Guest

MEMORY = "32M"
BLOCKED = 1
"""The guest with this number has RAM that no second process can map."""


def main() -> None:
    count, words = int(sys.argv[1]), sys.argv[2:]
    old, new = qemu.obtain("7.2"), qemu.obtain("11.1.a")
    with Lab() as lab:
        guests: list[Guest[CountingLog]] = []
        for number in range(count):
            ram = None if number == BLOCKED else backend(old, lab, f"ram{number}")
            guests.append(lab.counting(old, name=f"guest{number}", memory=MEMORY, hz=20, backend=ram))
        before = [guest.pid for guest in guests]
        began = time.monotonic()
        result = Command(lab)("update", "--restart", "--all", "--qemu", new.binary, *words, timeout=900)
        seconds = time.monotonic() - began
        for guest in guests:
            guest.console.send(b"D")
        for guest in guests:
            guest.log.wait_rounds(2, 300)
        print(
            json.dumps(
                {
                    "code": result.code,
                    "document": result.json,
                    "said": result.err,
                    "seconds": seconds,
                    "before": before,
                    "after": sorted(qemus_of(lab)),
                    "binaries": {pid: os.readlink(f"/proc/{pid}/exe") for pid in qemus_of(lab)},
                    "problems": [guest.log.problems() for guest in guests],
                    "old": str(old.binary),
                    "new": str(new.binary),
                }
            )
        )


def run(count: int, *words: str) -> dict[str, Any]:
    """The document of a run in a namespace of its own; the shell is its first process, and reaps orphans."""
    shell = '"$@"; exit $?'
    command = [sys.executable, "-m", "tests.qemu.fleet", str(count), *words]
    done = subprocess.run(
        ["unshare", "--pid", "--mount-proc", "--fork", "--kill-child", "sh", "-c", shell, "sh", *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    main()
