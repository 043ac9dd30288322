"""Old chardev options rewritten so that every chardev of the guest has its QMP label in argv.

In scope: -serial, -parallel, -debugcon, -monitor, -qmp, -qmp-pretty. Out of scope: -gdb (`without_gdb` takes it away)
and -qtest; the chardevs QEMU adds by itself stay implicit and are only named.
"""

from __future__ import annotations

from cpr.qemu.cmdline.argv import CommandLine, Option
from cpr.qemu.cmdline.legacy import MONITOR_OBJECTS, LegacyChardev, legacy_chardevs
from cpr.qemu.cmdline.params import Params

_PORTS = ("serial", "parallel", "debugcon")
_MONITORS = {"monitor": "readline", "qmp": "control", "qmp-pretty": "control"}
_DEFAULT_SERIAL = frozenset({"isa-serial", "xen-console"})  # system/vl.c default_list
_DEFAULT_PARALLEL = frozenset({"isa-parallel"})


def normalise_chardevs(cmdline: CommandLine) -> CommandLine:
    """-serial, -parallel, -debugcon, -monitor, -qmp given as -chardev with exactly the labels QEMU gives them.

    Idempotent; order and numbering of devices stay. Defaults that QEMU adds by itself stay implicit.
    """
    rewritten: dict[int, list[Option]] = {}
    late: dict[str, list[Option]] = {name: [] for name in _PORTS}
    for found in legacy_chardevs(cmdline):
        if found.option in _MONITORS:
            rewritten[found.index] = _monitor(found)
        elif found.option in _PORTS and found.params is not None:
            chardev = Option("chardev", found.params.render())
            # QEMU opens the chardevs of ports after all others. Only virtual consoles show it, by their order.
            console = found.params.get("backend") == "vc"
            if console:
                late[found.option].append(chardev)
            rewritten[found.index] = [
                *([] if console else [chardev]),
                *([_mon(found.label, "readline")] if found.monitor else []),
                Option(found.option, f"chardev:{found.label}", cmdline.options[found.index].spelling),
            ]
    options = [o for n, option in enumerate(cmdline.options) for o in rewritten.get(n, [option])]
    return cmdline.with_options([*options, *(option for name in _PORTS for option in late[name])])


def implicit_chardevs(cmdline: CommandLine) -> tuple[str, ...]:
    """Labels QEMU will make up by itself, where the machine has such a port (system/vl.c, default_serial and so on).

    They are virtual consoles, or under -nographic the standard input and output; nobody outside is connected to them.
    """
    if cmdline.has("nodefaults"):
        return ()
    drivers = _drivers(cmdline)
    texts = [option.value or "" for _, option in cmdline.find("serial", "parallel")]
    serial = not cmdline.has("serial") and not drivers & _DEFAULT_SERIAL
    parallel = not cmdline.has("parallel") and not drivers & _DEFAULT_PARALLEL
    asked = cmdline.has("monitor", "qmp", "qmp-pretty", "mon") or any(text.startswith("mon:") for text in texts)
    monitor = not asked and not any(o.params.get("qom-type") in MONITOR_OBJECTS for _, o in cmdline.find("object"))
    if cmdline.has("nographic") and serial:
        monitor = False  # it shares serial0
    names = (("serial0", serial), ("parallel0", parallel), ("compat_monitor0", monitor))
    return tuple(label for label, there in names if there)


def _monitor(found: LegacyChardev) -> list[Option]:
    # without an id: 11.1 numbers those itself as compat_monitorN, and refuses one of its names said by us
    mon = _mon(found.label, _MONITORS[found.option], pretty=found.option == "qmp-pretty")
    if found.params is None:
        return [mon]
    return [Option("chardev", found.params.render()), mon]


def _mon(label: str, mode: str, *, pretty: bool = False) -> Option:
    params = Params.of(None, chardev=label, mode=mode)
    return Option("mon", (params.with_({"pretty": "on"}) if pretty else params).render())


def _drivers(cmdline: CommandLine) -> set[str]:
    """Device models named by -device, or by -global in its long form."""
    named = {option.params.get("driver") or "" for _, option in cmdline.find("device")}
    for _, option in cmdline.find("global"):
        named.add((option.value or "").partition(".")[0])
    return named
