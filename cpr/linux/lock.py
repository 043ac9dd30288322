"""One change per process at a time: a flock'ed file in one place for all users, released with its holder's death.

    DIRECTORY (root, 0755)
     ├── locks/ (1777)  <pid>-<start time>, one JSON object: who holds it
     └── runs/  (1777)

Everybody may create files in `locks`, so nothing in it is trusted: a link is not followed, a file of a stranger, with
a second name, or of another kind is refused. A file is removed by its holder while it is still locked; whoever waited
for that very file sees that the name leads elsewhere now, and begins anew.

Out of scope: what the holder does, and where the directory is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_HOLDER = 4096
"""Bytes of a lock file that are read."""

LOOK = "look"
"""`command` of a holder who changes nothing and will soon be through: whoever can, waits for it."""
LOOK_SECONDS = 10.0

_TRIES = 100


class LockHeld(Exception):
    """Somebody holds it; `holder` is what they wrote: pid, since, boot_id, and what they were called with."""

    def __init__(self, path: str, holder: dict[str, Any]) -> None:
        super().__init__(f"{path} is held by pid {holder.get('pid', '(unknown)')}")
        self.path = path
        self.holder = holder


class ProcessLock:
    """A held lock; `release` gives it back and removes the file."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self._fd = fd

    def release(self) -> None:
        """Once; afterwards a no-op."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        with contextlib.suppress(OSError):
            if _same(os.fstat(fd), os.stat(self.path, follow_symlinks=False)):
                os.unlink(self.path)
        os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def process_lock(
    directory: str, pid: int, start_time: int, *, boot_id: str, owner_uid: int, holder: Mapping[str, Any]
) -> ProcessLock:
    """Lock a process against other changes: DIRECTORY/locks/<pid>-<start time>, held until released or until we die.

    `directory` is one made by `make_run_directory`; `owner_uid` is the user of the locked process, who may lock too;
    `holder` (strings and numbers) is written into the file beside our pid, the boot id and the time (seconds of the
    epoch). Children made by a bare fork() hold it too, until they exec.

    Raises:
        LockHeld: somebody has it. PermissionError: not ours to lock, or a planted file. OSError.
    """
    path = os.path.join(directory, "locks", f"{pid}-{start_time}")
    return file_lock(path, boot_id=boot_id, owner_uid=owner_uid, holder=holder)


def file_lock(path: str, *, boot_id: str, owner_uid: int, holder: Mapping[str, Any]) -> ProcessLock:
    """As `process_lock`, of a file of its own, which is made and at the end removed."""
    record = {"pid": os.getpid(), "boot_id": boot_id, "since": time.time(), **holder}
    for _ in range(_TRIES):
        fd = _open(path, owner_uid)
        try:
            if fd is not None and _take(fd, path, owner_uid):
                _write(fd, record)
                return ProcessLock(path, fd)
        except BaseException:
            if fd is not None:
                os.close(fd)
            raise
        if fd is not None:
            os.close(fd)
    raise OSError(errno.EAGAIN, "the lock file changes all the time", path)


def patient_lock(
    directory: str,
    pid: int,
    start_time: int,
    *,
    boot_id: str,
    owner_uid: int,
    holder: Mapping[str, Any],
) -> ProcessLock:
    """As `process_lock`, but a holder that only looks is waited for, up to LOOK_SECONDS."""
    end = time.monotonic() + LOOK_SECONDS
    while True:
        try:
            return process_lock(directory, pid, start_time, boot_id=boot_id, owner_uid=owner_uid, holder=holder)
        except LockHeld as held:
            if held.holder.get("command") != LOOK or time.monotonic() > end:
                raise
        time.sleep(0.02)


def holder_of(directory: str, pid: int, start_time: int) -> dict[str, Any] | None:
    """What the holder of a process's lock wrote; None: nobody holds it, as far as we may look."""
    return file_holder(os.path.join(directory, "locks", f"{pid}-{start_time}"))


def file_holder(path: str) -> dict[str, Any] | None:
    """As `holder_of`, of a `file_lock`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        holder = _read(fd)
        # for who takes it at this moment a shared lock of ours would be in the way: one that is left over is not tried
        if isinstance(holder.get("pid"), int) and not os.path.exists(f"/proc/{holder['pid']}"):
            return None
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return holder
    except OSError:
        return None
    finally:
        os.close(fd)
    return None


def _open(path: str, owner_uid: int) -> int | None:
    """The file, made if it is not there; None: look again.

    Not one open with O_CREAT: fs.protected_regular (kernel 4.19) refuses that for another's file in a sticky directory
    of root.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise PermissionError(errno.EPERM, "planted: not a regular file", path) from None
        raise
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return None
    if os.geteuid() == 0 and owner_uid != 0:
        try:
            os.fchown(fd, owner_uid, -1)
        except OSError:
            os.close(fd)
            raise
    return fd


def _take(fd: int, path: str, owner_uid: int) -> bool:
    """Lock the open file; False where it is not the one at the path any more."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise PermissionError(errno.EPERM, "planted: not a regular file", path)
    if status.st_uid not in (0, owner_uid, os.geteuid()):
        raise PermissionError(errno.EPERM, f"planted by uid {status.st_uid}", path)
    if status.st_nlink > 1:
        raise PermissionError(errno.EPERM, "planted: the file has another name", path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockHeld(path, _read(fd)) from None
    try:
        now = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return _same(status, now) and now.st_nlink == 1


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def _write(fd: int, record: Mapping[str, Any]) -> None:
    """Who holds it, as far as there is room: it is held all the same."""
    data = json.dumps(record).encode() + b"\n"
    with contextlib.suppress(OSError):
        os.ftruncate(fd, os.pwrite(fd, data, 0))


def _read(fd: int) -> dict[str, Any]:
    """What the holder wrote: {} where it has not yet, or wrote nonsense."""
    try:
        value = json.loads(os.pread(fd, MAX_HOLDER, 0).split(b"\n")[0])
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def make_run_directory(path: str) -> None:
    """Make PATH (0755) with sticky, world-writable `locks` and `runs` below, or see that it is well-formed.

    Raises:
        PermissionError: it cannot be made, is a link, or belongs to somebody who is neither root nor us.
    """
    _make(path, 0o755)
    for name in ("locks", "runs"):
        _make(os.path.join(path, name), 0o1777)


def _make(path: str, mode: int) -> None:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except PermissionError:
        raise PermissionError(
            errno.EACCES, f"no right to make {path}: root makes it once, then every user can use it", path
        ) from None
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(os.lstat(path).st_mode):
            raise PermissionError(errno.EPERM, "not a directory, or a link to one", path)
        if status.st_uid not in (0, os.geteuid()):
            raise PermissionError(errno.EPERM, f"belongs to uid {status.st_uid}: neither root nor us", path)
        if stat.S_IMODE(status.st_mode) == mode:
            return
        if status.st_uid == os.geteuid():
            os.fchmod(fd, mode)
        elif status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
            raise PermissionError(errno.EPERM, "everybody may write there and it is not sticky", path)
    finally:
        os.close(fd)
