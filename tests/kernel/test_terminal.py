"""A terminal's modes, on a pty: as QEMU makes them, set from wherever we are, found in a program's memory or not."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import termios
import time
from typing import TYPE_CHECKING

import pytest

from cpr.linux import terminal

if TYPE_CHECKING:
    from collections.abc import Iterator

FLAGS = 16


@pytest.fixture
def slave() -> Iterator[int]:
    master, number = pty.openpty()
    yield number
    os.close(number)
    os.close(master)


def modes(number: int) -> bytes:
    return fcntl.ioctl(number, termios.TCGETS, bytes(36))


@pytest.mark.parametrize("which", [0, 1])
def test_there_and_back(slave: int, which: int) -> None:
    before = modes(slave)
    now = terminal.raw(before)[which] + before[FLAGS:]
    it = terminal.Console(slave, now, before, nonblocking=True)
    it.as_now()
    assert (modes(slave), os.get_blocking(slave)) == (now, False)
    attributes = termios.tcgetattr(slave)
    assert not attributes[3] & (termios.ICANON | termios.ECHO)
    assert bool(attributes[3] & termios.ISIG) is (which == 0)
    it.as_before()
    assert (modes(slave), os.get_blocking(slave)) == (before, True)


def test_in_the_background_nobody_is_stopped(slave: int) -> None:
    """Of a process group that is not the terminal's, who sets modes is stopped (SIGTTOU): not so here."""
    before = modes(slave)
    it = terminal.Console(slave, terminal.raw(before)[0] + before[FLAGS:], before, nonblocking=False)
    leader = os.fork()
    if leader == 0:
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        background = os.fork()
        if background == 0:
            os.setpgid(0, 0)
            time.sleep(0.1)
            it.as_now()
            os._exit(7)
        _, status = os.waitpid(background, os.WUNTRACED)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1]) == 7
    assert modes(slave) == it.now


def test_a_program_that_knows_nothing_of_it(slave: int) -> None:
    assert terminal.console(os.getpid(), slave) is None
    read, write = os.pipe()
    try:
        with pytest.raises(OSError, match="ioctl"):
            terminal.console(os.getpid(), read)
    finally:
        os.close(read)
        os.close(write)
