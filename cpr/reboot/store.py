"""Where saved guests lie: on a disk, in directories that are root's alone, one for each run.

    /var/lib/cpr (or $CPR_STATE_DIR)     0700
     ├── reboot/
     │    ├── current -> RUN             the run whose guests are saved now; gone when all are back
     │    └── RUN/
     │         ├── manifest.json         and manifest.json.lock while somebody works on it
     │         ├── NAME.state            in DIR of --save-ram where the RAM is in it
     │         └── old-N/qemu-system-... copies of the old QEMUs, each once
     └── saved/
          └── RUN@UNIT -> FILE.manifest  of a guest saved by hand, and the unit that it was in, if any

A guest that is saved by hand lies where its user says: FILE, FILE.manifest and FILE.old/qemu-system-...

Out of scope: what is in the manifest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING

from cpr.errors import Busy, ManifestError, NotFound
from cpr.linux import proc
from cpr.linux.appendfile import sync_directory
from cpr.linux.lock import LockHeld, file_holder, file_lock
from cpr.linux.process import lives
from cpr.names import file_name
from cpr.reboot import manifest as manifests
from cpr.reboot.manifest import Phase

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cpr.linux.lock import ProcessLock
    from cpr.reboot.manifest import Manifest, SavedGuest

DEFAULT_DIRECTORY = "/var/lib/cpr"
CURRENT = "current"
KEPT_RUNS = 20
"""So many runs keep their record, and those that are not over."""
MANIFEST_SUFFIX = ".manifest"
OLD_SUFFIX = ".old"
BY_HAND = "saved"


def state_directory() -> str:
    """/var/lib/cpr, or $CPR_STATE_DIR."""
    return os.environ.get("CPR_STATE_DIR") or DEFAULT_DIRECTORY


def make_run(run: str, base: str | None = None) -> str:
    """Make the directory of a run; its path. The records of old runs are removed.

    Raises:
        ManifestError: one above it is not ours alone. OSError.
    """
    path = _made(base, "reboot", run)
    prune(base)
    return path


def _made(base: str | None, *parts: str) -> str:
    """A directory below the state directory, all of it ours alone."""
    path = make_directory((base or state_directory()).rstrip("/"))
    for part in parts:
        path = make_directory(os.path.join(path, part))
    return path


def make_directory(path: str) -> str:
    """Make a directory of ours alone, and those above it, if need be; its path. Errors as `make_run`."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    manifests.make_directory(path)
    return path


def state_name(guest: str, pid: int) -> str:
    """What the state of a guest is called."""
    return f"{file_name(guest)}-{pid}.state"


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
    if is_current(directory):
        os.unlink(_current(directory))
        sync_directory(_current(directory))


def is_current(directory: str) -> bool:
    """Whether `current` names this run, as far as we may look."""
    with contextlib.suppress(OSError):
        return os.readlink(_current(directory)) == os.path.basename(directory)
    return False


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


def runs(base: str | None = None) -> tuple[str, ...]:
    """Paths of the manifests of all runs, the oldest first; not each has to be there. OSError."""
    directory = os.path.join(base or state_directory(), "reboot")
    try:
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return ()
    return tuple(os.path.join(directory, name, manifests.NAME) for name in names)


def prune(base: str | None = None) -> None:
    """Remove the records of old runs, of which nobody waits for anything any more. Never raises."""
    with contextlib.suppress(OSError):
        for path in runs(base)[:-KEPT_RUNS]:
            directory = os.path.dirname(path)
            if not is_current(directory) and _is_over(path):
                shutil.rmtree(directory, ignore_errors=True)


def _is_over(path: str) -> bool:
    """All guests are back, given up or went on, and none of those that were brought back still runs."""
    try:
        manifest = manifests.read_file(path)
    except NotFound as error:
        return not isinstance(error, ManifestError)  # it came to nothing before there was one
    if manifest.open and manifest.phase is not Phase.UNDONE:
        return False
    return not any(lives(g.restore.pid, g.restore.start_time) for g in manifest.guests if g.restore.pid)


# -- guests saved by hand


def note_by_hand(path: str, manifest: Manifest, base: str | None = None) -> None:
    """Have the state directory know of the manifest at `path`, which is a user's file; on disk when it returns.

    Raises:
        ManifestError: the state directory is not ours alone. OSError.
    """
    directory = _made(base, BY_HAND)
    _prune_by_hand(base)
    unit = next((guest.unit for guest in manifest.guests), "")
    link = os.path.join(directory, f"{manifest.run}@{unit}")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(link)
    os.symlink(os.path.abspath(path), link)
    sync_directory(link)


def by_hand(base: str | None = None) -> tuple[tuple[str, str], ...]:
    """(unit or "", path of the manifest), the oldest first; a manifest that is not there was thrown away. OSError."""
    return tuple((os.path.basename(link).partition("@")[2], os.readlink(link)) for link in _links(base))


def _links(base: str | None) -> list[str]:
    directory = os.path.join(base or state_directory(), BY_HAND)
    try:
        with os.scandir(directory) as entries:
            found = [(e.stat(follow_symlinks=False).st_mtime_ns, e.path) for e in entries if e.is_symlink()]
    except FileNotFoundError:
        return []
    return [path for _, path in sorted(found)]


def _prune_by_hand(base: str | None) -> None:
    with contextlib.suppress(OSError):
        for link in _links(base)[:-KEPT_RUNS]:
            if _is_over(os.readlink(link)):
                os.unlink(link)


def _drop_by_hand(path: str, base: str | None = None) -> None:
    with contextlib.suppress(OSError):
        for link in _links(base):
            if os.readlink(link) == path:
                os.unlink(link)


# -- who works on it


def working_on(path: str) -> str:
    """Who works on a manifest, as far as we may look; "" for nobody."""
    holder = file_holder(f"{path}.lock")
    return _who(holder) if holder is not None else ""


def _who(holder: Mapping[str, object]) -> str:
    return f"{holder.get('command', 'somebody')} (pid {holder.get('pid', '?')})"


def hold(path: str, what: str) -> ProcessLock:
    """Work on a manifest and what it tells of, alone, until released; by two at once a guest could be loaded twice.

    Raises:
        Busy: somebody does. OSError.
    """
    try:
        holder = {"command": what}
        return file_lock(f"{path}.lock", boot_id=proc.boot_id(), owner_uid=os.geteuid(), holder=holder)
    except LockHeld as held:
        who = _who(held.holder)
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
    _drop_by_hand(path)
    shutil.rmtree(path.removesuffix(MANIFEST_SUFFIX) + OLD_SUFFIX, ignore_errors=True)
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
