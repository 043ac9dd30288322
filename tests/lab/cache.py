"""Where the lab keeps what it has downloaded and built.

An artifact is a directory ``<name>.<digest of its recipe>``.  It is built beside its final place and renamed
into it, so one that exists is complete, and a changed recipe gets a new directory while programs started
from the old one go on.  Two processes that want the same artifact build it once.

Out of scope: what is in an artifact, and whether the mirror has something newer by now (for that there is
``python -m tests.lab --again``).
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import pwd
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

KEPT_SECONDS = 7 * 86400


@dataclasses.dataclass(frozen=True)
class Workspace:
    """What a builder is given: `out` becomes the artifact at `final`; `scratch` is thrown away."""

    out: Path
    scratch: Path
    final: Path


def invoking_user() -> pwd.struct_passwd | None:
    """The person behind sudo, or None if we run under our own name."""
    if os.geteuid() == 0 and os.environ.get("SUDO_UID", "0") != "0":
        with contextlib.suppress(KeyError, ValueError):
            return pwd.getpwuid(int(os.environ["SUDO_UID"]))
    return None


def root() -> Path:
    """The cache's directory; it may not exist yet.

    Root's own is where other users can read it: guests run under other uids, and so do their QEMUs.
    """
    if configured := os.environ.get("CPR_LAB_CACHE"):
        return Path(configured).absolute()
    user = invoking_user()
    if configured := os.environ.get("XDG_CACHE_HOME"):
        cache = Path(configured).absolute()
    elif user is not None:
        cache = Path(user.pw_dir) / ".cache"
    else:
        cache = Path("/var/cache") if os.geteuid() == 0 else Path.home() / ".cache"
    return cache / "qemu-cpr" / "lab"


def artifact(name: str, recipe: str, build: Callable[[Workspace], None]) -> Path:
    """The directory of the artifact `name`, built by `build` unless one of the same `recipe` exists.

    `recipe` is any text that changes when the result would.  Raises whatever `build` raises, and then
    leaves nothing behind.
    """
    final = path_of(name, recipe)
    if final.is_dir():
        return final
    make_root()
    with locked(root() / f".{name}.lock"):
        if final.is_dir():  # somebody else built it while we waited
            return final
        partial = root() / f".{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # left by a builder that was killed
        workspace = Workspace(partial / "out", partial / "scratch", final)
        try:
            workspace.out.mkdir(parents=True)
            workspace.scratch.mkdir()
            build(workspace)
            give_to_invoking_user(workspace.out)
            workspace.out.rename(final)
            final.touch()
            remove_old(name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def path_of(name: str, recipe: str) -> Path:
    """Where the artifact is or would be."""
    return root() / f"{name}.{hashlib.sha256(recipe.encode()).hexdigest()[:10]}"


def artifacts() -> list[Path]:
    """All artifacts there are, those of recipes that nobody uses any more too."""
    return sorted(entry for entry in root().glob("*") if re.fullmatch(r"[\w.-]+\.[0-9a-f]{10}", entry.name))


def remove_old(name: str) -> None:
    """Remove artifacts `name` of other recipes once they are some days old."""
    for entry in artifacts():
        if entry.name.rpartition(".")[0] == name and time.time() - entry.stat().st_mtime > KEPT_SECONDS:
            shutil.rmtree(entry, ignore_errors=True)


def make_root() -> None:
    """Create the cache's directory, owned by whoever is behind sudo, who shall be able to use it too."""
    missing = [root()]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for directory in reversed(missing):
        if not directory.exists():
            directory.mkdir(exist_ok=True)
            give_to_invoking_user(directory)


def give_to_invoking_user(path: Path) -> None:
    """Under sudo, make `path` and all below it belong to the person behind it; else do nothing."""
    if user := invoking_user():
        for entry in (path, *path.rglob("*")):
            os.chown(entry, user.pw_uid, user.pw_gid, follow_symlinks=False)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive flock on `path`; it ends with the process, however that ends."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        give_to_invoking_user(path)
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def size(path: Path) -> int:
    """Bytes on disk of the files below `path`."""
    return sum(entry.lstat().st_blocks * 512 for entry in (path, *path.rglob("*")))
