"""Options renamed or removed, in both directions."""

from __future__ import annotations

import pytest

from cpr.qemu.options import OptionKnowledge, Translation, knowledge_from, translate
from tests.unit.qemu.test_cmdline_chardevs import line, words

COMMON = frozenset(
    (
        *("mon", "M", "machine", "m", "accel", "device", "object", "chardev", "netdev", "smp", "global", "display"),
        *("audiodev", "overcommit", "spice", "usb", "nodefaults", "S"),
    )
)
CHARDEV = frozenset({"backend", "path", "server", "wait"})

OLD = OptionKnowledge(  # as 7.2 is
    COMMON
    | frozenset({"async-teardown", "chroot", "runas", "no-hpet", "no-acpi", "singlestep", "audio-help", "rotate"}),
    {"chardev": CHARDEV | {"reconnect"}},
    frozenset({"memory-backend-ram"}),
)
NEW = OptionKnowledge(  # as 11.1 is
    COMMON | frozenset({"run-with", "perfmap"}),
    {
        "run-with": frozenset({"async-teardown", "chroot", "user"}),
        "chardev": CHARDEV | {"reconnect-ms", "logtimestamp"},
        "spice": frozenset({"port", "password-secret"}),
    },
    devices={"virtio-blk-pci": frozenset({"drive"})},
)

FORTH = [
    ("-async-teardown", "-run-with async-teardown=on"),
    ("-chroot /a,b", "-run-with chroot=/a,,b"),
    ("-runas nobody", "-run-with user=nobody"),
    ("-no-hpet", "-machine hpet=off"),
    ("-no-acpi", "-machine acpi=off"),
    ("-singlestep", "-accel tcg,one-insn-per-tb=on"),
    ("-accel tcg -singlestep", "-accel tcg,one-insn-per-tb=on"),
    ("-singlestep -accel kvm -accel tcg", "-accel kvm -accel tcg,one-insn-per-tb=on"),
    ("-watchdog i6300esb", "-device i6300esb"),
    ("-enable-kvm", "-accel kvm"),
    ("-chardev socket,id=a,path=/p,reconnect=5", "-chardev socket,id=a,path=/p,reconnect-ms=5000"),
    ("-netdev stream,id=n,addr.type=unix,reconnect=1", "-netdev stream,id=n,addr.type=unix,reconnect-ms=1000"),
    ('-netdev {"type":"stream","id":"n","reconnect":1}', '-netdev {"type":"stream","id":"n","reconnect-ms":1000}'),
    ("-chardev tty,id=a,path=/dev/x", "-chardev serial,id=a,path=/dev/x"),
    ("-usbdevice tablet", "-usb -device usb-tablet"),
    (
        "-soundhw ac97,hda -audiodev pa,id=x",
        "-device AC97,audiodev=x -device intel-hda -device hda-duplex,audiodev=x -audiodev pa,id=x",
    ),
    ("-device hda-duplex -audiodev none,id=x", "-device hda-duplex,audiodev=x -audiodev none,id=x"),
    ("-nodefaults -device AC97", "-nodefaults -audiodev none,id=cpr-audio -device AC97,audiodev=cpr-audio"),
    ("-device AC97", "-device AC97"),
    ("-balloon virtio -balloon none", "-device virtio-balloon"),
    ("-realtime mlock=on", "-overcommit mem-lock=on"),
    ("-portrait -rotate 90 -writeconfig /x -enable-fips -no-quit -S", "-S"),
    ("-sdl", "-display sdl"),
    ("-display sdl,window_close=off,alt_grab=on", "-display sdl,window-close=off,grab-mod=lshift-lctrl-lalt"),
    ("-smp 8,sockets=0,cores=4", "-smp 8,cores=4"),
    ("-m 0x20M", "-m 32M"),
    ("-object memory-backend-ram,id=r,size=0x1G", "-object memory-backend-ram,id=r,size=1G"),
    ("-object secret,id=s,data=x,loaded=on", "-object secret,id=s,data=x"),
    ('-object {"qom-type":"secret","id":"s","loaded":true}', '-object {"qom-type":"secret","id":"s"}'),
    ("-device virtio-blk-pci,drive=d,scsi=off", "-device virtio-blk-pci,drive=d"),
    (
        "-spice port=1,password=x,,y",
        "-object secret,id=cpr-spice-password,data=x,,y -spice port=1,password-secret=cpr-spice-password",
    ),
    ("-global migration.decompress-error-check=off -S", "-S"),
]

BACK = [
    ("-run-with async-teardown=on", "-async-teardown"),
    ("-run-with async-teardown=off", ""),
    ("-run-with chroot=/a,,b,user=u,async-teardown=on", "-runas u -chroot /a,b -async-teardown"),
    ("-chardev socket,id=a,path=/p,reconnect-ms=1500", "-chardev socket,id=a,path=/p,reconnect=2"),
    ("-chardev pty,id=a,logtimestamp=on", "-chardev pty,id=a"),
    ("-accel tcg,one-insn-per-tb=on", "-accel tcg -singlestep"),
    ("-object monitor-qmp,id=m,chardev=c,pretty=on", "-mon id=m,chardev=c,pretty=on,mode=control"),
    ("-perfmap -jitdump -S", "-S"),
    ("-device AC97", "-device AC97"),
]


@pytest.mark.parametrize(("before", "after"), FORTH)
def test_to_a_newer_qemu(before: str, after: str) -> None:
    done = translate(line(before), NEW)
    assert words(done.cmdline) == after
    assert done.unknown == ()
    assert bool(done.changes) == (before != after)
    assert translate(done.cmdline, NEW) == Translation(done.cmdline, (), ())


@pytest.mark.parametrize(("before", "after"), BACK)
def test_to_an_older_qemu(before: str, after: str) -> None:
    done = translate(line(before), OLD)
    assert sorted(words(done.cmdline).split(" -")) == sorted(after.split(" -")) or words(done.cmdline) == after
    assert done.unknown == ()


@pytest.mark.parametrize(
    "text",
    ["-async-teardown -chroot /x -runas u -no-hpet -singlestep -rotate 90 -chardev socket,id=a,path=/p,reconnect=1"],
)
def test_what_is_known_stays(text: str) -> None:
    assert translate(line(text), OLD) == Translation(line(text), (), ())


def test_what_nothing_can_be_done_about() -> None:
    done = translate(line("-run-with exit-with-parent=on -chardev pty,id=a,frobnicate=on -old-param -S"), NEW)
    assert done.unknown == ("-run-with exit-with-parent", "-chardev frobnicate", "-old-param")
    assert translate(line("-object memory-backend-shm,id=r"), OLD).unknown == ("-object memory-backend-shm",)
    without_mon = OptionKnowledge(NEW.options - {"mon"}, NEW.groups)
    future = translate(line("-mon chardev=c,mode=control,pretty=on -mon d,id=h"), without_mon)
    assert words(future.cmdline) == (
        "-object monitor-qmp,id=cpr-monitor-c,chardev=c,pretty=on -object monitor-hmp,id=h,chardev=d"
    )
    assert translate(line("-run-with chroot=/x"), OptionKnowledge(COMMON, {})).unknown == ("-run-with",)


HELP = """QEMU emulator version 11.1.3
usage: qemu-system-x86_64 [options] [disk_image]

Standard options:
-h or -help     display this help and exit
-machine [type=]name[,prop=value[,...]]
                selects emulated machine ('-machine help' for list)
-fda/-fdb file  use 'file' as floppy disk 0/1 image
-run-with [async-teardown=on|off][,chroot=dir]
--preconfig     pause QEMU before machine is initialized
-fw_cfg [name=]<name>,file=<file>
"""


def test_knowledge() -> None:
    knows = knowledge_from(
        HELP,
        [
            {"option": "run-with", "parameters": [{"name": "chroot", "type": "string"}]},
            {"option": "x", "parameters": []},
        ],
    )
    for name in ("h", "help", "machine", "fda", "fdb", "run-with", "preconfig", "fw_cfg", "M", ""):
        assert knows.option(name), name
    for name in ("chroot", "runas", "file"):
        assert not knows.option(name), name
    assert knows.parameter("run-with", "chroot") is True
    assert knows.parameter("run-with", "user") is False
    assert knows.parameter("x", "y") is None
    assert knows.device_property("e1000", "mac") is None
