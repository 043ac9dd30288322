"""Where saved guests lie: on a disk, in directories that are root's alone, one for each run.

    /var/lib/cpr (or $CPR_STATE_DIR)     0700
     └── reboot/
          ├── current -> RUN             the run whose guests are saved now; gone when all are back
          └── RUN/
               ├── manifest.json         and manifest.json.lock while somebody works on it
               ├── NAME.state            in DIR of --save-ram where the RAM is in it
               └── old-N/qemu-system-... copies of the old QEMUs, each once

A guest that is saved by hand lies where its user says: FILE, FILE.manifest and FILE.old/qemu-system-...

Out of scope: what is in the manifest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING

from cpr.errors import Busy, NotFound
from cpr.linux import proc
from cpr.linux.appendfile import sync_directory
from cpr.linux.lock import LockHeld, file_lock
from cpr.reboot import manifest as manifests

if TYPE_CHECKING:
    from cpr.linux.lock import ProcessLock
    from cpr.reboot.manifest import Manifest, SavedGuest

DEFAULT_DIRECTORY = "/var/lib/cpr"
CURRENT = "current"
MANIFEST_SUFFIX = ".manifest"
OLD_SUFFIX = ".old"


def state_directory() -> str:
    """/var/lib/cpr, or $CPR_STATE_DIR."""
    return os.environ.get("CPR_STATE_DIR") or DEFAULT_DIRECTORY


def make_run(run: str, base: str | None = None) -> str:
    """Make the directory of a run; its path.

    Raises:
        ManifestError: one above it is not ours alone. OSError.
    """
    path = base or state_directory()
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    for part in ("", "reboot", run):
        path = os.path.join(path, part).rstrip("/")
        manifests.make_directory(path)
    return path


def make_directory(path: str) -> str:
    """Make a directory of ours alone, and those above it, if need be; its path. Errors as `make_run`."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    manifests.make_directory(path)
    return path


def state_name(guest: str, pid: int) -> str:
    """What the state of a guest is called."""
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in guest)[:40].lstrip(".")
    return f"{safe or 'guest'}-{pid}.state"


def make_current(directory: str) -> None:
    """Have `current` name this run; on disk when it returns. OSError."""
    link = _current(directory)
    new = f"{link}.{os.getpid()}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)
    os.symlink(os.path.basename(directory), new)
    os.rename(new, link)
    sync_directory(link)


def drop_current(directory: str) -> None:
    """`current` names this run no more, if it did. OSError."""
    link = _current(directory)
    with contextlib.suppress(FileNotFoundError):
        if os.readlink(link) == os.path.basename(directory):
            os.unlink(link)
            sync_directory(link)


def _current(directory: str) -> str:
    return os.path.join(os.path.dirname(directory), CURRENT)


def current(base: str | None = None) -> str:
    """Path of the manifest that is open.

    Raises:
        NotFound: there is none.
    """
    link = os.path.join(base or state_directory(), "reboot", CURRENT)
    try:
        directory = os.path.join(os.path.dirname(link), os.path.basename(os.readlink(link)))
    except OSError:
        raise NotFound(
            f"nothing is saved in {base or state_directory()}", hint="cpr list shows the guests that run"
        ) from None
    return os.path.join(directory, manifests.NAME)


def hold(path: str, what: str) -> ProcessLock:
    """Work on a manifest and what it tells of, alone, until released; by two at once a guest could be loaded twice.

    Raises:
        Busy: somebody does. OSError.
    """
    try:
        holder = {"command": what}
        return file_lock(f"{path}.lock", boot_id=proc.boot_id(), owner_uid=os.geteuid(), holder=holder)
    except LockHeld as held:
        who = f"{held.holder.get('command', 'somebody')} (pid {held.holder.get('pid', '?')})"
        raise Busy(f"{who} is working on {path}", held.holder, hint="wait for it") from None


# -- the old binary


def pin(pid: int, directory: str) -> str:
    """A copy of the program that a process runs, which anybody who is given it open may execute; its path. OSError."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    name = os.path.basename(proc.exe(pid).path)
    path = os.path.join(directory, name)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with open(f"/proc/{pid}/exe", "rb") as program, open(path, "xb") as copy:
        shutil.copyfileobj(program, copy, 1 << 20)
        os.fchmod(copy.fileno(), 0o755)
        os.fsync(copy.fileno())
    sync_directory(path)
    sync_directory(directory)
    return path


def clean(path: str, manifest: Manifest) -> None:
    """Remove what is of no use any more: states and copies of old QEMUs of guests that are back. Never raises.

    The manifest stays, as the record of what was done.
    """
    kept = {g.pinned_binary for g in manifest.open}
    for guest in manifest.guests:
        if guest not in manifest.open:
            _remove(guest, kept)
    if not manifest.open:
        with contextlib.suppress(OSError):
            drop_current(os.path.dirname(path))


def forget(path: str) -> None:
    """Remove the manifest of a guest that was saved by hand and runs on, and what belongs to it. Never raises."""
    directory = path.removesuffix(MANIFEST_SUFFIX) + OLD_SUFFIX
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            os.unlink(os.path.join(directory, name))
        os.rmdir(directory)
    for name in (path, path.removesuffix(MANIFEST_SUFFIX)):
        with contextlib.suppress(OSError):
            os.unlink(name)


def _remove(guest: SavedGuest, kept: set[str]) -> None:
    state = guest.state.path if guest.state is not None else guest.state_path  # one that was cut short, too
    if state:
        with contextlib.suppress(OSError):
            os.unlink(state)
    if guest.pinned_binary and guest.pinned_binary not in kept:
        with contextlib.suppress(OSError):
            os.unlink(guest.pinned_binary)
            os.rmdir(os.path.dirname(guest.pinned_binary))
