"""Two QEMUs on one tap queue: keep the old one's settings while the new one starts.

A QEMU that is given a tap descriptor sets the device up for itself at its start: a header of 10 bytes instead of the 12
that the guest's driver agreed on, no offloads, and every queue but the first detached (net/tap.c, hw/net/virtio-net.c).
The descriptor is the old QEMU's too: measured, 150 to 250 ms in which every packet of the running guest was cut two
bytes off. The guard puts the settings back within a millisecond, for as long as the old QEMU runs the guest.

Of queues that are detached by itself the new QEMU must find them so when it loads the state (it asserts that attaching
works), so a guest with several queues is stopped before the guard lets go.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cpr.linux import tun

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cpr.linux.fds import Fd

INTERVAL = 0.0005
"""Seconds between two looks."""


class TapGuard:
    """Watches the queues from `start` to `stop`; `restore` gives the old QEMU back what it had."""

    def __init__(self, taps: Mapping[str, Fd]) -> None:
        self._taps = dict(taps)
        self._wanted = {name: tun.read_queue(fd) for name, fd in taps.items()}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def several(self) -> bool:
        """Whether a device has more than one queue."""
        return any(queue.multi for queue in self._wanted.values())

    def settings(self) -> list[dict[str, Any]]:
        """For the journal, in the order of the descriptors."""
        return [asdict(queue) for queue in self._wanted.values()]

    def start(self) -> None:
        """Attach what is detached (a QEMU that finds a queue detached at its start gives up), and watch."""
        for name, queue in self._wanted.items():
            if queue.multi and not queue.attached:
                with contextlib.suppress(OSError):
                    tun.set_attached(self._taps[name], True)
        self._thread = threading.Thread(target=self._watch, name="taps", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        """A queue the guest does not use is attached for the new QEMU's sake, until that detaches it: left alone."""
        used = {n: q for n, q in self._wanted.items() if q.attached}
        while not self._stop.wait(INTERVAL):
            for name, queue in used.items():
                with contextlib.suppress(OSError, ValueError):
                    tun.mend_queue(self._taps[name], queue)

    def stop(self) -> None:
        """Let go. Safe to repeat."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def hand_over(self) -> None:
        """Let go of a stopped guest's queues: as the new QEMU left them, all but each device's first detached."""
        self.stop()
        first: set[str] = set()
        for name, queue in self._wanted.items():
            if queue.multi and queue.name in first:
                with contextlib.suppress(OSError):
                    tun.set_attached(self._taps[name], False)
            first.add(queue.name)

    def restore(self) -> None:
        """Everything as the old QEMU had it. To be called when the new one is dead."""
        self.stop()
        for name, queue in self._wanted.items():
            restore_queue(self._taps[name], queue)


def restore_queue(fd: Fd, queue: tun.Queue) -> None:
    """Put one queue back, offloads included. What the device refuses is left."""
    with contextlib.suppress(OSError):
        tun.mend_queue(fd, queue)
    if queue.offloads:
        with contextlib.suppress(OSError):
            tun.set_offloads(fd, queue.offloads)
