"""``python -m tests.lab``: obtain everything the tests and the demonstration need, or say what is there.

One line for each thing.  The exit status is 1 if something cannot be had, and the last words say why.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.lab import LabError, cache, counting, linux, qemu, tools


def things() -> dict[str, Callable[[], tuple[Path, str]]]:
    """What the lab has: key -> a function that obtains it and returns its path and what it is."""

    def build(key: str) -> Callable[[], tuple[Path, str]]:
        def obtain() -> tuple[Path, str]:
            if reason := qemu.why_missing(key):
                return Path(), f"not to be had: {reason}"
            return qemu.obtain(key).binary, str(qemu.obtain(key))

        return obtain

    return {
        **{key: build(key) for key in qemu.SUITES},
        "qemu-img": lambda: (qemu.qemu_img(), "qemu-img"),
        "counting": lambda: (counting.directory(), f"the counting guest, {len(counting.program())} bytes"),
        "linux": lambda: (linux.obtain().kernel.parent, f"the Linux guest, {linux.obtain().release}"),
    }


def fetch(keys: Sequence[str]) -> None:
    """Obtain the things and print a line for each.  Raises LabError."""
    for key in keys:
        print(f"{key:9} ", end="", flush=True)
        start = time.monotonic()
        path, what = things()[key]()
        print(f"{what}  [{time.monotonic() - start:.1f} s]  {path if path.name else ''}", flush=True)
    if cache.root().exists():
        print(f"{cache.size(cache.root()) >> 20} MiB in {cache.root()}")


def show() -> None:
    """Print what the cache holds, without obtaining anything."""
    print(f"in {cache.root()}:")
    for directory in cache.artifacts():
        print(f"  {directory.name:36} {cache.size(directory) >> 20:5} MiB")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="show what the cache holds")
    parser.add_argument("--fetch", action="store_true", help="obtain everything (this is the default)")
    parser.add_argument("--again", action="store_true", help="throw the cache away first, for newer packages")
    keys = [*things()]
    parser.add_argument("--path", metavar="KEY", choices=keys, help=f"print the path of one of {keys}")
    options = parser.parse_args(arguments)
    try:
        if missing := tools.missing_packages():
            raise LabError(f"install what is missing: apt-get install {' '.join(missing)}")
        if options.list:
            show()
        elif options.path:
            print(things()[options.path]()[0])
        else:
            if options.again:
                for directory in cache.artifacts():
                    shutil.rmtree(directory)
            fetch([*things()])
    except LabError as error:
        print(f"\nlab: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
