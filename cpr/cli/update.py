"""cpr update: show the plan, ask once, run it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from cpr.cli.choose import choices, jump
from cpr.cli.options import (
    Abandon,
    All,
    Append,
    Engine,
    ExitCode,
    Guests,
    Ignore,
    Initrd,
    Json,
    Kernel,
    Kexec,
    Qemu,
    QemuOption,
    Restart,
    ReuseCmdline,
    SaveRam,
)
from cpr.cli.output import Ended, Output, say, tell
from cpr.errors import UNTOUCHED, Exit, Interrupted, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cpr.app import Prepared, Stop
    from cpr.progress import Progress

DryRun = Annotated[bool, typer.Option("-n", "--dry-run", help="Show the plan, the commit step marked; do nothing.")]
Yes = Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")]
Jobs = Annotated[int | None, typer.Option("--jobs", metavar="N", help="Guests at a time.")]
Timeout = Annotated[
    float | None, typer.Option("--timeout", metavar="SECONDS", help="From the first step to the commit; then undo.")
]
MaxDowntime = Annotated[
    float | None, typer.Option("--max-downtime", metavar="SECONDS", help="Longest pause before the commit; then undo.")
]
Blocked = Annotated[
    str, typer.Option("--blocked", metavar="fail|skip", help="Whether a blocked guest counts in the exit code.")
]
ManagerEvents = Annotated[
    str | None,
    typer.Option(
        "--manager-events", metavar="hide|show", help="Whether who holds a monitor hears of STOP and RESUME."
    ),
]
Events = Annotated[str, typer.Option("--events", metavar="FILE|FD", help="JSON lines of what happens.")]


def update_command(
    guests: Guests = None,
    *,
    all_guests: All = False,
    restart: Restart = True,
    kexec: Kexec = False,
    kernel: Kernel = "",
    initrd: Initrd = "",
    append: Append = "",
    reuse_cmdline: ReuseCmdline = False,
    abandon: Abandon = None,
    save_ram: SaveRam = "",
    qemu: Qemu = "",
    qemu_option: QemuOption = None,
    engine: Engine = None,
    ignore: Ignore = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    jobs: Jobs = None,
    timeout: Timeout = None,
    max_downtime: MaxDowntime = None,
    blocked: Blocked = "fail",
    manager_events: ManagerEvents = None,
    exit_code: ExitCode = False,
    events: Events = "",
    json: Json = False,
) -> int:
    """Move running guests onto a newly installed QEMU. Without GUEST: every outdated one, after the question.

    With --kexec: save all guests, jump into a new host kernel, and restore them there.
    """
    if guests and all_guests:
        raise UsageError("GUEST and --all exclude each other")
    wanted = jump(
        kexec=kexec,
        kernel=kernel,
        initrd=initrd,
        append=append,
        reuse_cmdline=reuse_cmdline,
        abandon=abandon,
        save_ram=save_ram,
        engine=engine,
    )
    if yes and not kexec and not guests and not all_guests:
        raise UsageError("-y without a guest: nobody would be asked which", hint="name the guests, or say --all")
    if not (dry_run or yes or (sys.stdin.isatty() and sys.stderr.isatty())):
        raise UsageError("not on a terminal: nobody can be asked", hint="-y goes on without asking, -n shows the plan")
    chosen = choices(
        qemu=qemu,
        qemu_option=qemu_option,
        engine=engine,
        ignore=ignore,
        timeout=timeout,
        max_downtime=max_downtime,
        jobs=jobs,
        blocked=blocked,
        manager_events=manager_events,
    )
    from cpr import app

    if wanted is not None:
        from cpr.cli.kexec import update_kexec

        answer = Output(json, "update")
        return update_kexec(guests or [], chosen, wanted, answer, dry_run=dry_run, yes=yes, events=events)
    with signals() as stop, open_events(events) as stream:
        prepared = app.prepare(guests or [], chosen)
        if dry_run:
            return _dry_run(prepared, Output(json, "update"), exit_code)
        if prepared.to_do and not yes:
            _ask(prepared)
        return _perform(prepared, stop, stream, Output(json, "update"))


def _dry_run(prepared: Prepared, output: Output, exit_code: bool) -> int:
    from cpr.cli import describe, documents

    code = Exit.WOULD_UPDATE if exit_code and prepared.exit_code is Exit.OK and prepared.to_do else prepared.exit_code
    if output.json:
        output.document(**{**documents.prepared(prepared), "exit_code": int(code)})
    else:
        say("\n".join(describe.prepared_lines(prepared)))
    return code


def _ask(prepared: Prepared) -> None:
    from cpr.cli import describe

    tell("\n".join(describe.prepared_lines(prepared)))
    if not typer.confirm(f"Update {len(prepared.to_do)} guest(s)?", default=False, err=True):
        raise Interrupted("not wanted", where=UNTOUCHED)


def _perform(prepared: Prepared, stop: Stop, stream: IO[str] | None, output: Output) -> int:
    from cpr import app
    from cpr.cli import describe, documents

    progress = progress_on(sys.stderr, stream, silent=not prepared.to_do)
    update = app.perform(prepared, progress, stop)
    progress.close()
    if output.json:
        output.document(**documents.updated(update))
    else:
        say("\n".join(describe.update_lines(update)))
    return update.exit_code


def progress_on(terminal: IO[str], events: IO[str] | None, *, silent: bool = False) -> Progress:
    """Live lines on a terminal that can move its cursor, else plain ones; JSON lines besides where they are wanted."""
    from cpr.progress import JsonLines, LiveLines, PlainLines, Several, Silent

    members: list[Progress] = [JsonLines(events)] if events is not None else []
    if terminal.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not silent:
        members.append(LiveLines(terminal, os.get_terminal_size(terminal.fileno()).columns))
    elif not silent:
        members.append(PlainLines(terminal))
    return Several(members) if members else Silent()


@contextlib.contextmanager
def open_events(where: str) -> Iterator[IO[str] | None]:
    """The stream of --events: a descriptor by its number, or a file that is appended to."""
    if not where:
        yield None
        return
    try:
        file = os.fdopen(int(where), "w", closefd=False) if where.isdigit() else open(where, "a", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--events {where}: {error.strerror or error}") from None
    with file:
        yield file


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM: before anything is done they end the command, then they ask every keeper to undo.

    The keepers decide: what is committed goes on to its end, and the command waits for it.
    """
    from cpr.app import Stop

    stop = Stop()

    def handle(number: int, frame: Any) -> None:
        code = Exit.TERMINATED if number == signal.SIGTERM else Exit.INTERRUPTED
        if not stop.working:
            raise Ended(code)
        if stop.requested() is None:
            tell("cpr: interrupted: undoing what is not committed; what is goes on to its end")
        stop.request(code)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
