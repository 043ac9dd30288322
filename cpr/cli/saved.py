"""Commands about guests that are saved for a reboot, or by hand: save, load, restore."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cpr.cli.choose import choices
from cpr.cli.options import Guest, Guests, Ignore, Json, Qemu, SaveRam
from cpr.cli.output import Output, finding_lines, say, tell
from cpr.errors import Exit, Interrupted, UsageError

if TYPE_CHECKING:
    from cpr.app import Saved

File = Annotated[str, typer.Argument(metavar="FILE", help="Of the state; FILE.manifest lies beside it.")]
Mode = Annotated[
    str, typer.Option("--mode", metavar="restart|reboot", help="What the RAM has to outlive: its QEMU, or the host.")
]
Unit = Annotated[str, typer.Option("--unit", metavar="UNIT", help="The systemd service that would start it.")]
LoadQemu = Annotated[
    str, typer.Option("--qemu", metavar="PATH|old", help="The QEMU to load it; old: the one it was saved from.")
]


def save_command(
    guest: Guest,
    file: File,
    *,
    mode: Mode,
    qemu: Qemu = "",
    save_ram: SaveRam = "",
    ignore: Ignore = None,
    json: Json = False,
) -> int:
    """Save a guest to FILE and end it; its RAM stays where it is, or goes to --save-ram. `cpr load FILE` goes on."""
    from cpr import app
    from cpr.cli import describe, documents
    from cpr.cli.update import signals

    if mode not in ("restart", "reboot"):
        raise UsageError(f"--mode {mode}: restart or reboot")
    if save_ram and mode != "reboot":
        raise UsageError("--save-ram is for --mode reboot", hint="for a restart of QEMU, RAM in a named file is enough")
    output, chosen = Output(json, "save"), choices(qemu=qemu, ignore=ignore)
    with signals() as stop:
        stop.working = True
        try:
            saved = app.save(
                guest,
                file,
                app.SaveMode(mode),
                chosen,
                save_ram=os.path.abspath(save_ram) if save_ram else "",
                interrupted=stop.requested,
            )
        except Interrupted as error:
            return output.failed(error, stop.requested())
    if saved.guest is None:
        return _refused(saved, output)
    if json:
        output.document(**documents.saved(saved))
    else:
        say("\n".join([describe.saved_line(saved), *(f"  {text}" for text in saved.notes)]))
    return Exit.OK


def _refused(saved: Saved, output: Output) -> int:
    assert saved.examined.error is not None
    if not output.json:
        for line in finding_lines(saved.examined.findings):
            tell(line)
    return output.failed(saved.examined.error, saved.examined.exit_code)


def load_command(file: File, qemu: LoadQemu = "", json: Json = False) -> int:
    """Go on with a guest that was saved to FILE."""
    from cpr import app
    from cpr.cli import describe, documents
    from cpr.cli.update import signals

    with signals() as stop:
        stop.working = True
        outcome = app.load(file, qemu=qemu, interrupted=stop.requested).outcome()
    if json:
        Output(json, "load").document(guest=documents.outcome(outcome))
    else:
        say("\n".join(describe.update_lines(app.Update(run_id="", outcomes=(outcome,)))))
    return outcome.exit_code


Directory = Annotated[
    str, typer.Option("--directory", metavar="DIR", help="Of another run than the one that is open.")
]
GiveUp = Annotated[bool, typer.Option("--give-up", help="Do not bring the named guests back, now or later.")]


def restore_command(
    guests: Guests = None,
    *,
    qemu: LoadQemu = "",
    directory: Directory = "",
    give_up: GiveUp = False,
    json: Json = False,
) -> int:
    """After the boot: bring back the guests that `cpr update --kexec` has saved."""
    from cpr import app
    from cpr.cli import describe, documents
    from cpr.cli.update import progress_on, signals

    if give_up and not guests:
        raise UsageError("--give-up without a guest: nobody would be asked which", hint="name the guests")
    progress = progress_on(sys.stderr, None)
    with signals() as stop:
        stop.working = True
        update = app.restore(
            guests or [],
            qemu=qemu,
            directory=directory,
            give_up=give_up,
            progress=progress,
            interrupted=stop.requested,
        )
    progress.close()
    if json:
        Output(json, "restore").document(**{**documents.updated(update), "mode": "reboot"})
    else:
        say("\n".join(describe.update_lines(update)))
    return update.exit_code


def may_start_command(unit: Unit, json: Json = False) -> int:
    """For ExecCondition= of a service that is a guest: exit 3 while that guest is saved, or runs brought back."""
    from cpr import app

    why = app.claim_on(unit)
    if json:
        Output(json, "may-start").document(unit=unit, may_start=not why, reason=why)
    elif why:
        tell(f"cpr: {unit} must not be started afresh: {why}")
    return Exit.BLOCKED if why else Exit.OK
