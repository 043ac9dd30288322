"""The ways that QEMU has by itself to move a guest, driven over QMP as a careful manager would.

Each function moves a booted guest, ends the old QEMU and returns what it saw. All let the new QEMU dial its monitor
to us, so that RESUME is heard and nothing is polled. Sources: docs/devel/migration/CPR.rst of QEMU 11.1.

Out of scope: undoing. A move that fails is a failed sample, and the lab ends what is left of it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpr.errors import CommandFailed, MonitorError
from tests.bench import WayFailed
from tests.bench.guest import Bell, new_memory
from tests.lab.start import Orphan, said

if TYPE_CHECKING:
    from pathlib import Path

    from cpr.qemu.qmp import Monitor
    from tests.bench.guest import BenchGuest
    from tests.lab.qemu import QemuBuild

UNLIMITED = 10**12
"""Bytes a second; 0 means no limit too, but is no figure QEMU could reckon a downtime with."""
COMPLETE_SECONDS = 30.0
"""A local live migration that takes longer does not end by itself."""
QUIT_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A guest in its new QEMU. blackout and seconds, the whole move, are in seconds; console is where it listens."""

    process: Orphan
    blackout: float
    seconds: float
    console: Path


@functools.cache
def migration_modes(build: QemuBuild) -> frozenset[str]:
    """The values of the migration parameter `mode` that a QEMU knows, as it says itself (before 8.2: none)."""
    asked = [{"execute": "qmp_capabilities"}, {"execute": "query-qmp-schema"}, {"execute": "quit"}]
    done = subprocess.run(
        [*build.command, "-M", "none", "-nodefaults", "-display", "none", "-qmp", "stdio"],
        input="".join(json.dumps(command) + "\n" for command in asked),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    for line in done.stdout.splitlines():
        answer = json.loads(line).get("return")
        for kind in answer if isinstance(answer, list) else []:
            values = set(kind.get("values", []))
            if "cpr-reboot" in values:
                return frozenset(values)
    return frozenset()


def cpr_transfer(guest: BenchGuest) -> Moved:
    """Mode cpr-transfer: RAM's descriptors over a channel of their own, the devices' state over another.

    The target reads the cpr channel before it opens a monitor, so `migrate` comes first here. Closing that channel,
    at `migrate-incoming`, is what tells the old QEMU to stop the guest.
    """
    began = time.monotonic()
    directory = guest.lab.directory
    cpr, main = directory / "cpr.sock", directory / "main.sock"
    channels = [channel("main", main), channel("cpr", cpr)]
    with contextlib.ExitStack() as stack:
        bell = stack.enter_context(Bell(directory / "bell"))
        incoming = ["-incoming", "defer", "-incoming", json.dumps(channels[1])]
        process = guest.start_qemu(guest.case.new, guest.new, *bell.words, *incoming)
        wait_listening(cpr, process)
        old = stack.enter_context(guest.monitor())
        want_events(old)
        old.execute("migrate-set-parameters", mode="cpr-transfer")
        old.execute("migrate", channels=channels)
        new = stack.enter_context(answered(bell, process, guest, old))
        new.execute("migrate-incoming", uri=f"unix:{main}")
        blackout = resumed(old, new, guest)
        quit_old(old, guest)
    return Moved(process=process, blackout=blackout, seconds=time.monotonic() - began, console=guest.new.console)


def cpr_exec(guest: BenchGuest) -> Moved:
    """Mode cpr-exec: the old QEMU saves its state to a file and executes the new one in its own process."""
    began = time.monotonic()
    directory = guest.lab.directory
    state = directory / "state"
    with contextlib.ExitStack() as stack:
        bell = stack.enter_context(Bell(directory / "bell"))
        command = [*guest.words(guest.case.new, guest.new, guest.memory), *bell.words, "-incoming", "defer"]
        old = stack.enter_context(guest.monitor())
        want_events(old)
        old.execute_arguments("migrate-set-parameters", {"mode": "cpr-exec", "cpr-exec-command": command})
        old.execute("migrate", uri=f"file:{state}")
        new = stack.enter_context(answered(bell, guest.process, guest, old))
        new.execute("migrate-incoming", uri=f"file:{state}")
        blackout = resumed(None, new, guest, stopped=stop_of(old))
    seconds = time.monotonic() - began
    return Moved(process=guest.process, blackout=blackout, seconds=seconds, console=guest.new.console)


def live(guest: BenchGuest) -> Moved:
    """A live migration to a second QEMU with RAM of its own, over a UNIX socket as fast as it goes."""
    began = time.monotonic()
    main = guest.lab.directory / "main.sock"
    with contextlib.ExitStack() as stack:
        bell = stack.enter_context(Bell(guest.lab.directory / "bell"))
        memory = new_memory(guest.case.size)
        stack.callback(os.close, memory)
        incoming = [*bell.words, "-incoming", "defer"]
        process = guest.start_qemu(guest.case.new, guest.new, *incoming, memory=memory)
        new = stack.enter_context(answered(bell, process, guest))
        new.execute("migrate-incoming", uri=f"unix:{main}")
        old = stack.enter_context(guest.monitor())
        want_events(old)
        old.execute("migrate-set-parameters", max_bandwidth=UNLIMITED)
        old.execute("migrate", uri=f"unix:{main}")
        blackout = resumed(old, new, guest)
        quit_old(old, guest)
    return Moved(process=process, blackout=blackout, seconds=time.monotonic() - began, console=guest.new.console)


def save_and_restart(guest: BenchGuest) -> Moved:
    """Stop, save everything to a file, quit, start the new QEMU, load, go on."""
    began = time.monotonic()
    state = guest.lab.directory / "state"
    with contextlib.ExitStack() as stack:
        bell = stack.enter_context(Bell(guest.lab.directory / "bell"))
        memory = new_memory(guest.case.size)
        stack.callback(os.close, memory)
        old = stack.enter_context(guest.monitor())
        want_events(old)
        old.execute("migrate-set-parameters", max_bandwidth=UNLIMITED)
        old.execute("stop")
        stopped = stop_of(old)
        completed(old, guest, after=to_file(old, "migrate", f"file:{state}", f"exec:cat >{state}"))
        quit_old(old, guest)
        incoming = [*bell.words, "-incoming", "defer"]
        process = guest.start_qemu(guest.case.new, guest.new, *incoming, memory=memory)
        new = stack.enter_context(answered(bell, process, guest))
        want_events(new)
        completed(new, guest, after=to_file(new, "migrate-incoming", f"file:{state}", f"exec:cat {state}"))
        new.execute("cont")
        blackout = resumed(None, new, guest, stopped=stopped)
    return Moved(process=process, blackout=blackout, seconds=time.monotonic() - began, console=guest.new.console)


def channel(kind: str, path: Path) -> dict[str, Any]:
    """A migration channel over the UNIX socket at `path`."""
    return {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": str(path)}}


def want_events(monitor: Monitor) -> None:
    """Have MIGRATION events sent."""
    monitor.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])


def to_file(monitor: Monitor, command: str, uri: str, older: str) -> int:
    """Migrate by `uri`, or by `older` where QEMU does not know the other kind (file: came with 8.2).

    Returns how many events came before: an unknown kind is an error and an event of a failed migration.
    """
    seen = monitor.event_count
    try:
        monitor.execute(command, uri=uri)
    except CommandFailed as error:
        if "protocol" not in str(error):
            raise
        monitor.execute("query-status")  # what there is to hear of the first attempt came before this answer
        seen = monitor.event_count
        monitor.execute(command, uri=older)
    return seen


def answered(bell: Bell, process: Orphan, guest: BenchGuest, old: Monitor | None = None) -> Monitor:
    """The new QEMU's monitor. Raises WayFailed with what it and the old one, if it is at work already, said."""
    try:
        return bell.answer(process)
    except (WayFailed, TimeoutError, MonitorError) as error:
        fail_if_failed(old)
        raise WayFailed(f"{error or 'the new QEMU does not dial its monitor'}: {last_words(guest)}") from None


def stop_of(old: Monitor) -> float:
    """When the guest stopped. Raises WayFailed."""
    try:
        return old.wait_event({"STOP"}, timeout=COMPLETE_SECONDS).timestamp
    except (TimeoutError, MonitorError):
        raise WayFailed("the old QEMU did not say STOP") from None


def resumed(old: Monitor | None, new: Monitor, guest: BenchGuest, *, stopped: float | None = None) -> float:
    """Wait for RESUME of the new QEMU; the blackout in seconds.

    Raises WayFailed: it did not come, or the old QEMU says that the migration failed.
    """
    deadline = time.monotonic() + COMPLETE_SECONDS
    while True:
        try:
            resume = new.wait_event({"RESUME"}, timeout=1).timestamp
            return resume - (stop_of(old) if old else stopped or 0)
        except TimeoutError:
            fail_if_failed(old)
            if time.monotonic() > deadline:
                raise WayFailed(f"not complete within {COMPLETE_SECONDS:g} s{progress(old)}") from None
        except MonitorError as error:
            fail_if_failed(old)
            raise WayFailed(f"{error}: {last_words(guest)}") from None


def completed(monitor: Monitor, guest: BenchGuest, *, after: int) -> None:
    """Wait until all is saved or loaded, as an event says after so many others. Raises WayFailed."""
    seconds = COMPLETE_SECONDS + guest.case.patience
    try:
        final = {"completed", "failed"}
        event = monitor.wait_event({"MIGRATION"}, lambda e: e.data.get("status") in final, timeout=seconds, after=after)
    except (TimeoutError, MonitorError) as error:
        raise WayFailed(f"{error}: {last_words(guest)}") from None
    if event.data["status"] == "failed":
        raise WayFailed(f"saving or loading failed: {last_words(guest)}")


def fail_if_failed(old: Monitor | None) -> None:
    """Raises WayFailed with the reason if the old QEMU's migration failed."""
    if old is None or not old.alive:
        return
    info = old.execute("query-migrate")
    if info.get("status") in {"failed", "cancelled"}:
        raise WayFailed(f"the migration failed: {info.get('error-desc', 'QEMU does not say why')}")


def progress(old: Monitor | None) -> str:
    """How far a migration came that does not end."""
    if old is None or not old.alive:
        return ""
    ram = old.execute("query-migrate").get("ram", {})
    if not ram:
        return ""
    rate, dirty = float(ram.get("mbps", 0)) / 8, int(ram.get("dirty-pages-rate", 0)) * int(ram.get("page-size", 4096))
    return f": {rate:.0f} MB/s are sent, {dirty / 1e6:.0f} MB/s are dirtied"


def quit_old(old: Monitor, guest: BenchGuest) -> None:
    """Have the old QEMU end, and wait for it. Raises WayFailed."""
    with contextlib.suppress(MonitorError):
        old.execute("quit")
    if not guest.process.wait(QUIT_SECONDS):
        raise WayFailed(f"the old QEMU does not quit within {QUIT_SECONDS:g} s")


def wait_listening(path: Path, process: Orphan) -> None:
    """Return once somebody listens at `path`. Asking by a connection would be taken for the real one."""
    deadline = time.monotonic() + 10
    while not listening(path):
        if not process.alive or time.monotonic() > deadline:
            raise WayFailed(f"nobody listens at {path.name}: {said(path.parent / 'new.log')}")
        time.sleep(0.001)


def listening(path: Path) -> bool:
    """Whether a UNIX socket listens at `path`; flag 10000 is __SO_ACCEPTCON (include/linux/net.h)."""
    with open("/proc/net/unix") as file:
        return any(words[3] == "00010000" and words[-1] == str(path) for words in map(str.split, file))


def last_words(guest: BenchGuest) -> str:
    """What the two QEMUs wrote to their logs."""
    logs = (guest.lab.directory / f"{seat.name}.log" for seat in (guest.old, guest.new))
    return "; ".join(f"{log.stem}: {said(log)}" for log in logs)
