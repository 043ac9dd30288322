"""All guests of a reboot on their way to their files, side by side; and back.

Out of scope: the manifest, the kernel, and when which is done (reboot.py).
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from typing import TYPE_CHECKING, TypeVar

from cpr.app.examine import Examined, in_parallel
from cpr.checks.binary import same_binary
from cpr.checks.reboot import copied
from cpr.errors import CprError
from cpr.reboot import store
from cpr.reboot.saving import Saver
from cpr.reboot.trial import try_state

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cpr.app.world import Choices
    from cpr.model import NextKernel
    from cpr.progress import Progress
    from cpr.reboot.goingon import WentOn
    from cpr.reboot.manifest import SavedGuest

T = TypeVar("T")

SIDE_BY_SIDE = 64
"""Between the first stop and the last continuation every guest waits for all others."""


class Saving:
    """The savers of several guests. What one of them raises ends all, when all have come to an end."""

    def __init__(
        self,
        guests: Sequence[Examined],
        directory: str,
        choices: Choices,
        progress: Progress,
        attend: Callable[[], None],
        kexec: NextKernel,
    ) -> None:
        self.notes: dict[int, list[str]] = {}
        """By pid."""
        self._guests = tuple(guests)
        self._directory = directory
        self._choices = choices
        self._progress = progress
        self._attend = attend
        self._kexec = kexec
        self._savers: dict[int, Saver] = {}

    def prepare(self) -> None:
        """Copy the old QEMUs, connect, write down what is known. Nothing is touched."""
        copies: dict[tuple[int, int], str] = {}
        run = os.path.basename(self._directory)
        for examined in self._guests:
            guest = examined.guest
            assert guest is not None
            binary = guest.binary.identity
            if binary not in copies:
                copies[binary] = store.pin(guest.process.pid, os.path.join(self._directory, f"old-{len(copies)}"))
            pid = guest.process.pid
            lost = frozenset(block.id for block in copied(guest, self._kexec))
            name = store.state_name(guest.name, pid)
            path = os.path.join(self._directory, name)
            if lost:
                assert self._kexec.save_ram is not None
                path = os.path.join(store.make_directory(self._kexec.save_ram.path), f"{run}-{name}")
            self._savers[pid] = Saver(
                guest,
                path,
                target=examined.target,
                lost=lost,
                pinned=copies[binary],
                attend=self._attend,
            )
        self._all("look", lambda saver: saver.prepare())

    def known(self) -> tuple[SavedGuest, ...]:
        return tuple(saver.known for saver in self._savers.values())

    def try_states(self) -> None:
        """Where the QEMU is going to be another one. Two at a time: each starts two more QEMUs."""
        others = [
            e for e in self._guests if e.guest and e.target and not same_binary(e.guest.binary, e.target.binary)
        ]

        def one(examined: Examined) -> None:
            assert examined.guest is not None
            assert examined.target is not None
            self._attend()
            self._tell(examined.label, "try whether the new QEMU takes its state")
            pid = examined.guest.process.pid
            self.notes.setdefault(pid, []).extend(try_state(self._savers[pid], examined.target))

        _raise_first(in_parallel(_caught(one), others, min(2, self._choices.jobs)))

    def suspend(self) -> None:
        """Put those to sleep that have a passed-through device."""
        self._all("suspend", lambda saver: saver.suspend() if saver.known.vfio else None)

    def save(self) -> None:
        """Stop and save all, and seal them."""

        def one(saver: Saver) -> None:
            saver.save()
            saver.seal()

        self._all("save", one)

    def undo(self) -> dict[int, WentOn]:
        """Every guest goes on; where each is, by pid."""
        savers = tuple(self._savers.items())
        return dict(zip(dict(savers), in_parallel(lambda s: s[1].undo(), savers, SIDE_BY_SIDE), strict=True))

    @property
    def stuck(self) -> bool:
        """One of them cannot go on where it is any more."""
        return any(saver.stuck for saver in self._savers.values())

    def quit(self) -> None:
        """End every old QEMU."""
        self._all("end the old QEMU", lambda saver: saver.quit())

    def close(self) -> None:
        """Hang up; nothing is done to the guests."""
        for saver in self._savers.values():
            saver.close()

    def remove_states(self) -> None:
        """Files of guests that run on, and the copies of their QEMUs. Never raises."""
        for saver in self._savers.values():
            with contextlib.suppress(OSError):
                os.unlink(saver.path)
        for directory in glob.glob(os.path.join(glob.escape(self._directory), "old-*")):
            shutil.rmtree(directory, ignore_errors=True)

    def _all(self, text: str, work: Callable[[Saver], object]) -> None:
        def one(saver: Saver) -> None:
            self._tell(saver.guest.name or str(saver.guest.process.pid), text)
            work(saver)

        _raise_first(in_parallel(_caught(one), tuple(self._savers.values()), SIDE_BY_SIDE))

    def _tell(self, label: str, text: str) -> None:
        event = {"event": "step", "step": "Save", "text": text, "state": "doing", "commit": False}
        self._progress.event(label, event)


def _caught(work: Callable[[T], None]) -> Callable[[T], BaseException | None]:
    """What it raises as its answer: the others are waited for."""

    def one(item: T) -> BaseException | None:
        try:
            work(item)
        except (CprError, OSError) as error:
            return error
        return None

    return one


def _raise_first(errors: Sequence[BaseException | None]) -> None:
    for error in errors:
        if error is not None:
            raise error
