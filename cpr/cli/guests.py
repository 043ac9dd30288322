"""Commands that look and change nothing: list, show, check, info."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpr.cli.choose import choices, jump
from cpr.cli.options import (
    Abandon,
    All,
    Append,
    Engine,
    ExitCode,
    Guest,
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
from cpr.cli.output import Output, say
from cpr.errors import Exit, UsageError

if TYPE_CHECKING:
    from cpr.app import Choices, Jump


def list_command(json: Json = False) -> int:
    """Guests on this host, the QEMU that runs and the one installed, and the engine an update would use."""
    from cpr import app
    from cpr.cli import describe, documents

    guests = app.list_guests()
    if json:
        Output(json, "list").document(guests=[documents.listed(e) for e in guests])
    else:
        say("\n".join(describe.list_lines(guests)))
    return Exit.OK


def show_command(guest: Guest, qemu: Qemu = "", qemu_option: QemuOption = None, json: Json = False) -> int:
    """All facts about one guest; ends with the next command to run."""
    from cpr import app
    from cpr.cli import describe, documents

    examined = app.show(guest, choices(qemu=qemu, qemu_option=qemu_option))
    if examined.guest is None and examined.error is not None:
        raise examined.error
    if json:
        Output(json, "show").document(guest=documents.shown(examined))
    else:
        say("\n".join(describe.show_lines(examined)))
    return Exit.OK


def check_command(
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
    exit_code: ExitCode = False,
    json: Json = False,
) -> int:
    """Ask everything that an update would ask first. Changes nothing."""
    from cpr import app
    from cpr.cli import describe, documents

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
    chosen = choices(qemu=qemu, qemu_option=qemu_option, engine=engine, ignore=ignore)
    if wanted is not None:
        return _check_kexec(guests or [], chosen, wanted, exit_code=exit_code, output=Output(json, "check"))
    examined = app.check(guests or [], chosen)
    code = app.worst(e.exit_code for e in examined)
    if exit_code and code is Exit.OK and any(e.outdated for e in examined):
        code = Exit.WOULD_UPDATE
    if json:
        Output(json, "check").document(
            mode="restart", **documents.verdict(code), guests=[documents.checked(e) for e in examined]
        )
    else:
        say("\n".join(describe.check_lines(examined)) if examined else "no guests on this host")
    return code


def _check_kexec(guests: list[str], chosen: Choices, wanted: Jump, *, exit_code: bool, output: Output) -> int:
    from cpr import app
    from cpr.cli import describe, documents

    found = app.check_kexec(guests, chosen, wanted)
    code = app.worst(found.exit_codes)
    if exit_code and code is Exit.OK:
        code = Exit.WOULD_UPDATE
    if output.json:
        output.document(**documents.reboot_check(found), **documents.verdict(code))
    else:
        say("\n".join(describe.reboot_check_lines(found)))
    return code


def info_command(guest: Guest, qemu: Qemu = "", json: Json = False) -> int:
    """Which CPR modes a guest supports: restart (by which engines), reboot."""
    from cpr import app
    from cpr.cli import describe, documents

    modes = app.info(guest, choices(qemu=qemu))
    if modes.examined.error is not None and modes.examined.guest is None:
        raise modes.examined.error
    if json:
        Output(json, "info").document(guest=documents.modes(modes))
    else:
        say("\n".join(describe.info_lines(modes)))
    return Exit.OK
