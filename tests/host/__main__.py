"""``tox -e host``: the tests in the host VM; with ``--shell`` a shell in one instead.

Words that are not known here go to pytest.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from tests.host import image, kernels, machine, vm
from tests.lab import LabError, cache

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "host"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="tox -e host --", description=__doc__)
    parser.add_argument("--shell", action="store_true", help="a shell in a host VM; `poweroff -f` ends it")
    parser.add_argument("--build", action="store_true", help="build its images and say how long that takes")
    parser.add_argument("--kernel", choices=[*kernels.KERNELS], default=machine.SMALL.kernel)
    parser.add_argument("--systemd", action="store_true", help="with systemd as process 1")
    parser.add_argument("--dax", choices=[machine.MEMMAP, machine.NVDIMM], default="", help="with persistent memory")
    parser.add_argument("--devices", action="store_true", help="with an NVMe and a NIC behind an IOMMU")
    parser.add_argument("--memory", type=int, default=machine.SMALL.memory, metavar="MIB")
    options, rest = parser.parse_known_args(arguments)
    try:
        if options.build:
            build()
        if options.shell:
            shell(
                machine.Machine(
                    kernel=options.kernel,
                    systemd=options.systemd,
                    dax=options.dax,
                    devices=options.devices,
                    memory=options.memory,
                )
            )
    except LabError as error:
        print(f"host VM: {error}", file=sys.stderr)
        return 1
    if options.build or options.shell:
        return 0
    return subprocess.run([*PYTEST, *(rest or ["tests/host"])], check=False).returncode


def build() -> None:
    """Build the images and say what took how long."""
    parts: dict[str, Callable[[], Path]] = {
        "root": image.root_directory,
        "lab": image.lab_disk,
        "site": lambda: image.site_disk(image.root_directory()),
    }
    for what, obtain in parts.items():
        began = time.monotonic()
        path = obtain()
        directory = path if path.is_dir() else path.parent
        print(f"{what:4} {time.monotonic() - began:5.1f} s  {cache.size(directory) >> 20:4} MiB  {path}", flush=True)


def shell(which: machine.Machine) -> None:
    """Connect the terminal to a shell in a new host VM until that is powered off."""
    host = vm.Host(which, terminal=True)
    try:
        host.start()
        print(f"host VM: up after {host.times.boot:.1f} s, serial log {host.serial}; `poweroff -f` ends it", flush=True)
        host.wait()
    finally:
        host.close()
        if sys.stdin.isatty():
            subprocess.run(["stty", "sane"], check=False)


if __name__ == "__main__":
    sys.exit(main())
