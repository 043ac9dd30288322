"""What a guest has that no command line says, to be put back on the new QEMU: plain values, for `Settle` and `recover`.

The journal has them from before the new QEMU is started: a keeper may die after the commit, and the old QEMU, the only
other place where they can be read, is gone then.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from cpr.engines import threads
from cpr.errors import CommandFailed, CprError, MonitorError, StepFailed
from cpr.linux import likeness
from cpr.linux.likeness import ThreadPlacement
from cpr.qemu import migration
from cpr.qemu.network import parse_forwards

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from cpr.model import Guest
    from cpr.qemu.qmp import Monitor

GAP_SECONDS = 5.0
"""How long an address that the old QEMU held is tried for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is to be put back."""

    capabilities: Mapping[str, bool]
    parameters: Mapping[str, Any]
    discarding: tuple[str, ...]
    """QOM paths of the memory backends with discard-data=on."""
    stats_polling: tuple[tuple[str, int], ...]
    """(QOM path of a balloon, seconds)."""
    threads: Mapping[str, ThreadPlacement]
    """By what a thread is for, as in threads.py."""
    pidfile: str
    cwd: str
    hand_back: tuple[str, ...]
    """HMP commands that open again what cannot be inherited."""

    @classmethod
    def of(cls, guest: Guest, placement: Iterable[ThreadPlacement], hand_back: Iterable[str]) -> Self:
        placed = {p.tid: p for p in placement}
        wanted = threads.of_guest(guest)
        return cls(
            capabilities=dict(guest.capabilities),
            parameters={name: guest.parameters[name] for name in migration.PARAMETERS if name in guest.parameters},
            discarding=tuple(b.qom_path for b in guest.ram if b.discard_data),
            stats_polling=guest.stats_polling,
            threads={name: placed[tid] for name, tid in wanted.items() if tid in placed},
            pidfile=guest.pidfile,
            cwd=guest.cwd,
            hand_back=tuple(hand_back),
        )

    def json(self) -> dict[str, Any]:
        return {
            "capabilities": dict(self.capabilities),
            "parameters": dict(self.parameters),
            "discarding": list(self.discarding),
            "stats_polling": [list(entry) for entry in self.stats_polling],
            "threads": {name: placement.json() for name, placement in self.threads.items()},
            "pidfile": self.pidfile,
            "cwd": self.cwd,
            "hand_back": list(self.hand_back),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError, ValueError where it is none."""
        return cls(
            capabilities={str(k): bool(v) for k, v in value["capabilities"].items()},
            parameters=dict(value["parameters"]),
            discarding=tuple(map(str, value["discarding"])),
            stats_polling=tuple((str(path), int(seconds)) for path, seconds in value["stats_polling"]),
            threads={str(k): ThreadPlacement.from_json(v) for k, v in value["threads"].items()},
            pidfile=str(value["pidfile"]),
            cwd=str(value["cwd"]),
            hand_back=tuple(map(str, value["hand_back"])),
        )


def put_back(monitor: Monitor, settings: Settings, *, old: int, new: int) -> list[str]:
    """Give the new QEMU (pid `new`) what the old one had; what failed, in words. A silent one is not asked on."""
    failed: list[str] = []

    def polling() -> None:
        for path, seconds in settings.stats_polling:
            monitor.execute("qom-set", path=path, property="guest-stats-polling-interval", value=seconds)

    steps: tuple[Callable[[], None], ...] = (
        lambda: migration.restore(monitor, settings.capabilities, settings.parameters),
        lambda: set_discard(monitor, settings.discarding, on=True),
        polling,
        lambda: _place_threads(monitor, settings.threads, new),
    )
    for step in steps:
        try:
            step()
        except CommandFailed as error:
            failed.append(error.message)
        except MonitorError as error:
            failed.append(error.message)
            break
        except (CprError, OSError) as error:
            failed.append(str(error))
    try:
        rewrite_pidfile_of(settings.pidfile, settings.cwd, old, new)
    except OSError as error:
        failed.append(str(error))
    return failed


def set_discard(monitor: Monitor, paths: Collection[str], *, on: bool) -> None:
    """Set `discard-data` of memory backends and read it back. Raises `StepFailed` where it does not stay."""
    for path in paths:
        monitor.execute("qom-set", path=path, property="discard-data", value=on)
        if monitor.execute("qom-get", path=path, property="discard-data") is not on:
            raise StepFailed(f"discard-data={'on' if on else 'off'}", f"{path} does not take it")


def _place_threads(monitor: Monitor, placed: Mapping[str, ThreadPlacement], pid: int) -> None:
    """vCPU and I/O threads get the affinity, scheduling and cgroup of those they replace."""
    there = threads.now(monitor, pid) if placed else {}
    for name, placement in placed.items():
        if name in there:
            likeness.apply_placement(there[name], placement)


def hand_back(monitor: Monitor, commands: Iterable[str], since: float | None = None) -> tuple[list[str], list[str]]:
    """Open again what cannot be inherited: (for how long nobody listened, what failed), in words.

    `since`: when the old QEMU was ended (time.monotonic). A port that is open (whoever did this before us has died
    meanwhile) stays as it is.
    """
    told, failed = [], []
    for command in commands:
        if since is None and _is_open(monitor, command):
            continue
        words = _try(monitor, command)
        if words:
            failed.append(f"{command}: {words}")
        elif since is not None:
            told.append(f"{command}: nobody listened for {(time.monotonic() - since) * 1000:.0f} ms")
        else:
            told.append(f"{command}: nobody listened for a while")
    return told, failed


def _is_open(monitor: Monitor, command: str) -> bool:
    """Whether the port of a hostfwd_add is forwarded now."""
    name, _, rule = command.partition(" ")
    if name != "hostfwd_add":
        return False
    printed = str(monitor.execute("human-monitor-command", command_line="info usernet"))
    return rule.rpartition(" ")[2] in {rule for _, rule in parse_forwards(printed)}


def _try(monitor: Monitor, command: str) -> str:
    deadline = time.monotonic() + GAP_SECONDS
    while True:
        words = str(monitor.execute("human-monitor-command", command_line=command)).strip()
        if not words or words.startswith("Waiting for gdb connection"):
            return ""
        if time.monotonic() > deadline:
            return words
        time.sleep(0.02)


def rewrite_pidfile_of(pidfile: str, cwd: str, old: int, new: int) -> None:
    """Write the new pid into the guest's pid file, in place, if it holds the old one.

    The path is the guest's word, so nothing else is believed of it: it must be a regular file, reached without
    following a link at its end, whose whole content is the old pid.

    Raises:
        OSError: it cannot be read or written.
    """
    if not pidfile:
        return
    path = os.path.join(cwd, pidfile)
    with contextlib.suppress(FileNotFoundError):
        number = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(number, "r+b", buffering=0) as file:
            if file.read(64).strip() != str(old).encode():
                return
            file.seek(0)
            file.write(f"{new}\n".encode())
            file.truncate()
