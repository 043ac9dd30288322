"""Edits of the command line as a whole: CommandLine -> CommandLine, each doing one thing.

Edits of chardevs, memory, network and VNC are in `edit_chardevs`, `edit_memory`, `edit_net` and `edit_vnc`; descriptor
numbers in `descriptors`; a start that touches nothing outside in `rehearsal`.

Order of a restart: `remove_appended` of what an earlier update added, `inline_readconfig`, `normalise_chardevs`, the
edits of the subject, `for_incoming`, and `append_options` last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from cpr.qemu.cmdline.argv import CommandLine, Option, canonical_name, parse_options
from cpr.qemu.cmdline.params import Form, Item


def with_program(cmdline: CommandLine, path: str) -> CommandLine:
    """Another binary in argv[0]. QEMU looks for its firmware beside it."""
    return replace(cmdline, program=path)


def with_machine_type(cmdline: CommandLine, machine_type: str) -> CommandLine:
    """The machine type made `machine_type`, all other properties kept.

    An alias (`q35`) must be made concrete before it reaches another version, where it means another machine.
    """
    named = [index for index, option in cmdline.find("machine") if "type" in option.params]
    anywhere = [index for index, _ in cmdline.find("machine")]
    if named:
        option = cmdline.options[named[-1]]
        return cmdline.replaced(named[-1], option.with_params(option.params.with_({"type": machine_type})))
    if anywhere:
        option = cmdline.options[anywhere[-1]]
        items = (Item("type", machine_type, Form.IMPLIED), *option.params.items)
        return cmdline.replaced(anywhere[-1], option.with_params(replace(option.params, items=items)))
    return replace(cmdline, options=(Option("machine", machine_type), *cmdline.options))


def with_generation_id(cmdline: CommandLine, guid: str) -> CommandLine:
    """`-device vmgenid` with this very identifier.

    With `guid=auto` every start makes a new one and tells the guest, which takes itself for a clone.
    """

    def edited(option: Option) -> Option:
        is_one = option.name == "device" and option.params.get("driver") == "vmgenid"
        return option.with_params(option.params.with_(guid=guid)) if is_one else option

    return cmdline.mapped(edited)


def without(cmdline: CommandLine, names: Iterable[str]) -> CommandLine:
    """Every option of these names removed, with or without dashes, however often it stands there."""
    gone = {canonical_name(name) for name in names}
    return cmdline.mapped(lambda option: () if option.name in gone else option)


def without_user(cmdline: CommandLine) -> CommandLine:
    """No -runas and no -run-with user=: for a QEMU that is started as that user, which may not become it again."""

    def edited(option: Option) -> Option | tuple[()]:
        if option.name == "runas":
            return ()
        if option.name != "run-with" or "user" not in option.params:
            return option
        left = option.params.without("user")
        return option.with_params(left) if left.names() else ()

    return cmdline.mapped(edited)


def for_incoming(cmdline: CommandLine) -> CommandLine:
    """`-S -incoming defer` at the end, in place of any there. Applied twice it changes nothing more."""
    return without(cmdline, ("S", "incoming")).appended(Option("S"), Option("incoming", "defer"))


def append_options(cmdline: CommandLine, extra: Sequence[str]) -> CommandLine:
    """What the user asks for in addition (`--qemu-option`), as words of argv, at the very end."""
    return cmdline.appended(*parse_options(extra))


def remove_appended(cmdline: CommandLine, extra: Sequence[str]) -> CommandLine:
    """What `append_options` once added, taken away again: of every option the last one equal to it.

    To be done first of all edits: options rewritten since then are no longer recognised and stay.
    """
    options = list(cmdline.options)
    for option in reversed(list(parse_options(extra))):
        at = next((n for n in reversed(range(len(options))) if options[n] == option), None)
        if at is not None:
            del options[at]
    return cmdline.with_options(options)


def without_gdb(cmdline: CommandLine) -> tuple[CommandLine, str | None]:
    """No gdb stub, and its address: HMP `gdbserver ADDRESS` hands it back. None where there was none."""
    last = cmdline.last("gdb", "s")
    if last is None:
        return cmdline, None
    value = last[1].value
    address = None if value == "none" else "tcp::1234" if value is None else value
    return without(cmdline, ("gdb", "s")), address
