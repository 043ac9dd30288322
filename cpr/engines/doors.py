"""Nobody comes in by the new QEMU's doors before it has the guest, and nobody by the old one's afterwards.

Both QEMUs listen on the same sockets from the start of the new one on, and whoever is quicker gets the client. One that
the new QEMU took before it had the state would type into a device that is about to be overwritten. So each chardev of
the new QEMU where nobody is connected is given a client of ours that says nothing (`add_client`), as the first thing of
all: with a client it does not accept others, and the guest does not see it, for the state is loaded after that. At the
switch the old QEMU is stopped (SIGSTOP), so that it accepts nobody any more; who comes from then on waits in the
kernel's queue.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from typing import TYPE_CHECKING

from cpr.engines.successor import doors
from cpr.errors import CommandFailed, StepFailed
from cpr.linux import proc
from cpr.qemu import clients, first_words

if TYPE_CHECKING:
    from collections.abc import Collection

    from cpr.linux.process import Process
    from cpr.model import Guest
    from cpr.run import Run

PATIENCE = 0.2
"""Seconds that a client is given to leave again which came before ours."""


class Shutting:
    """Our silent clients on their way: `commands` are sent with the negotiation, `settle` sees what became of them."""

    def __init__(self, run: Run, guest: Guest) -> None:
        assert run.old is not None
        wanted = doors(guest)
        listeners = {c.label: run.descriptors[f"listener:{c.label}"] for c in wanted}
        now = clients.connected_now(run.old.pid, wanted, listeners)
        self._run = run
        self._pairs = {c.label: socket.socketpair() for c in now if c.client is None}

    @property
    def commands(self) -> list[first_words.Command]:
        """All descriptors first, so that the doors are shut in quick succession."""
        names = {label: f"cpr-door-{number}" for number, label in enumerate(self._pairs)}
        given = [
            first_words.Command(name="getfd", arguments={"fdname": names[label]}, descriptor=theirs.fileno())
            for label, (_, theirs) in self._pairs.items()
        ]
        return given + [
            first_words.Command(name="add_client", arguments={"protocol": label, "fdname": names[label]})
            for label in self._pairs
        ]

    def settle(self) -> None:
        """Keep ours in `run.extra`. Where another client was quicker, it is given a moment to leave again."""
        shut: dict[str, socket.socket] = self._run.extra.setdefault("doors", {})
        replies = self._run.successor.first_replies[len(self._pairs) :]
        for (label, (ours, theirs)), reply in zip(self._pairs.items(), replies, strict=True):
            theirs.close()
            if "error" in reply:
                ours.close()
                ours = self._again(label)
            shut[label] = ours
        self._pairs.clear()

    def _again(self, label: str) -> socket.socket:
        deadline = time.monotonic() + PATIENCE
        while True:
            ours, theirs = socket.socketpair()
            with theirs:
                self._run.successor.send_fd("cpr-door", theirs.fileno())
            try:
                self._run.successor.execute("add_client", protocol=label, fdname="cpr-door")
                return ours
            except CommandFailed:
                ours.close()
                if time.monotonic() > deadline:
                    raise StepFailed(
                        "shut the new QEMU's doors",
                        f"a client came to {label} in the moment when the new QEMU began to listen",
                        hint="try again",
                    ) from None
            time.sleep(0.005)

    def close(self) -> None:
        """Give up what is left; nothing after `settle`."""
        for pair in self._pairs.values():
            for sock in pair:
                sock.close()
        self._pairs.clear()


def drop(run: Run) -> None:
    """Our clients hang up; the new QEMU is dead."""
    for sock in run.extra.pop("doors", {}).values():
        sock.close()


def open_doors(run: Run, moving: Collection[str]) -> None:
    """Take our clients away; return when the new QEMU has noticed it of the chardevs `moving`, which get a client."""
    shut: dict[str, socket.socket] = run.extra.pop("doors", {})
    for sock in shut.values():
        sock.close()
    waiting = shut.keys() & set(moving)
    deadline = time.monotonic() + PATIENCE
    while waiting and time.monotonic() < deadline:
        told = run.successor.execute("query-chardev")
        waiting = {e["label"] for e in told if e["label"] in waiting and not e["filename"].startswith("disconnected:")}


def stop_accepting(old: Process) -> None:
    """Stop the old QEMU, whose guest stands still for good unless the update is undone."""
    with contextlib.suppress(ProcessLookupError):
        old.signal(signal.SIGSTOP)
        deadline = time.monotonic() + 0.1
        while not proc.is_stopped(old.pid) and time.monotonic() < deadline:
            os.sched_yield()


def go_on(old: Process) -> None:
    """Undo `stop_accepting`; of no effect on a process that is not stopped."""
    with contextlib.suppress(ProcessLookupError):
        old.signal(signal.SIGCONT)
