"""Recover an update in place whose keeper died: whatever the process is now, the guest shall run in it.

    the old program            it goes on there, as after a handover that was not committed (`recover.py`)
    the new one, no commit     forward: the state lies in a memory file that the process has; it is loaded, clients get
                               their places, and the guest runs
    the new one, committed     what was left to do is done

The process has everything under the numbers that the journal names, so nothing of the keeper is needed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from typing import TYPE_CHECKING, Any

from cpr.engines import graft, mend, ptys, stream
from cpr.engines.borrow import BORROWED, SECONDS
from cpr.engines.execute import became
from cpr.engines.leftover import close_left
from cpr.engines.relay import Relay
from cpr.engines.switch import PassVncListeners, give_vnc
from cpr.errors import CommandFailed, CprError
from cpr.linux.fds import Fd, take_fd
from cpr.linux.tracer import Tracer
from cpr.model import MonitorAddress, Runstate
from cpr.qemu import clients, qmp

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from cpr.journal import Record
    from cpr.linux.process import Process
    from cpr.qemu.qmp import Monitor

LOAD_SECONDS = 30.0


@contextlib.contextmanager
def session(record: Record, process: Process) -> Iterator[Monitor]:
    """A session with the guest's QEMU. Where a client holds its only monitor again, that is borrowed for the time.

    Raises:
        MonitorError: QEMU does not answer, or the session cannot be borrowed. OSError.
    """
    guest = record.header["guest"]
    address = MonitorAddress(**guest["monitor"])
    if guest.get("monitor_held"):
        held = clients.holders(process.pid, address)
        if len(held) == 1 and not _is_kept(record, process, held[0]):
            with Tracer.start(process) as tracer:
                until = time.monotonic() + SECONDS
                with Relay.borrow(process, tracer, held[0], name=str(address), until=until) as relay:
                    try:
                        yield relay.monitor
                    finally:
                        relay.give_back(tracer)
            return
    with qmp.connect(address, process.pid, timeout=10.0) as monitor:
        yield monitor


def _is_kept(record: Record, process: Process, number: int) -> bool:
    """Whether this is a client's connection that was put aside, and nobody reads: the journal has where it belongs."""
    inode = graft.socket_inode(process.pid, number)
    facts = [fact for name, fact in record.facts.items() if name.startswith(BORROWED)]
    return any(int(f["inode"]) == inode and int(f["number"]) != number for f in facts)


def executed(record: Record) -> bool | None:
    """As `became`: whether the guest's process is the new program. Raises ProcessLookupError where it is gone."""
    fact = record.facts.get("exec")
    return False if fact is None else became(record.pid, int(fact["thread"]), fact["mark"])


def let_in(record: Record, process: Process) -> list[str]:
    """Have the old program take clients that were accepted in its place (`ExecNew`). What failed, in words."""
    came = record.facts.get("came", {}).get("clients", {})
    if not came:
        return []
    try:
        with session(record, process) as monitor:
            lost = _reconnect(process, monitor, came)
    except (CprError, OSError) as error:
        lost = [f"clients that came within the pause are turned away: {error}"]
    return lost + close_left(process, list(came.values()))


def withdraw(record: Record, process: Process) -> None:
    """Take clients of the keeper's, which hung up when it died, out of the queues in which they wait (`ExecNew`)."""
    for numbered in record.facts.get("standing in", {}).get("at", ()):
        with contextlib.suppress(OSError), _take(process, numbered) as listener:
            clients.withdraw(listener, process.pid)


def arrive(
    record: Record, process: Process, monitor: Monitor, fact: Mapping[str, Any]
) -> tuple[str, list[str]]:
    """Bring the guest to run in the program that `process` is now, from what the journal says of it (`fact`).

    Its runstate, and what it lost on the way, in words.

    Raises:
        CprError: it does not take the state, or does not answer; nothing ran, and nothing of it is lost. OSError.
    """
    lost: list[str] = []
    status = str(monitor.execute("query-status")["status"])
    if status == Runstate.INMIGRATE:
        _load(process, monitor, fact["state"])
        status = str(monitor.execute("query-status")["status"])
    if status == Runstate.RUNNING or record.steps.get(record.commit_index) == "done":
        return status, lost
    lost += _reconnect(process, monitor, fact.get("clients", {}))
    lost += _ptys(process, monitor, fact.get("ptys", {}))
    if record.header["guest"]["runstate"] == Runstate.RUNNING:
        monitor.execute("cont")
        status = str(monitor.execute("query-status")["status"])
    return status, lost


def put_in_order(record: Record, process: Process, monitor: Monitor, fact: Mapping[str, Any]) -> list[str]:
    """When the guest runs: VNC listens, and nothing is left over. What could not be done, in words."""
    names = [step["id"] for step in record.header["steps"]]
    done = {names[index] for index, state in record.steps.items() if state == "done"}
    lost = [] if PassVncListeners.__name__ in done else _listen(process, monitor, fact.get("vnc", []))
    return lost + close_left(process, fact.get("left", []), fact.get("helpers", []))


def _take(process: Process, numbered: Sequence[int]) -> Fd:
    """A duplicate of a descriptor, by its number and inode. Raises OSError where another one has the number now."""
    number, inode = map(int, numbered)
    taken = take_fd(process.pidfd, number)
    if os.fstat(taken.number).st_ino != inode:
        taken.close()
        raise OSError(errno.ESTALE, f"descriptor {number} is another one now")
    return taken


def _load(process: Process, monitor: Monitor, numbered: Sequence[int]) -> None:
    """Let QEMU load the state that lies in its own descriptor, if it was not told to yet."""
    deadline = time.monotonic() + LOAD_SECONDS

    def attend() -> None:
        if time.monotonic() > deadline:
            raise CprError("the new QEMU does not load the state", hint="cpr recover tries again")

    replies: list[dict[str, Any]] = [{"return": {}}] * 2
    if monitor.execute("query-migrate").get("status", "none") == "none":
        replies = []
        with _take(process, numbered) as state:
            os.lseek(state.number, 0, os.SEEK_SET)
        for command in stream.load_commands(int(numbered[0])):
            try:
                replies.append({"return": monitor.execute(command.name, **command.arguments)})
            except CommandFailed as error:
                replies.append({"error": {"desc": error.description}})
    if why := stream.await_load(monitor, replies, attend):
        raise CprError(f"the new QEMU does not take the state: {why}")


def _reconnect(process: Process, monitor: Monitor, known: Mapping[str, Sequence[int]]) -> list[str]:
    """Give the clients that were connected their places, where they are not there already."""
    lost = []
    for label, numbered in known.items():
        number, inode = map(int, numbered)
        if clients.socket_numbers(process.pid, besides=number).get(inode) is not None:
            continue  # the keeper has lived long enough
        try:
            with _take(process, numbered) as client:
                monitor.send_fd("cpr-client", client.number)
            monitor.execute("add_client", protocol=label, fdname="cpr-client")
        except (CommandFailed, OSError) as error:
            lost.append(f"the client of {label} lost its place: {error}")
    return lost


def _ptys(process: Process, monitor: Monitor, known: Mapping[str, Sequence[int]]) -> list[str]:
    """Give the chardevs their ptys, where they have them not already."""
    there = ptys.masters(process).values()
    kept = {label: int(numbered[0]) for label, numbered in known.items() if int(numbered[0]) in there}
    if not kept:
        return []
    try:
        ptys.give_back(process, monitor, kept)
    except (CprError, OSError) as error:
        return [f"{', '.join(kept)}: the guest has another pty now ({error})"]
    return []


def _listen(process: Process, monitor: Monitor, displays: Sequence[Sequence[Sequence[int]]]) -> list[str]:
    """Give QEMU the VNC listeners that its process has."""
    lost = []
    for listeners in displays:
        try:
            with contextlib.ExitStack() as held:
                taken = {f"cpr-vnc-{entry[0]}": held.enter_context(_take(process, entry)) for entry in listeners}
                give_vnc(monitor, taken)
        except (CommandFailed, OSError) as error:
            lost.append(f"a VNC display does not listen any more: {error}")
    return lost


def mend_monitors(record: Record, process: Process) -> list[str]:
    """Give the clients whose monitors were borrowed their sessions back. What could not be done, in words."""
    lost = []
    for name, fact in record.facts.items():
        if not name.startswith(BORROWED):
            continue
        try:
            kept = graft.find_kept(process.pid, int(fact["number"]), int(fact["inode"]))
            if kept is not None:
                shown = fact.get("show") and record.header["guest"]["runstate"] == Runstate.RUNNING
                with Tracer.start(process) as tracer:
                    mend.repair(
                        process,
                        tracer,
                        MonitorAddress(**fact["address"]),
                        kept,
                        human=bool(fact.get("human")),
                        oob=bool(fact.get("oob")),
                        first=_resumed() if shown else b"",
                    )
        except (CprError, OSError, TimeoutError) as error:
            lost.append(f"the client of the monitor {name.removeprefix(BORROWED)} has no session: {error}")
    return lost


def _resumed() -> bytes:
    """RESUME, for a client that may have been told of STOP: QEMU said it when nobody was there."""
    seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
    stamp = {"seconds": seconds, "microseconds": microseconds}
    return json.dumps({"timestamp": stamp, "event": "RESUME"}).encode() + b"\r\n"
