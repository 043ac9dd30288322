"""The `cpr` command: its sub-commands, and what every one of them does with errors and signals.

Nothing that takes time is imported here: `cpr --help` and completion have to be quick.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

from cpr.cli import guests, journals, saved, start, update
from cpr.cli.output import Ended, Output, use_color
from cpr.errors import UNTOUCHED, CprError, Exit, Interrupted, UsageError

app = typer.Typer(
    name="cpr",
    help="Update the QEMU under running guests without anybody noticing.",
    epilog="Exit codes: 0 done, 1 stopped before any change, 2 usage, 3 blocked, 4 privileges, 5 not found, "
    "6 rolled back, 7 needs attention, 8 differs after the update, 9 would update (--exit-code), 75 busy.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("list")(guests.list_command)
app.command("show")(guests.show_command)
app.command("check")(guests.check_command)
app.command("info")(guests.info_command)
app.command("update")(update.update_command)
app.command("run", context_settings={"allow_interspersed_args": False})(start.run_command)
app.command("save")(saved.save_command)
app.command("load")(saved.load_command)
app.command("restore")(saved.restore_command)
app.command("may-start")(saved.may_start_command)
app.command("recover")(journals.recover_command)
app.command("runs")(journals.runs_command)
app.command("log")(journals.log_command)

CLICK_ERROR: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
"""Base of typer's usage errors; where it is imported from depends on typer's version."""


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"cpr {version('qemu-cpr')}")
        except PackageNotFoundError:
            typer.echo("cpr (not installed)")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    color: Annotated[str, typer.Option("--color", help="auto, always or never.")] = "auto",
) -> None:
    """Update the QEMU under running guests without anybody noticing."""
    if color not in ("auto", "always", "never"):
        raise UsageError(f"--color {color}: auto, always or never")
    use_color(color)


def main() -> NoReturn:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit code of one call. Whatever goes wrong is said, and with --json there is a document all the same."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    arguments = [*_color_first(own), *arguments[len(own) :]]
    output = Output(json="--json" in own, command=next((a for a in own if not a.startswith("-")), "cpr"))
    try:
        result = app(args=arguments or ["--help"], prog_name="cpr", standalone_mode=False)
        if not arguments:
            return int(Exit.USAGE)
        return int(result) if isinstance(result, int) else int(Exit.OK)
    except CprError as error:
        return output.failed(error)
    except CLICK_ERROR as error:
        return _usage(error, output)
    except (KeyboardInterrupt, typer.Abort, Ended) as error:
        return output.failed(Interrupted("interrupted", where=UNTOUCHED), getattr(error, "exit_code", None))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader of our output left: Python's flush at exit as well
        return int(Exit.FAILED)
    except Exception as error:
        if os.environ.get("CPR_DEBUG"):
            raise
        where = "see cpr list for where the guests are now"
        return output.failed(
            CprError(
                f"a bug in cpr: {type(error).__name__}: {error}",
                where=where,
                hint="CPR_DEBUG=1 shows the traceback; please report it",
            )
        )


def _color_first(arguments: list[str]) -> list[str]:
    """--color is an option of `cpr` itself, and may stand behind the command all the same."""
    at = next((i for i, word in enumerate(arguments) if word.split("=")[0] == "--color"), None)
    if at is None:
        return arguments
    end = at + (1 if "=" in arguments[at] else 2)
    return [*arguments[at:end], *arguments[:at], *arguments[end:]]


def _usage(error: Exception, output: Output) -> int:
    """What typer has to say about the arguments, as one of ours."""
    text = str(getattr(error, "format_message", lambda: str(error))())
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "cpr"
    return output.failed(UsageError(text, hint=f"{path} --help"))
