"""The way of the device state from the old QEMU to the new one, through us (crossing.py) or by a memory file of ours.

A socket pair for each, one end given to it by descriptor. The old QEMU is given our end of its pair as well: whatever
becomes of us, it cannot see that nobody reads what it writes, and so its migration neither ends nor fails. It stands
still, also if somebody lets it go on (SIGCONT), until it is hung up on: when the new QEMU is dead.

A guest whose only QMP socket is TCP takes no descriptors: it connects to a port of ours on the loopback, and what it
has connected is given to the new QEMU. Nobody is in between then.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import TYPE_CHECKING, Any

from cpr.engines.crossing import Crossing, narrow
from cpr.engines.doors import stop_accepting
from cpr.errors import CommandFailed, MonitorError, NewQemuDied, StepFailed
from cpr.linux import fds, proc
from cpr.model import Runstate
from cpr.qemu import clients, migration
from cpr.qemu.first_words import Command
from cpr.qemu.state_end import Ending
from cpr.run import resume_old

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cpr.model import Guest
    from cpr.qemu.qmp import Monitor, Pending
    from cpr.qemu.state_end import Mark
    from cpr.run import Run

NAME = "cpr-stream"
END = "cpr-stream-end"
"""By this name the old QEMU has our end."""
STOP_SECONDS = 0.05
"""How long STOP may come after a state that is complete."""
ACCEPT_SECONDS = 5.0
SLICE = 0.05
"""Seconds between two looks at interrupts and deadlines."""
CHUNK = 1 << 18
"""Bytes at a time: about what a socket holds."""


def our_end(monitor: Monitor, command: str) -> socket.socket:
    """Have a QEMU send its state to us (`migrate`), or take one from us (`migrate-incoming`): our end of the way."""
    theirs, ours = socket.socketpair()
    try:
        with theirs:
            monitor.send_fd(NAME, theirs.fileno())
        monitor.execute(command, uri=f"fd:{NAME}")
    except BaseException:
        ours.close()
        raise
    return ours


def prepare(run: Run, guest: Guest) -> None:
    """Everything that can be done before the state is sent."""
    assert guest.monitor is not None
    if not guest.monitor.path:
        listener = socket.create_server(("127.0.0.1", 0))
        run.closing.callback(listener.close)
        run.extra["stream"] = listener
        return
    run.extra["sink"] = sink = our_end(run.successor, "migrate-incoming")
    run.closing.callback(sink.close)
    theirs, ours = socket.socketpair()
    run.closing.callback(ours.close)
    run.extra["source"] = ours
    run.journal.fact("stream", end=os.fstat(ours.fileno()).st_ino)
    with theirs:
        narrow(theirs)
        run.monitor.send_fd(NAME, theirs.fileno())
    run.monitor.send_fd(END, ours.fileno())


def begin(run: Run, guest: Guest, seen: int) -> Pending:
    """Have the old QEMU send its state, and the new one take it; the old one is stopped where it is complete.

    `seen`: events of the old QEMU until now. The answer to `migrate` may never come: QEMU may be too busy for it
    before, and it says nothing after its state is complete.
    """
    listener: socket.socket | None = run.extra.get("stream")
    old, monitor = run.old, run.monitor
    assert old is not None
    if listener is not None:
        pending = monitor.submit("migrate", uri=f"tcp:127.0.0.1:{listener.getsockname()[1]}")
        with connection_of(old.pid, listener) as connection:
            run.successor.send_fd(NAME, connection.fileno())
        run.successor.execute("migrate-incoming", uri=f"fd:{NAME}")
        return pending

    def stopped(_: Mark) -> bool:
        with contextlib.suppress(TimeoutError, MonitorError):
            monitor.wait_event({"STOP"}, timeout=STOP_SECONDS, after=seen)
            return True
        return not guest.running

    source, sink = run.extra.pop("source"), run.extra.pop("sink")
    run.extra["crossing"] = crossing = Crossing(source, sink, lambda: stop_accepting(old), stopped)
    run.closing.callback(crossing.close)
    return monitor.submit("migrate", uri=f"fd:{NAME}")


def complete(run: Run) -> bool:
    """Whether the old QEMU was stopped where it has saved its state: it answers nothing any more."""
    crossing: Crossing | None = run.extra.get("crossing")
    return crossing is not None and crossing.complete


def connection_of(pid: int, listener: socket.socket) -> socket.socket:
    """The connection that the old QEMU (`pid`) makes; others, anybody's on this host, are hung up on."""
    deadline = time.monotonic() + ACCEPT_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        with contextlib.suppress(TimeoutError):
            connection, peer = listener.accept()
            theirs = clients.socket_numbers(pid)
            if any(tcp.local == peer and tcp.inode in theirs for tcp in proc.read_net_tcp(pid)):
                return connection
            connection.close()
    raise StepFailed("move the device state", f"the old QEMU did not connect within {ACCEPT_SECONDS:g} s")


def hang_up(run: Run) -> None:
    """The old QEMU is told that nobody reads what it writes; the new one is dead. Safe to repeat."""
    if (crossing := run.extra.get("crossing")) is not None:
        crossing.hang_up()


def hang_up_on(pid: int, end: int) -> None:
    """`hang_up` for a keeper that is gone; `end`: inode of our end, which the old QEMU has. Safe to repeat."""
    with contextlib.suppress(OSError):
        number = clients.socket_numbers(pid).get(end)
        if number is not None:
            with fds.take_fd(pid, number) as fd, clients.socket_of(fd) as sock:
                sock.shutdown(socket.SHUT_RDWR)


def undo(run: Run) -> None:
    """Take back the old QEMU's end, if it has not used it, and ours."""
    for name in (NAME, END):
        with contextlib.suppress(CommandFailed):
            run.monitor.execute("closefd", fdname=name)


def save(run: Run, state: int, expected: Mark | None, step: str) -> bool:
    """Have the old QEMU send its state to us (`run.extra["stream"]`), and write it to the memory file `state`.

    Whether it stands still now in the middle of the words behind its state, reads nothing and answers nothing, until it
    is hung up on. `expected`: the end of a state that it has sent before.

    Raises:
        StepFailed, CommandFailed: it did not come to its end.
    """
    here: socket.socket = run.extra["stream"]
    sending = run.monitor.submit("migrate", uri=f"fd:{NAME}")  # the answer may never come
    ending = Ending(lambda mark: expected is None or mark.resembles(expected))
    here.settimeout(SLICE)
    while not ending.complete:
        try:
            passed, more = ending.receive(here)
        except TimeoutError:
            run.check(step)
            if sending.failed or migration.has_failed(run.monitor.events()[run.extra["seen_old"] :]):
                break
            continue
        while passed:
            passed = passed[os.write(state, passed) :]
        if not more:
            break
    os.lseek(state, 0, os.SEEK_SET)  # the position is the same for whoever has it
    if ending.complete and ending.mark is not None and ending.mark.holds:
        return True
    if not ending.complete:
        _saved(run, sending, step)
    return False


def _saved(run: Run, sending: Pending, step: str) -> None:
    """All has come that QEMU sends; that it is content shows a moment later."""
    sending.result()
    while (status := run.monitor.execute("query-migrate").get("status")) in ("active", "device", "setup"):
        run.check(step)
    if status != "completed":
        words = migration.failure(run.monitor) or f"the migration is {status}"
        raise StepFailed(step, f"the state could not be saved: {words}")


def load_commands(number: int) -> tuple[Command, ...]:
    """Have a QEMU load the state in its own descriptor `number`: nobody's death can keep it from coming to the end.

    `file:` came with 8.2, which refuses `fd:` for a file; whichever comes second fails.
    """
    capabilities = [{"capability": name, "state": True} for name in migration.ONE_WAY]
    return (
        Command(name="migrate-set-capabilities", arguments={"capabilities": capabilities}),
        Command(name="migrate-incoming", arguments={"uri": f"file:/proc/self/fd/{number}"}),
        Command(name="migrate-incoming", arguments={"uri": f"fd:{number}"}),
    )


def await_load(monitor: Monitor, replies: Sequence[dict[str, Any]], attend: Callable[[], None]) -> str:
    """Wait until a QEMU has loaded the state: "" if it has, or why not, in QEMU's words.

    Raises:
        MonitorError: it has ended.
    """
    errors = ["error" in reply for reply in replies]
    if errors[0] or all(errors[1:]):
        return next(str(reply["error"].get("desc", "")) for reply in replies if "error" in reply)
    while (status := monitor.execute("query-migrate").get("status", "")) not in migration.ENDED:
        attend()
        seen = monitor.event_count
        with contextlib.suppress(TimeoutError):
            monitor.wait_event({"MIGRATION"}, timeout=SLICE, after=seen)
    return "" if status == "completed" else migration.failure(monitor) or f"the migration is {status}"


def finish_load(run: Run, monitor: Monitor, step: str) -> None:
    """Wait until a QEMU that was greeted with `load_commands` has all of it.

    Raises:
        NewQemuDied: it does not take it.
    """
    try:
        why = await_load(monitor, monitor.first_replies, run.attend)
    except MonitorError:
        if run.new is not None:
            run.new.wait_dead(1.0)
        raise NewQemuDied(step, "did not take the state", run.words()) from None
    if why:
        raise NewQemuDied(step, "did not take the state", run.words() or why)


def go_on_after_save(run: Run, guest: Guest) -> None:
    """Undo `save`: the guest goes on in the old QEMU."""
    if "seen_old" not in run.extra:
        return  # nothing was sent; whoever has stopped the guest meanwhile had a reason
    status = resume_old(run.monitor, guest.runstate)
    if guest.running and status != Runstate.RUNNING:
        raise StepFailed("undo", f"the old QEMU is {status} and does not go on", hint="cpr recover tries again")
    if run.stop_time is None:
        return
    resumed = [e for e in run.monitor.events()[run.extra["seen_old"] :] if e.name == "RESUME"]
    run.resume_time = resumed[-1].timestamp if resumed else None
