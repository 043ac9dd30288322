"""Chardevs and monitors: labels as QEMU gives them, old spellings written out, descriptors put in."""

from __future__ import annotations

import pytest

from cpr.qemu.cmdline import (
    CommandLine,
    CommandLineError,
    chardevs,
    implicit_chardevs,
    monitors,
    normalise_chardevs,
    with_chardev_fd,
    with_chardev_null,
    with_log_append,
)
from cpr.qemu.cmdline.legacy import legacy_params
from tests.unit.qemu.test_cmdline_samples import parsed


def line(text: str) -> CommandLine:
    return CommandLine.parse(["q", *text.split()])


def words(cmdline: CommandLine) -> str:
    return " ".join(cmdline.argv()[1:])


LEGACY = [
    ("unix:/p,server,nowait", "socket,id=L,path=/p,server=on,wait=off"),
    ("unix:/a,,b", "socket,id=L,path=/a,,b"),
    ("tcp:localhost:4444,server=on", "socket,id=L,host=localhost,port=4444,server=on"),
    ("tcp::4444,server,nowait", "socket,id=L,host=,port=4444,server=on,wait=off"),
    ("telnet:0.0.0.0:23,server,nowait", "socket,id=L,host=0.0.0.0,port=23,server=on,wait=off,telnet=on"),
    ("tn3270::3270,server", "socket,id=L,host=,port=3270,server=on,tn3270=on"),
    ("websocket:h:1,server", "socket,id=L,host=h,port=1,server=on,websocket=on"),
    ("udp:h:1@l:2", "udp,id=L,host=h,port=1,localaddr=l,localport=2"),
    ("udp::1@:2", "udp,id=L,host=,port=1,localaddr=,localport=2"),
    ("udp::1", "udp,id=L,host=,port=1"),
    ("file:/a,b", "file,id=L,path=/a,,b"),
    ("pipe:/p", "pipe,id=L,path=/p"),
    ("pty", "pty,id=L"),
    ("pty:/link", "pty,id=L,path=/link"),
    ("stdio", "stdio,id=L"),
    ("null", "null,id=L"),
    ("mon:stdio", "stdio,id=L,mux=on,signal=off"),
    ("mon:pty", "pty,id=L,mux=on"),
    ("vc", "vc,id=L"),
    ("vc:80Cx24C", "vc,id=L,cols=80,rows=24"),
    ("vc:640x480", "vc,id=L,width=640,height=480"),
    ("/dev/ttyS0", "serial,id=L,path=/dev/ttyS0"),
    ("/dev/parport0", "parallel,id=L,path=/dev/parport0"),
    ("con:", "console,id=L"),
]


@pytest.mark.parametrize(("old", "new"), LEGACY)
def test_old_spellings(old: str, new: str) -> None:
    assert legacy_params("L", old).render() == new


@pytest.mark.parametrize("text", ["nonsense", "tcp:nowhere", "vc:big", "udp:x"])
def test_what_qemu_does_not_know(text: str) -> None:
    with pytest.raises(CommandLineError):
        legacy_params("L", text)


NORMALISED = [
    ("-serial unix:/p,server", "-chardev socket,id=serial0,path=/p,server=on -serial chardev:serial0"),
    # `none` and `chardev:` use a serial port's number up, but not a parallel one's
    (
        "-serial none -serial chardev:x -serial null -parallel none -parallel null",
        "-serial none -serial chardev:x -chardev null,id=serial2 -serial chardev:serial2"
        " -parallel none -chardev null,id=parallel0 -parallel chardev:parallel0",
    ),
    (
        "-serial mon:stdio",
        "-chardev stdio,id=serial0,mux=on,signal=off -mon chardev=serial0,mode=readline -serial chardev:serial0",
    ),
    # `-monitor none` is not counted, `chardev:` is
    (
        "-monitor none -qmp chardev:x -qmp-pretty unix:/q,server=on -monitor stdio",
        "-monitor none -mon chardev=x,mode=control"
        " -chardev socket,id=compat_monitor1,path=/q,server=on -mon chardev=compat_monitor1,mode=control,pretty=on"
        " -chardev stdio,id=compat_monitor2 -mon chardev=compat_monitor2,mode=readline",
    ),
    ("-debugcon file:/x", "-chardev file,id=debugcon,path=/x -debugcon chardev:debugcon"),
    # consoles of ports come after those of monitors
    (
        "-serial vc -monitor vc",
        "-serial chardev:serial0 -chardev vc,id=compat_monitor0 -mon chardev=compat_monitor0,mode=readline"
        " -chardev vc,id=serial0",
    ),
    ("-chardev pty,id=a -gdb tcp::1 -S", "-chardev pty,id=a -gdb tcp::1 -S"),
]


@pytest.mark.parametrize(("before", "after"), NORMALISED)
def test_normalise(before: str, after: str) -> None:
    assert words(normalise_chardevs(line(before))) == after


@pytest.mark.parametrize(("before", "after"), NORMALISED)
def test_labels_are_the_same_before_and_after(before: str, after: str) -> None:
    assert sorted((c.label, c.params.render()) for c in chardevs(line(before))) == sorted(
        (c.label, c.params.render()) for c in chardevs(line(after))
    )
    assert {(m.label, m.mode, m.pretty) for m in monitors(line(before))} == {
        (m.label, m.mode, m.pretty) for m in monitors(line(after))
    }


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("-m 1G", ("serial0", "parallel0", "compat_monitor0")),
        ("-nodefaults", ()),
        ("-nographic", ("serial0", "parallel0")),
        ("-nographic -serial null", ("parallel0", "compat_monitor0")),
        ("-serial mon:stdio", ("parallel0",)),
        ("-object monitor-qmp,id=m,chardev=c", ("serial0", "parallel0")),
        ("-monitor none -parallel none", ("serial0",)),
        ("-device isa-serial,chardev=x", ("parallel0", "compat_monitor0")),
        ("-global isa-parallel.iobase=1 -mon chardev=x", ("serial0",)),
    ],
)
def test_implicit(text: str, labels: tuple[str, ...]) -> None:
    assert implicit_chardevs(line(text)) == labels


def test_chardevs_of_libvirt() -> None:
    found = {chardev.label: chardev for chardev in chardevs(parsed("libvirt-9"))}
    assert list(found) == ["charmonitor", "charserial0", "charchannel0"]
    monitor = found["charmonitor"].socket
    assert monitor is not None
    assert (monitor.kind, monitor.fd, monitor.server, monitor.wait) == ("fd", "33", True, False)
    assert (found["charserial0"].backend, found["charserial0"].logfile) == ("pty", "/dev/fdset/0")
    assert found["charserial0"].logappend


def test_chardevs_by_hand() -> None:
    found = {chardev.label: chardev for chardev in chardevs(parsed("by-hand"))}
    assert list(found) == ["serial0", "serial1", "parallel0", "compat_monitor0", "compat_monitor1", "gdb"]
    assert found["serial0"].mux
    assert found["parallel0"].path == "/tmp/printer"
    tcp, gdb = found["compat_monitor0"].socket, found["gdb"].socket
    assert tcp is not None
    assert gdb is not None
    assert (tcp.kind, tcp.host, tcp.port, tcp.server, tcp.wait) == ("inet", "127.0.0.1", "4444", True, False)
    assert (gdb.port, gdb.server, gdb.wait) == ("9000", True, False)


def test_reconnect_and_wait() -> None:
    for text, seconds in (("reconnect=5", 5.0), ("reconnect-ms=1500", 1.5)):
        socket = chardevs(line(f"-chardev socket,id=a,path=/p,{text}"))[0].socket
        assert socket is not None
        assert (socket.reconnect, socket.wait, socket.server) == (seconds, False, False)
    waiting = chardevs(line("-chardev socket,id=a,path=/p,server,abstract=on"))[0].socket
    assert waiting is not None
    assert (waiting.wait, waiting.abstract, waiting.tight) == (True, True, True)


def test_monitors() -> None:
    assert [(m.label, m.mode, m.option) for m in monitors(parsed("by-hand"))] == [
        ("serial0", "readline", "serial"),
        ("compat_monitor0", "readline", "monitor"),
        ("compat_monitor1", "control", "qmp"),
    ]
    (new,) = monitors(line("-chardev pty,id=c -object monitor-qmp,id=m,chardev=c,pretty=on"))
    assert (new.label, new.mode, new.pretty, new.option) == ("c", "control", True, "object")
    assert [(m.label, m.mode, m.chardev is not None) for m in monitors(parsed("proxmox"))] == [
        ("qmp", "control", True),
        ("qmp-event", "control", True),
    ]


FD = [
    (
        "-chardev socket,id=a,path=/p,server=on,wait=off,logfile=/l",
        "-chardev socket,id=a,logfile=/l,fd=7,server=on,wait=off",
    ),
    (
        "-chardev socket,id=a,host=h,port=1,to=9,ipv4=on,server,nowait,telnet=on,mux=on",
        "-chardev socket,id=a,telnet=on,mux=on,fd=7,server=on,wait=off",
    ),
    (
        "-chardev socket,id=a,fd=33,server=on,wait=off,tls-creds=t",
        "-chardev socket,id=a,tls-creds=t,fd=7,server=on,wait=off",
    ),
]


@pytest.mark.parametrize(("before", "after"), FD)
def test_listening_descriptor(before: str, after: str) -> None:
    once = with_chardev_fd(line(before), "a", 7, server=True)
    assert words(once) == after
    assert with_chardev_fd(once, "a", 7, server=True) == once


def test_connected_descriptor() -> None:
    cmdline = line("-chardev socket,id=a,path=/p,reconnect=5,websocket=off")
    assert words(with_chardev_fd(cmdline, "a", 7, server=False)) == "-chardev socket,id=a,websocket=off,fd=7"


def test_descriptor_of_an_old_spelling() -> None:
    done = with_chardev_fd(line("-qmp unix:/q,server,nowait -S"), "compat_monitor0", 7, server=True)
    assert words(done) == (
        "-chardev socket,id=compat_monitor0,fd=7,server=on,wait=off -mon chardev=compat_monitor0,mode=control -S"
    )


@pytest.mark.parametrize(("text", "label"), [("-chardev pty,id=a", "a"), ("-chardev pty,id=a", "b"), ("-S", "serial0")])
def test_no_such_socket(text: str, label: str) -> None:
    with pytest.raises(CommandLineError, match=label):
        with_chardev_fd(line(text), label, 7, server=True)


def test_null() -> None:
    cmdline = line("-chardev stdio,id=a,mux=on,signal=off,logfile=/l,logappend=on")
    assert words(with_chardev_null(cmdline, "a")) == "-chardev null,id=a,mux=on,logfile=/l,logappend=on"


def test_append_instead_of_truncating() -> None:
    cmdline = line("-serial file:/s -chardev pty,id=a,logfile=/l -chardev socket,id=b,path=/p,logfile=/m,logappend=off")
    assert words(with_log_append(cmdline)) == (
        "-chardev file,id=serial0,path=/s,append=on -serial chardev:serial0"
        " -chardev pty,id=a,logfile=/l,logappend=on"
        " -chardev socket,id=b,path=/p,logfile=/m,logappend=on"
    )
