"""The guardian: a process of its own that finishes or undoes what `cpr save` or `cpr update --kexec` has begun, if that
dies before it is through. No guest stands still for longer than it takes to notice.

    command ── "done", or nothing ──► guardian's standard input: its end without a word is the command's death

It does nothing once the jump has begun: what was saved is restored after the boot then, or by hand.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from cpr.linux import ours

if TYPE_CHECKING:
    from collections.abc import Iterator

DONE = b"done"
LOCK_SECONDS = 30.0
"""The dead command's lock falls with it."""
END_SECONDS = 5.0
TRIES = 3
AGAIN_SECONDS = 2.0


@contextlib.contextmanager
def guard(path: str) -> Iterator[int]:
    """Have a guardian watch over the manifest at `path` within the context; its pid.

    Raises:
        OSError: no process can be started.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "cpr.app.guardian", path],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=None if os.environ.get("CPR_DEBUG") else subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
        env=ours.environment(),
    )
    assert process.stdin is not None
    try:
        yield process.pid
    except BaseException:  # what was not brought to an end is its business, when our locks have fallen
        with contextlib.suppress(OSError):
            process.stdin.close()
        raise
    with contextlib.suppress(OSError):
        process.stdin.write(DONE)
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)


def main() -> None:
    """The guardian itself."""
    ours.outlive()
    path = sys.argv[1]
    if sys.stdin.buffer.read() == DONE:
        return
    finish_alone(path)


def finish_alone(path: str) -> None:
    """Finish it, if there is anything left to be; nobody is told."""
    from cpr.app.finish import finish, watched
    from cpr.app.world import real_world
    from cpr.errors import CprError, Exit, NotFound

    for _ in range(TRIES):
        try:
            if not watched(path):
                return
            outcomes = finish(path, real_world(), patience=LOCK_SECONDS)
            if all(outcome.exit_code != Exit.NEEDS_ATTENTION for outcome in outcomes):
                return
        except NotFound:
            return
        except (CprError, OSError):
            pass
        time.sleep(AGAIN_SECONDS)


if __name__ == "__main__":
    main()
