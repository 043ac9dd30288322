"""Programs the lab is built with: the machine's own, or Debian's package of them unpacked in the cache.

So the lab needs no root and installs nothing.  HOST_PACKAGES are those that cannot be had this way.
"""

import functools
import shutil
from pathlib import Path

from tests.lab import cache, debian

# What must be installed on the machine for all of the lab, and a program by which each is recognized.
HOST_PACKAGES = (("apt", "apt-get"), ("dpkg", "dpkg-deb"))

PACKAGE_OF = {
    "as": "binutils",
    "ip": "iproute2",
    "ld": "binutils",
    "mke2fs": "e2fsprogs",
    "patchelf": "patchelf",
    "zstd": "zstd",
}


def missing_packages() -> tuple[str, ...]:
    """Those of HOST_PACKAGES that are not installed."""
    return tuple(package for package, program in HOST_PACKAGES if not find(program))


def find(program: str) -> str | None:
    """Where `program` is installed; sbin counts, although a user's PATH may lack it."""
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")


@functools.cache
def command(program: str) -> tuple[str, ...]:
    """The words a command line for `program` begins with."""
    if installed := find(program):
        return (installed,)
    usr = unpacked(PACKAGE_OF[program]) / "usr"
    libraries = usr / "lib" / "x86_64-linux-gnu"
    loader = (str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries))
    directory = next(name for name in ("bin", "sbin") if (usr / name / program).exists())
    return (*loader, str(usr / directory / program))


def unpacked(package: str) -> Path:
    """The artifact holding `package` of this machine's Debian release, with what it depends on."""

    def build(workspace: cache.Workspace) -> None:
        debian.unpack(debian.mirror().codename, [package], workspace.out, workspace.scratch)

    return cache.artifact(f"tool-{package}", "1", build)
