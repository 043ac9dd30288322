"""Options and arguments that several commands share, said once."""

from __future__ import annotations

from typing import Annotated

import typer

Guests = Annotated[list[str] | None, typer.Argument(metavar="[GUEST]...", help="Name, uuid or pid.")]
Guest = Annotated[str, typer.Argument(metavar="GUEST", help="Name, uuid or pid.")]
All = Annotated[bool, typer.Option("--all", help="Every guest of this host.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, also on failure.")]
Qemu = Annotated[
    str, typer.Option("--qemu", metavar="PATH", help="The new QEMU (default: the installed one of the same name).")
]
QemuOption = Annotated[
    list[str] | None,
    typer.Option("--qemu-option", metavar="OPT", help="Add to the new QEMU's command line (repeatable)."),
]
Engine = Annotated[str | None, typer.Option("--engine", metavar="NAME", help="auto, or an engine by name.")]
Ignore = Annotated[
    list[str] | None,
    typer.Option("--ignore", metavar="CHECK-ID", help="Treat this blocker as a warning (repeatable)."),
]
Restart = Annotated[bool, typer.Option("--restart", help="Ask about a restart (the default).")]
ExitCode = Annotated[bool, typer.Option("--exit-code", help="Exit 9 if something would be updated.")]
Kexec = Annotated[
    bool, typer.Option("--kexec", help="A new host kernel: save the guests, jump into it, restore them.")
]
Kernel = Annotated[
    str, typer.Option("--kernel", metavar="PATH", help="The kernel to jump into (default: the newest installed one).")
]
Initrd = Annotated[str, typer.Option("--initrd", metavar="PATH", help="Its initrd (default: the one beside it).")]
Append = Annotated[
    str,
    typer.Option(
        "--append", metavar="TEXT", help="Its command line; with --reuse-cmdline this is added to the running one."
    ),
]
ReuseCmdline = Annotated[
    bool, typer.Option("--reuse-cmdline", help="Keep the running kernel's command line (the default without --append).")
]
Abandon = Annotated[
    list[str] | None,
    typer.Option("--abandon", metavar="NAME", help="A guest that may be lost at the jump (repeatable)."),
]
SaveRam = Annotated[
    str,
    typer.Option(
        "--save-ram",
        metavar="DIR",
        help="Copy RAM that a kexec does not keep to a file in DIR, on a disk, and back: the guests stand still "
        "meanwhile.",
    ),
]
