"""The table of options that changed between QEMU 6.0 and 11.1. `cpr.qemu.options` applies it.

Each row is a function of one option; it looks at the words the binary knows, never at its version. Rows must not undo
one another: the result of a row is put through the table again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from cpr.qemu.cmdline.argv import CommandLine, Option
from cpr.qemu.cmdline.knowledge import Change, OptionKnowledge, Row
from cpr.qemu.cmdline.legacy import MONITOR_OBJECTS
from cpr.qemu.cmdline.params import Params

Rewrite = Callable[[Option], tuple[Option, ...]]

_SOUND_CARDS = {
    "ac97": ("AC97",),
    "adlib": ("adlib",),
    "cs4231a": ("cs4231a",),
    "es1370": ("ES1370",),
    "gus": ("gus",),
    "hda": ("intel-hda", "hda-duplex"),
    "sb16": ("sb16",),
}
_NEEDS_AUDIODEV = frozenset(
    {"AC97", "ES1370", "adlib", "cs4231a", "gus", "hda-duplex", "hda-micro", "hda-output", "sb16", "usb-audio"}
    | {"virtio-sound", "virtio-sound-pci"}
)
_USB_DEVICES = {"mouse": "usb-mouse", "tablet": "usb-tablet", "keyboard": "usb-kbd", "wacom-tablet": "usb-wacom-tablet"}
_HEX_SIZE = re.compile(r"\+?0x[0-9a-f]+[kmgtp]", re.IGNORECASE)


def renamed(old: str, group: str, parameter: str, rewrite: Rewrite, words: str) -> Row:
    """`old` gone: `rewrite` says it with `parameter` of `group`, where the binary has that."""

    def row(option: Option, _all: CommandLine, knows: OptionKnowledge) -> Change | None:
        if option.name != old or knows.option(old) or not knows.option(group):
            return None
        if knows.parameter(group, parameter) is False:
            return None
        return Change(rewrite(option), f"-{old} is now {words}")

    return row


def gone(old: str, rewrite: Rewrite, words: str) -> Row:
    """`old` gone: `rewrite` says it with what every version has, or drops it."""

    def row(option: Option, _all: CommandLine, knows: OptionKnowledge) -> Change | None:
        if option.name != old or knows.option(old):
            return None
        return Change(rewrite(option), f"-{old} {words}")

    return row


def back(parameter: str, old: str | None, *, flag: bool = False) -> Row:
    """The way back: `-run-with parameter=` to the option it was before, or dropped where `old` is None."""

    def row(option: Option, _all: CommandLine, knows: OptionKnowledge) -> Change | None:
        value = option.params.get(parameter) if option.name == "run-with" else None
        if value is None or knows.parameter("run-with", parameter) or (old and not knows.option(old)):
            return None
        if old is None and knows.option("run-with"):
            return None
        rest = option.params.without(parameter)
        kept = (option.with_params(rest),) if rest.items else ()
        before: tuple[Option, ...] = ()
        if old and not flag:
            before = (Option(old, value),)
        elif old and option.params.flag(parameter):
            before = (Option(old),)
        return Change((*kept, *before), f"-run-with {parameter}= is {f'-{old}' if old else 'dropped'} there")

    return row


def _on(name: str, key: str, value: str = "on") -> Rewrite:
    return lambda _option: (Option(name, f"{key}={value}"),)


def _moved(name: str, key: str) -> Rewrite:
    return lambda option: (Option(name, Params.of(None, **{key: option.value or ""}).render()),)


def _dropped(_option: Option) -> tuple[Option, ...]:
    return ()


def _sound_card(option: Option) -> tuple[Option, ...]:
    cards = (option.value or "").split(",")
    return tuple(Option("device", driver) for card in cards for driver in _SOUND_CARDS.get(card, ()))


def _usb_device(option: Option) -> tuple[Option, ...]:
    driver = _USB_DEVICES.get(option.value or "")
    return (Option("usb"), Option("device", driver)) if driver else (option,)


def reconnect(option: Option, _all: CommandLine, knows: OptionKnowledge) -> Change | None:
    """`reconnect` counts seconds; `reconnect-ms` came in 9.2 and the other went in 10.2 (-netdev stream likewise)."""
    if option.name not in ("chardev", "netdev"):
        return None
    params = option.params
    if option.name == "netdev" and params.get("type") != "stream":
        return None
    seconds, milliseconds = params.get("reconnect"), params.get("reconnect-ms")
    if seconds is not None and knows.parameter("chardev", "reconnect") is False:
        changed = _renamed_key(params, "reconnect", "reconnect-ms", int(float(seconds) * 1000))
        return Change((option.with_params(changed),), f"-{option.name} reconnect is now reconnect-ms")
    if milliseconds is not None and knows.parameter("chardev", "reconnect-ms") is False:
        whole = -(-int(milliseconds) // 1000)
        changed = _renamed_key(params, "reconnect-ms", "reconnect", whole)
        return Change((option.with_params(changed),), f"-{option.name} reconnect-ms is reconnect there")
    return None


def _renamed_key(params: Params, old: str, new: str, value: int) -> Params:
    """`old` renamed where it stands."""
    if params.json is not None:
        return params.without(old).with_({new: value})
    items = (replace(i, key=new, value=str(value)) if i.key == old else i for i in params.items)
    return replace(params, items=tuple(items))


def chardev_words(option: Option, _all: CommandLine, knows: OptionKnowledge) -> Change | None:
    """Backend aliases tty and parport (removed in 8.0); logtimestamp and encoding (there in 11.1) to older ones."""
    if option.name != "chardev":
        return None
    params = option.params
    alias = {"tty": "serial", "parport": "parallel"}.get(params.get("backend") or "")
    if alias:
        return Change((option.with_params(params.with_({"backend": alias})),), f"chardev backend is now {alias}")
    for name in ("logtimestamp", "encoding"):
        if name in params and knows.parameter("chardev", name) is False:
            return Change((option.with_params(params.without(name)),), f"-chardev {name} is unknown there: dropped")
    return None


def audiodev(option: Option, cmdline: CommandLine, knows: OptionKnowledge) -> Change | None:
    """A sound card without audiodev= took the first -audiodev; from 8.2 on it must be said, as `audio-help` went."""
    if option.name != "device" or knows.option("audio-help"):
        return None
    params = option.params
    if params.get("driver") not in _NEEDS_AUDIODEV or "audiodev" in params or cmdline.has("audio"):
        return None
    words = f"-device {params.get('driver')} now names its audiodev"
    backends = [found.params.get("id") for _, found in cmdline.find("audiodev")]
    if backends:
        return Change((option.with_params(params.with_({"audiodev": backends[0]})),), words)
    if not cmdline.has("nodefaults"):
        return None  # QEMU makes one up
    silent = Option("audiodev", "none,id=cpr-audio")  # one for all of them
    return Change((silent, option.with_params(params.with_({"audiodev": "cpr-audio"}))), f"{words}, a silent one")


def spice_password(option: Option, _all: CommandLine, knows: OptionKnowledge) -> Change | None:
    """-spice password= was removed in 8.0; password-secret= came in 6.0."""
    if option.name != "spice" or knows.parameter("spice", "password") is not False:
        return None
    password = option.params.get("password")
    if password is None:
        return None
    secret = Params.of(("qom-type", "secret"), id="cpr-spice-password", data=password)
    changed = option.params.without("password").with_({"password-secret": "cpr-spice-password"})
    return Change(
        (Option("object", secret.render()), option.with_params(changed)), "-spice password is now a secret object"
    )


def display_words(option: Option, _all: CommandLine, knows: OptionKnowledge) -> Change | None:
    """-display sdl,window_close= and alt_grab=, ctrl_grab= (removed in 7.1, as were -sdl and -curses)."""
    if option.name != "display" or knows.option("sdl"):
        return None
    params, changed = option.params, option.params
    if "window_close" in params:
        changed = changed.without("window_close").with_({"window-close": params.get("window_close")})
    for old, keys in (("alt_grab", "lshift-lctrl-lalt"), ("ctrl_grab", "rctrl")):
        if old in params:
            changed = changed.without(old)
            changed = changed.with_({"grab-mod": keys}) if params.flag(old) else changed
    return None if changed == params else Change((option.with_params(changed),), "-display sdl in new words")


def sizes(option: Option, _all: CommandLine, _knows: OptionKnowledge) -> Change | None:
    """`0x20M` is no size any more (removed in 8.0); in decimal it is one everywhere."""
    if option.name not in ("m", "object", "numa"):
        return None
    params = option.params
    for key in ("size", "maxmem", "mem"):
        text = params.get(key)
        if text is not None and _HEX_SIZE.fullmatch(text):
            value = int(text[:-1], 16)
            changed = params.with_({key: f"{value}{text[-1].upper()}"})
            return Change((option.with_params(changed),), f"{text} is now written {value}{text[-1].upper()}")
    return None


def topology(option: Option, _all: CommandLine, _knows: OptionKnowledge) -> Change | None:
    """-smp sockets=0 meant "count yourself" (removed in 9.0); left out it still does."""
    if option.name != "smp":
        return None
    zero = [name for name in option.params.names() if option.params.get(name) == "0"]
    if not zero:
        return None
    return Change((option.with_params(option.params.without(*zero)),), f"-smp {', '.join(zero)}=0 is left out")


def useless_words(option: Option, _all: CommandLine, _knows: OptionKnowledge) -> Change | None:
    """Words that did nothing: `loaded`, `opened` of objects (removed in 7.1 and 9.2), and a global of 9.1."""
    if option.name == "object":
        words = [name for name in ("loaded", "opened") if option.params.flag(name)]
        if words:
            return Change((option.with_params(option.params.without(*words)),), f"-object {words[0]} did nothing")
    if option.name == "global" and (option.value or "").startswith("migration.decompress-error-check"):
        return Change((), "-global migration.decompress-error-check is gone with the compression it was for")
    return None


def monitor_words(option: Option, _all: CommandLine, knows: OptionKnowledge) -> Change | None:
    """-object monitor-qmp, monitor-hmp (new in 11.1, which calls -mon deprecated), both ways."""
    params = option.params
    mode = MONITOR_OBJECTS.get(params.get("qom-type") or "") if option.name == "object" else None
    if mode and knows.type(params.get("qom-type") or "") is False and knows.option("mon"):
        said = {key: params.get(key) for key in ("id", "chardev", "pretty") if key in params}
        return Change((Option("mon", Params.of(None, **said, mode=mode).render()),), "-object monitor is -mon there")
    if option.name == "mon" and not knows.option("mon"):
        kind = "monitor-qmp" if params.get("mode") == "control" else "monitor-hmp"
        name = params.get("id") or f"cpr-monitor-{params.get('chardev')}"
        pretty = {"pretty": "on"} if params.flag("pretty") else {}
        made = Params.of(("qom-type", kind), id=name, chardev=params.get("chardev"), **pretty)
        return Change((Option("object", made.render()),), f"-mon is now -object {kind}")
    return None


def device_words(option: Option, _all: CommandLine, knows: OptionKnowledge) -> Change | None:
    """virtio-blk scsi= (removed in 9.1), where the binary's properties are known: off is what is left."""
    if option.name != "device" or "scsi" not in option.params or option.params.flag("scsi"):
        return None
    driver = option.params.get("driver") or ""
    if not driver.startswith("virtio-blk") or knows.device_property(driver, "scsi") is not False:
        return None
    return Change((option.with_params(option.params.without("scsi")),), f"-device {driver} scsi=off is the only way")


def one_instruction(option: Option, _all: CommandLine, knows: OptionKnowledge) -> Change | None:
    """The way back of -singlestep: `-accel tcg,one-insn-per-tb=on` (new in 8.1) where -singlestep is still there."""
    if option.name != "accel" or not knows.option("singlestep") or "one-insn-per-tb" not in option.params:
        return None
    changed = option.with_params(option.params.without("one-insn-per-tb"))
    more = (Option("singlestep"),) if option.params.flag("one-insn-per-tb") else ()
    return Change((changed, *more), "-accel tcg,one-insn-per-tb= is -singlestep there")


def single_step(option: Option, cmdline: CommandLine, knows: OptionKnowledge) -> Change | None:
    """-singlestep (removed in 9.0) as a property of the accelerator it was for, which may be named already."""
    if knows.option("singlestep") or not cmdline.has("singlestep"):
        return None
    words = "-singlestep is now -accel tcg,one-insn-per-tb=on"
    if option.name == "accel" and option.params.get("accel") == "tcg" and "one-insn-per-tb" not in option.params:
        return Change((option.with_params(option.params.with_({"one-insn-per-tb": "on"})),), words)
    if option.name == "singlestep":
        named = any(found.params.get("accel") == "tcg" for _, found in cmdline.find("accel"))
        return Change(() if named else (Option("accel", "tcg,one-insn-per-tb=on"),), words)
    return None


ROWS: tuple[Row, ...] = (
    # removed in 9.0; -run-with came in 8.1, its user= in 9.1, exit-with-parent= in 10.2
    renamed("async-teardown", "run-with", "async-teardown", _on("run-with", "async-teardown"), "-run-with"),
    renamed("chroot", "run-with", "chroot", _moved("run-with", "chroot"), "-run-with chroot="),
    renamed("runas", "run-with", "user", _moved("run-with", "user"), "-run-with user="),  # removed in 10.0
    back("async-teardown", "async-teardown", flag=True),  # 7.2 to 8.2
    back("chroot", "chroot"),
    back("user", "runas"),
    back("async-teardown", None),  # before 7.2 there was none: the exit takes longer, nothing else
    gone("no-hpet", _on("machine", "hpet", "off"), "is now -machine hpet=off"),  # removed in 9.0
    gone("no-acpi", _on("machine", "acpi", "off"), "is now -machine acpi=off"),  # removed in 9.0
    single_step,
    one_instruction,
    gone("watchdog", lambda o: (Option("device", o.value),), "is now -device"),  # removed in 7.2
    gone("soundhw", _sound_card, "is now -device"),  # removed in 7.1
    gone("balloon", lambda o: () if o.value == "none" else (Option("device", "virtio-balloon"),), "is now -device"),
    gone("usbdevice", _usb_device, "is now -device"),  # still there in 11.1
    gone("enable-kvm", lambda _o: (Option("accel", "kvm"),), "is now -accel kvm"),  # still there in 11.1
    gone("no-kvm", lambda _o: (Option("accel", "tcg"),), "is now -accel tcg"),  # removed in 5.2
    gone("tb-size", lambda o: (Option("accel", f"tcg,tb-size={o.value}"),), "is now -accel tcg,tb-size="),  # 6.0
    gone("realtime", lambda o: (Option("overcommit", f"mem-lock={_mlock(o)}"),), "is now -overcommit mem-lock="),
    gone("sdl", lambda _o: (Option("display", "sdl"),), "is now -display sdl"),  # removed in 7.1
    gone("curses", lambda _o: (Option("display", "curses"),), "is now -display curses"),  # removed in 7.1
    gone("no-quit", _dropped, "is gone (window-close=off of a -display)"),  # removed in 7.0
    gone("alt-grab", _dropped, "is gone (grab-mod= of -display sdl)"),  # removed in 7.1
    gone("ctrl-grab", _dropped, "is gone (grab-mod= of -display sdl)"),  # removed in 7.1
    gone("show-cursor", _dropped, "is gone (show-cursor=on of a -display)"),  # removed in 6.0
    gone("no-frame", _dropped, "is gone"),
    gone("portrait", _dropped, "is gone with the screens it turned"),  # removed in 9.2
    gone("rotate", _dropped, "is gone with the screens it turned"),  # removed in 9.2
    gone("enable-fips", _dropped, "is gone"),  # removed in 7.1
    gone("writeconfig", _dropped, "is gone"),  # removed in 7.1
    gone("id", _dropped, "is a label of Proxmox's own QEMU"),
    gone("cpuunits", _dropped, "is a label of Proxmox's own QEMU"),
    gone("perfmap", _dropped, "is for profiling only and unknown there"),  # new in 8.0
    gone("jitdump", _dropped, "is for profiling only and unknown there"),  # new in 8.0
    reconnect,
    chardev_words,
    audiodev,
    spice_password,
    display_words,
    sizes,
    topology,
    useless_words,
    monitor_words,
    device_words,
)
"""Every change, in the order in which it is tried."""


def _mlock(option: Option) -> str:
    return option.params.get("mlock") or "on"
