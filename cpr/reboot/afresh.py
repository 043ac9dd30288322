"""The command line with which a guest is started after a boot, when no descriptor of the old process is left. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpr.engines.successor import DROPPED_OPTIONS, FIRST_NUMBER, base_command
from cpr.qemu import cmdline as cl
from cpr.qemu.chardevs import CONTROL
from cpr.qemu.options import translate
from cpr.qemu.variables import DROPPED

if TYPE_CHECKING:
    from cpr.model import Guest, Target

_DROPPED = tuple(name for name in DROPPED_OPTIONS if name not in ("pidfile", "D"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Afresh:
    """Everything that starting the guest's QEMU needs besides the likeness."""

    argv: tuple[str, ...]
    environ: tuple[tuple[str, str], ...]
    control: str
    control_number: int
    missing: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]


def afresh(guest: Guest, target: Target) -> Afresh:
    line = cl.with_program(cl.without(base_command(guest), _DROPPED), target.binary.path)
    line = cl.with_machine_type(line, guest.machine)
    if guest.generation_id:
        line = cl.with_generation_id(line, guest.generation_id)
    line = line.appended(
        cl.Option("chardev", f"socket,id={CONTROL},fd={FIRST_NUMBER}"),
        cl.Option("mon", f"chardev={CONTROL},mode=control"),
    )
    notes: tuple[str, ...] = ()
    if target.options is not None:
        translation = translate(line, target.options)
        line, notes = translation.cmdline, tuple(translation.changes)
    line = cl.append_options(cl.for_incoming(line), target.extra_options)
    return Afresh(
        argv=tuple(line.argv()),
        environ=tuple((k, v) for k, v in guest.environ if not DROPPED.match(k)),
        control=CONTROL,
        control_number=FIRST_NUMBER,
        missing=(),
        notes=notes,
    )
