"""Persistent memory in the host VM as somebody else might find and leave it: copied to a file, wiped, put back, spoilt,
or only looked at. `held`: pages that are not empty.

A device DAX can be mapped, but neither read nor written.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import sys

PAGE = 4096


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("copy", "wipe", "back", "spoil", "look"))
    parser.add_argument("path")
    parser.add_argument("mib", type=int)
    parser.add_argument("--file", default="/state/ram.copy")
    options = parser.parse_args()
    size = options.mib << 20
    number = os.open(options.path, os.O_RDWR)
    with mmap.mmap(number, size, mmap.MAP_SHARED) as memory:
        if options.what == "copy":
            with open(options.file, "wb") as file:
                file.write(memory)
        elif options.what == "wipe":
            for at in range(0, size, 1 << 20):
                memory[at : at + (1 << 20)] = bytes(1 << 20)
        elif options.what == "back":
            with open(options.file, "rb") as file:
                for at in range(0, size, 1 << 20):
                    memory[at : at + (1 << 20)] = file.read(1 << 20)
        elif options.what == "spoil":
            memory[:PAGE] = bytes(byte ^ 0xFF for byte in memory[:PAGE])
        held = sum(1 for at in range(0, size, PAGE) if memory[at : at + PAGE] != bytes(PAGE))
    os.close(number)
    json.dump({"held": held, "free": shutil.disk_usage("/state").free}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
