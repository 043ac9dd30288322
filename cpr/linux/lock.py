"""One change per process at a time: a flock'ed file named by pid and start time, in one place for all users.

The lock falls with its holder, however that dies. The file says who holds it. A directory that anybody may write to
needs care: links and files of strangers are refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class LockHeld(BlockingIOError):
    """Somebody has it; `holder` is what they wrote about themselves."""

    def __init__(self, path: str, holder: Mapping[str, Any]) -> None:
        super().__init__(f"{path} is locked")
        self.holder = dict(holder)


def make_run_directory(path: str) -> None:
    """Make it and its `locks` and `runs`, which every user may add to and nobody may take others' files from.

    Raises:
        PermissionError: it is not there and may not be made.
    """
    os.makedirs(path, mode=0o755, exist_ok=True)
    for name in ("locks", "runs"):
        below = os.path.join(path, name)
        with contextlib.suppress(FileExistsError):
            os.mkdir(below, 0o700)
            os.chmod(below, 0o1777)


@contextlib.contextmanager
def process_lock(
    directory: str, pid: int, start_time: int, *, boot_id: str, owner_uid: int, holder: Mapping[str, Any]
) -> Iterator[None]:
    """Hold the lock on a process while inside.

    Raises:
        LockHeld: another holds it.
        PermissionError: the file is not ours, root's or the process owner's: somebody planted it.
        OSError: it cannot be made.
    """
    path = os.path.join(directory, "locks", f"{pid}-{start_time}")
    number = _locked(path, owner_uid)
    try:
        who = {"pid": os.getpid(), "boot_id": boot_id, "since": time.time(), **holder}
        os.ftruncate(number, 0)
        os.pwrite(number, json.dumps(who).encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)  # while it is still locked: who waits for it sees that it is not the file any more
        os.close(number)


def _locked(path: str, owner_uid: int) -> int:
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            facts = os.fstat(number)
            if not stat.S_ISREG(facts.st_mode) or facts.st_uid not in {0, owner_uid, os.geteuid()}:
                raise PermissionError(f"{path} was put there by user {facts.st_uid}; remove it")
            if os.geteuid() == 0 and facts.st_uid == 0 and owner_uid != 0:
                os.fchown(number, owner_uid, -1)
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LockHeld(path, _holder(number)) from None
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path, follow_symlinks=False).st_ino == facts.st_ino:
                    return number
        except BaseException:
            os.close(number)
            raise
        os.close(number)  # unlinked by its last holder meanwhile: once more


def _holder(number: int) -> dict[str, Any]:
    with contextlib.suppress(ValueError, OSError):
        value = json.loads(os.pread(number, 4096, 0))
        if isinstance(value, dict):
            return value
    return {}
