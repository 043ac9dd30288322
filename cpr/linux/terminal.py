"""The modes of a terminal that QEMU uses as its console, and those that it will put back when it ends.

QEMU makes the terminal raw when it starts, and puts back what it found when it ends (chardev/char-stdio.c, `oldtty`).
A program that takes its place by exec would find raw modes and leave them behind. What the first one found stands in
its memory: in the writable data of the program, with the control characters that the terminal has. It counts only if
QEMU would have made of it exactly what the terminal has now.

Out of scope: terminals of which QEMU changes nothing; whether a process is in the foreground: setting modes does not
stop us (SIGTTOU is blocked meanwhile), and nobody else is asked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import struct
import termios
from dataclasses import dataclass

from cpr.linux.fds import Fd
from cpr.linux.maps import read_maps

_MODES = struct.Struct("=4IB19s")
"""The kernel's struct termios: input, output, control and local flags, line discipline, control characters. The C
library's begins likewise, with room for 32 characters."""
_CHARACTERS = 17
_INPUT = (
    *(termios.IGNBRK, termios.BRKINT, termios.PARMRK, termios.ISTRIP),
    *(termios.INLCR, termios.IGNCR, termios.ICRNL, termios.IXON),
)
_LOCAL = (termios.ECHO, termios.ECHONL, termios.ICANON, termios.IEXTEN)


@dataclass(frozen=True, slots=True)
class Console:
    """A terminal as QEMU has it, and as it was before. `number` is a descriptor of ours."""

    number: int
    now: bytes
    before: bytes
    nonblocking: bool

    def as_before(self) -> None:
        """As whoever starts on it should find it. Raises OSError."""
        self._set(self.before, nonblocking=False)

    def as_now(self) -> None:
        """As QEMU has it. Raises OSError."""
        self._set(self.now, nonblocking=self.nonblocking)

    def _set(self, modes: bytes, *, nonblocking: bool) -> None:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
        try:
            fcntl.ioctl(self.number, termios.TCSETS, modes)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.set_blocking(self.number, not nonblocking)


def console(pid: int, number: int) -> Console | None:
    """The terminal of ours at `number`, which the process has for its standard input; None where the modes that it had
    before are not found.

    Raises:
        OSError: it is no terminal (ENOTTY), or the process may not be looked into.
    """
    now = fcntl.ioctl(number, termios.TCGETS, bytes(_MODES.size))
    found: set[bytes] = set()
    program = os.stat(f"/proc/{pid}/exe").st_ino
    with Fd(os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)) as memory:
        end = 0
        for mapping in read_maps(pid):
            own = mapping.inode == program or (mapping.start == end and not mapping.inode)  # .data; .bss behind it
            end = mapping.end if own else 0
            if own and "w" in mapping.perms:
                with contextlib.suppress(OSError):
                    found |= _saved(os.pread(memory.number, mapping.size, mapping.start), now)
    if len(found) != 1:
        return None
    return Console(number, now, found.pop(), not os.get_blocking(number))


def _saved(data: bytes, now: bytes) -> set[bytes]:
    """Modes in some memory of which QEMU would have made those that are now."""
    flags = struct.calcsize("=4I")
    characters = now[flags : flags + 1 + _CHARACTERS]
    vtime, vmin = sorted((termios.VTIME, termios.VMIN))
    same = re.escape(characters[: 1 + vtime]) + b".{%d}" % (vmin - vtime + 1) + re.escape(characters[2 + vmin :])
    found = set()
    for match in re.finditer(b"(?=" + same + b")", data, re.DOTALL):
        start = match.start() - flags
        candidate = data[start : start + _MODES.size] if start >= 0 and start % 4 == 0 else b""
        if len(candidate) == _MODES.size and now[:flags] in raw(candidate):
            found.add(candidate)
    return found


def raw(modes: bytes) -> tuple[bytes, bytes]:
    """The flags that QEMU makes of modes: with signal characters (`signal=on`), and without."""
    inputs, outputs, control, local, *_ = _MODES.unpack(modes)
    inputs &= ~sum(_INPUT)
    outputs |= termios.OPOST
    control = control & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    local &= ~sum(_LOCAL)
    first, second = (struct.pack("=4I", inputs, outputs, control, value) for value in (local, local & ~termios.ISIG))
    return first, second
