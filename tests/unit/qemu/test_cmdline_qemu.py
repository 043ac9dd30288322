"""Real QEMUs are asked whether they accept what the edits make."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cpr.qemu.cmdline import (
    CommandLine,
    append_options,
    chardevs,
    for_incoming,
    for_rehearsal,
    normalise_chardevs,
    with_chardev_fd,
    with_chardev_null,
    with_log_append,
    with_machine_type,
    with_memory_backend_fd,
    with_memory_backend_memfd,
    with_netdev_fds,
    with_netdev_null,
    with_program,
    with_vnc_detached,
    without,
    without_gdb,
    without_hostfwd,
)
from cpr.qemu.options import OptionKnowledge, knowledge_from, translate
from cpr.qemu.readconfig import inline_readconfig
from tests.unit.qemu.test_cmdline_samples import SAMPLES
from tests.unit.qemu.test_readconfig import CONFIG

pytestmark = pytest.mark.qemu

lab = pytest.importorskip("tests.lab.qemu")

KEYS = ("7.2", "10.0", "11.1.a")
MIB = 1 << 20
TUNSETIFF = 0x400454CA
TUNSETQUEUE = 0x400454D9
IFF_ATTACH_QUEUE = 0x0200
TAP_MULTI_QUEUE_VNET_HDR = 0x0002 | 0x1000 | 0x0100 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_MULTI_QUEUE, IFF_VNET_HDR


class Refused(Exception):
    """QEMU ended at its start; its own words."""


class Started:
    """A QEMU with a QMP monitor of ours on a socket pair; it is killed at the end."""

    def __init__(self, cmdline: CommandLine, *, fds: Sequence[int] = (), probe: bool = True, mine: int = -1) -> None:
        ours, theirs = socket.socketpair()
        if probe:
            extra = f"-chardev socket,id=probe,fd={theirs.fileno()} -mon chardev=probe,id=probe,mode=control"
            cmdline = append_options(cmdline, extra.split())
            inherited = (*fds, theirs.fileno())
        else:
            ours.close()
            ours, inherited = socket.socket(fileno=mine), tuple(fds)
        self.process = subprocess.Popen(
            cmdline.argv(),
            pass_fds=inherited,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        theirs.close()
        self.words: list[bytes] = []
        self.reader = threading.Thread(target=lambda: self.words.extend(self.process.stdout or ()), daemon=True)
        self.reader.start()
        ours.settimeout(60)
        self.socket = ours
        self.stream = ours.makefile("rwb")
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        request = {"execute": command, **({"arguments": arguments} if arguments else {})}
        try:
            self.stream.write(json.dumps(request).encode() + b"\n")
            self.stream.flush()
            for line in self.stream:
                answer = json.loads(line)
                if "return" in answer or "error" in answer:
                    assert "error" not in answer, answer
                    return answer["return"]
        except (BrokenPipeError, ConnectionResetError):
            pass
        self.process.wait(10)
        self.reader.join(10)
        raise Refused(b"".join(self.words).decode())

    def __enter__(self) -> Started:
        try:
            self.execute("query-status")  # answered by the main loop, so after the machine was made
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.stream.close()
        self.socket.close()


@pytest.fixture(scope="module", params=KEYS)
def build(request: pytest.FixtureRequest) -> Any:
    try:
        return lab.obtain(request.param)
    except Exception as err:
        pytest.skip(f"no QEMU {request.param} in the lab: {err}")


@pytest.fixture(scope="module")
def knows(build: Any) -> OptionKnowledge:
    text = subprocess.run([*build.command, "-help"], capture_output=True, text=True, check=True).stdout
    with Started(CommandLine.parse([*build.command, *["-machine", "none", "-nodefaults", "-display", "none"]])) as qemu:
        types = [found["name"] for found in qemu.execute("qom-list-types", abstract=False)]
        properties = qemu.execute("device-list-properties", typename="virtio-blk-pci")
        devices = {"virtio-blk-pci": frozenset(found["name"] for found in properties)}
        return knowledge_from(text, qemu.execute("query-command-line-options"), types=types, devices=devices)


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 128 * MIB)
    yield fd
    os.close(fd)


def guest(build: Any, text: str, machine: str = "pc-q35-7.2") -> CommandLine:
    words = f"-accel tcg -M {machine} -nodefaults -display none -m 128 -S {text}".split()
    return CommandLine.parse([*build.command, *words])


def labels(qemu: Started) -> set[str]:
    return {entry["label"] for entry in qemu.execute("query-chardev")} - {"probe"}


OLD_SPELLINGS = [
    "-serial mon:pty -serial none -serial null -parallel none -parallel null -qmp unix:{tmp}/q,server,nowait",
    "-serial telnet:127.0.0.1:0,server,nowait -monitor unix:{tmp}/m,server=on,wait=off -debugcon file:{tmp}/d",
    "-chardev pty,id=x -serial chardev:x -serial vc -monitor vc -qmp-pretty unix:{tmp}/p,server,nowait -monitor none",
    "-serial udp::1@127.0.0.1:0 -serial vc:80Cx24C -parallel file:{tmp}/f -serial unix:{tmp}/a,,b,server,nowait",
]


@pytest.mark.parametrize("text", OLD_SPELLINGS)
def test_labels_are_those_of_qemu(build: Any, tmp_path: Path, text: str) -> None:
    before = guest(build, text.format(tmp=tmp_path))
    expected = {chardev.label for chardev in chardevs(before)}
    with Started(before) as qemu:
        given = labels(qemu)
    for path in tmp_path.iterdir():
        path.unlink()
    with Started(normalise_chardevs(before)) as qemu:
        written_out = labels(qemu)
    # a mux has its own chardev below it
    assert {label for label in given if not label.endswith("-base")} == expected
    assert written_out == given


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-nographic",
        "-serial null",
        "-monitor none",
        "-nographic -serial null",
        "-parallel none",
        "-serial mon:null",
    ],
)
def test_implicit_labels_are_those_of_qemu(build: Any, text: str) -> None:
    from cpr.qemu.cmdline import implicit_chardevs

    cmdline = CommandLine.parse([*build.command, *f"-accel tcg -M pc-i440fx-7.2 -display none -m 64 -S {text}".split()])
    expected = {*implicit_chardevs(cmdline), *(chardev.label for chardev in chardevs(cmdline))}
    with Started(without(cmdline, ("nic",))) as qemu:  # the probe's -mon takes the default monitor away
        assert {label for label in labels(qemu) if not label.endswith("-base")} == expected - {"compat_monitor0"}


EDITS: list[tuple[str, Callable[[CommandLine], CommandLine]]] = [
    ("-serial unix:{tmp}/s,server,nowait", lambda c: with_chardev_null(c, "serial0")),
    ("-serial file:{tmp}/s -chardev pty,id=a,logfile={tmp}/l -serial chardev:a", with_log_append),
    ("-vnc :17,to=99,websocket=on,id=v,password=on -vnc unix:{tmp}/v,share=ignore", lambda c: with_vnc_detached(c)[0]),
    ("-display vnc=127.0.0.1:18", lambda c: with_vnc_detached(c)[0]),
    ("-gdb tcp::0,server,nowait", lambda c: without_gdb(c)[0]),
    ("-netdev user,id=n,hostfwd=tcp:127.0.0.1:0-:22 -device e1000,netdev=n", lambda c: without_hostfwd(c)[0]),
    (
        '-netdev {{"type":"user","id":"n","hostfwd":[{{"str":"tcp:127.0.0.1:0-:22"}}]}} -device e1000,netdev=n',
        lambda c: without_hostfwd(c)[0],
    ),
    ("-netdev user,id=n -device virtio-net-pci,netdev=n,mq=on,vectors=10", lambda c: with_netdev_null(c, "n")),
    ("-nic user,model=virtio-net-pci,mac=52:54:00:00:00:01,id=n", lambda c: with_netdev_null(c, "n")),
    ("-net nic -net user,id=n", lambda c: with_netdev_null(c, "n")),
    ("-M hpet=off", lambda c: with_machine_type(c, "pc-i440fx-7.2")),
    (
        "-object memory-backend-file,id=r,size=128M,mem-path={tmp}/r,share=on,discard-data=on,align=2M"
        " -M memory-backend=r",
        lambda c: with_memory_backend_memfd(c, "r"),
    ),
]


@pytest.mark.parametrize(("text", "edit"), EDITS)
def test_edits_are_accepted(build: Any, tmp_path: Path, text: str, edit: Callable[[CommandLine], CommandLine]) -> None:
    with Started(for_incoming(edit(guest(build, text.format(tmp=tmp_path))))) as qemu:
        assert qemu.execute("query-status")["status"] == "inmigrate"


@pytest.mark.parametrize(
    "text",
    [
        "memory-backend-ram,id=r,size=128M,prealloc=on",
        "memory-backend-memfd,id=r,size=128M,hugetlb=off,seal=on",
        "memory-backend-file,id=r,size=128M,mem-path=/nowhere,discard-data=on,align=2M,pmem=off,readonly=off,merge=off",
        '{"qom-type":"memory-backend-memfd","id":"r","size":134217728,"share":true,"prealloc":true}',
    ],
)
@pytest.mark.parametrize("share", [True, False])
def test_ram_by_descriptor(build: Any, memfd: int, text: str, share: bool) -> None:
    cmdline = with_memory_backend_fd(guest(build, f"-object {text} -machine memory-backend=r"), "r", memfd, share=share)
    with Started(for_incoming(cmdline), fds=[memfd]) as qemu:
        (ram,) = qemu.execute("query-memdev")
        assert (ram["id"], ram["share"], ram["size"]) == ("r", share, 128 * MIB)


@pytest.mark.parametrize(
    "text",
    [
        "-chardev socket,id=a,path=/nowhere/a,server=on,wait=off,telnet=on,logfile={tmp}/l",
        "-chardev socket,id=a,host=h,port=1,to=3,ipv4=on,server=on,wait=off,abstract=off,nodelay=on",
        "-chardev socket,id=a,fd=9,server=on,wait=off,mux=on",
    ],
)
def test_listener_by_descriptor(build: Any, tmp_path: Path, text: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "a"))
        listener.listen()
        cmdline = guest(build, text.format(tmp=tmp_path) + " -serial chardev:a")
        with Started(with_chardev_fd(cmdline, "a", listener.fileno(), server=True), fds=[listener.fileno()]) as qemu:
            assert "a" in labels(qemu)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(tmp_path / "a"))
                while True:
                    (found,) = (c for c in qemu.execute("query-chardev") if c["label"] == "a")
                    if found["frontend-open"] and "disconnected" not in found["filename"]:
                        break


@pytest.fixture
def taps() -> Iterator[list[int]]:
    """Two queues of a tap that vanishes with them."""
    fds: list[int] = []
    try:
        for _ in range(2):
            fds.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
            fcntl.ioctl(fds[-1], TUNSETIFF, struct.pack("16sH22x", b"cpr-cmdline", TAP_MULTI_QUEUE_VNET_HDR))
        yield fds
    except OSError as err:
        pytest.skip(f"no tap device: {err}")
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (
            "-netdev tap,id=n,ifname=nope,script=/nope,downscript=/nope,queues=2"
            " -device virtio-net-pci,netdev=n,mq=on,vectors=6",
            2,
        ),
        ("-netdev bridge,id=n,br=nope,helper=/nope -device virtio-net-pci,netdev=n", 1),
        ("-nic tap,id=n,ifname=nope,vnet_hdr=on,model=e1000", 1),
        ("-net nic -net tap,id=n,ifname=nope,script=no", 1),
        ('-netdev {"type":"tap","id":"n","ifname":"nope","queues":2} -device e1000,netdev=n', 1),
    ],
)
def test_taps_by_descriptor(build: Any, taps: list[int], text: str, count: int) -> None:
    cmdline = with_netdev_fds(guest(build, text), "n", taps[:count])
    with Started(cmdline, fds=taps):
        pass
    # QEMU detached the second queue, which the guest does not use; the next one cannot detach what is detached
    for fd in taps[1:count]:
        fcntl.ioctl(fd, TUNSETQUEUE, struct.pack("16sH22x", b"", IFF_ATTACH_QUEUE))
    null = with_netdev_null(guest(build, text), "n", () if "-net " in text else taps[:count])
    with Started(null, fds=taps):
        pass


def test_connection_by_descriptor(build: Any) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        cmdline = guest(build, "-chardev socket,id=a,path=/nowhere/a -serial chardev:a")
        with Started(with_chardev_fd(cmdline, "a", theirs.fileno(), server=False), fds=[theirs.fileno()]) as qemu:
            assert "a" in labels(qemu)


MACHINES = {"by-hand": "pc-q35-7.2", "nographic": "pc-i440fx-7.2", "numa": "pc-q35-7.2"}
SIZES = {"libvirt-pflash0-format": 3653632, "libvirt-pflash1-format": 540672}


@pytest.mark.parametrize("name", SAMPLES)
def test_rehearsals_start(build: Any, knows: OptionKnowledge, tmp_path: Path, name: str) -> None:
    (tmp_path / "key").write_bytes(bytes(32))
    (tmp_path / "kernel").write_bytes(bytes(8192))
    files = {
        "/var/lib/libvirt/qemu/domain-3-web1/master-key.aes": str(tmp_path / "key"),
        "/usr/share/qemu-server/bootsplash.jpg": str(tmp_path / "key"),
    }
    argv = SAMPLES[name]
    for old, new in files.items():
        argv = [word.replace(old, new) for word in argv]
    cmdline = with_program(CommandLine.parse(argv), build.command[0])
    if name in MACHINES:
        cmdline = with_machine_type(cmdline, MACHINES[name])
    # nested KVM and a bootable kernel are not what is asked here
    cmdline = append_options(without(cmdline, ("enable-kvm", "kernel", "append")), ["-accel", "tcg"])
    ours, theirs = socket.socketpair()
    done = translate(for_rehearsal(cmdline, monitor_fd=theirs.fileno(), disk_sizes=SIZES), knows)
    assert done.unknown == ()
    with theirs:
        qemu = Started(done.cmdline, fds=[theirs.fileno()], probe=False, mine=ours.detach())
    with qemu:
        assert qemu.execute("query-status")["status"] == "inmigrate"
        assert "cpr-rehearsal" in labels(qemu)


@pytest.mark.parametrize(
    "text",
    [
        "-drive if=ide,file=/x,format=raw,index=1,media=disk,cache=none,aio=native,readonly=off",
        "-drive if=virtio,file=/x.qcow2,id=v,snapshot=on,discard=unmap,throttling.bps-total=9,werror=stop,rerror=stop",
        "-drive if=none,id=n,file=/x -device virtio-scsi-pci -device scsi-hd,drive=n -device scsi-cd",
        "-drive if=none,id=e,media=cdrom -device ide-cd,drive=e",
        "-drive if=pflash,format=raw,unit=0,readonly=on,file=code -drive if=pflash,format=raw,unit=1,file=vars",
        "-hda /x -cdrom /y",
        "/positional",
        "-M pc-i440fx-7.2 -fda /x -hdb /z",
        "-blockdev qcow2,node-name=q,file.driver=file,file.filename=/x,file.locking=off -device virtio-blk-pci,drive=q",
        "-object throttle-group,id=g -blockdev raw,node-name=r,file.driver=host_device,file.filename=/dev/sda"
        " -blockdev throttle,node-name=t,throttle-group=g,file=r -device virtio-blk-pci,drive=t",
    ],
)
def test_null_disks_are_accepted(build: Any, text: str) -> None:
    ours, theirs = socket.socketpair()
    sizes = {"code": 3653632, "vars": 540672}
    cmdline = for_rehearsal(guest(build, text), monitor_fd=theirs.fileno(), disk_sizes=sizes)
    with theirs:
        qemu = Started(cmdline, fds=[theirs.fileno()], probe=False, mine=ours.detach())
    with qemu:
        nodes = qemu.execute("query-named-block-nodes")
        assert {node["drv"] for node in nodes} <= {"null-co", "throttle"}


DEVICES = (
    "-object memory-backend-file,id=r,size=128M,mem-path={tmp}/ram,share=on -machine memory-backend=r -serial null"
    " -drive if=none,id=d,file={tmp}/disk,format=raw -device virtio-blk-pci,drive=d -netdev user,id=n"
    " -device virtio-net-pci,netdev=n -device virtio-serial -chardev socket,id=a,path={tmp}/a,server=on,wait=off"
    " -device virtserialport,chardev=a -device VGA -device usb-ehci -device usb-tablet -device ide-cd"
)


def test_state_is_loaded_by_the_rehearsal(build: Any, tmp_path: Path) -> None:
    """The guest's state, saved by its own QEMU, over a private mapping of its RAM in this one."""
    old = lab.obtain("7.2")
    (tmp_path / "disk").write_bytes(bytes(MIB))
    running = guest(old, DEVICES.format(tmp=tmp_path))
    ours, theirs = socket.socketpair()
    with Started(running) as source, open(tmp_path / "ram", "rb+") as ram:
        skip = [{"capability": "x-ignore-shared", "state": True}]
        done = for_rehearsal(
            with_program(running, build.command[0]),
            monitor_fd=theirs.fileno(),
            disk_sizes={"d": MIB},
            ram_fds={"r": ram.fileno()},
        )
        target = Started(done, fds=[theirs.fileno(), ram.fileno()], probe=False, mine=ours.detach())
        theirs.close()
        with target:
            for qemu in (source, target):
                qemu.execute("migrate-set-capabilities", capabilities=skip)
            target.execute("migrate-incoming", uri=f"unix:{tmp_path}/state")
            source.execute("migrate", uri=f"unix:{tmp_path}/state")
            deadline = time.monotonic() + 60
            while (status := target.execute("query-migrate").get("status")) not in ("completed", "failed"):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert status == "completed"


def test_readconfig_is_the_same_written_out(build: Any, tmp_path: Path) -> None:
    config = CONFIG.replace("/run/a,b", str(tmp_path / "a,b")).replace(
        'if = "none"', 'driver = "null-co"\n  if = "none"'
    )
    config = config.replace('  file = "/srv/a,b.qcow2"\n', "").replace('"q35"', '"pc-q35-7.2"')
    (tmp_path / "c").write_text(config)
    cmdline = CommandLine.parse([*build.command, *f"-nodefaults -display none -S -readconfig {tmp_path}/c".split()])
    answers = []
    for candidate in (cmdline, inline_readconfig(cmdline, lambda path: Path(path).read_text())):
        with Started(candidate) as qemu:
            answers.append(
                [
                    labels(qemu),
                    qemu.execute("query-name"),
                    qemu.execute("query-memory-size-summary"),
                    len(qemu.execute("query-cpus-fast")),
                    [d["device"] for d in qemu.execute("query-block")],
                    sorted(d["qdev_id"] for bus in qemu.execute("query-pci") for d in bus["devices"]),
                ]
            )
        (tmp_path / "a,b").unlink(missing_ok=True)
    assert answers[0] == answers[1]
    assert answers[0][1] == {"name": "a,b=c"}


TRANSLATED = [
    "-no-hpet",
    "-no-acpi",
    "-async-teardown",
    "-run-with async-teardown=on",
    "-singlestep",
    "-watchdog i6300esb",
    "-rotate 90 -portrait",
    "-smp 2,sockets=0",
    "-object secret,id=s,data=x,loaded=on",
    "-usbdevice tablet",
    "-device ich9-intel-hda -device hda-duplex",
    "-audiodev none,id=x -device ich9-intel-hda -device hda-duplex",
    "-chardev socket,id=a,path=/nowhere/x,reconnect=5",
    "-chardev socket,id=a,path=/nowhere/x,reconnect-ms=5000",
    "-chardev null,id=a,logtimestamp=on,logfile=/dev/null",
    "-chardev tty,id=t,path=/dev/ptmx",
    "-object memory-backend-ram,id=r,size=0x10M",
    "-perfmap",
    "-global migration.decompress-error-check=off",
    "-soundhw ac97",
    "-chardev pty,id=c -object monitor-qmp,id=m,chardev=c",
    "-drive if=none,id=d,driver=null-co -device virtio-blk-pci,drive=d,scsi=off",
]


@pytest.mark.parametrize("text", TRANSLATED)
def test_translations_are_accepted(build: Any, knows: OptionKnowledge, text: str) -> None:
    done = translate(guest(build, text), knows)
    assert done.unknown == ()
    with Started(done.cmdline) as qemu:
        assert qemu.execute("query-status")["status"] == "prelaunch"


def test_every_option_in_the_help_is_in_our_table(knows: OptionKnowledge) -> None:
    from cpr.qemu.cmdline.argv import canonical_name
    from cpr.qemu.cmdline.table import SPECS

    assert [name for name in sorted(knows.options) if canonical_name(name) not in SPECS] == []
