# ruff: noqa: E501, SIM905, S104  (command lines read better unbroken)
"""The command line of a start after a boot: what is put back, what is left out, what cannot be had again."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from cpr.model import Backing, Guest, RamBlock, Storage, VncListener
from cpr.reboot.afresh import Afresh, afresh, demands, with_ram_paths
from cpr.reboot.afresh_ram import NewMemory, ram_path
from tests.unit import values
from tests.unit.checks.facts import ARGV, DEVDAX, chardev, guest, netdev, target, vnc

CONTROL = "-chardev socket,id=cpr-control,fd=20 -mon chardev=cpr-control,mode=control -S -incoming defer"


def dax_ram(**changes: Any) -> RamBlock:
    return replace(values.ram(), **{"backing": Backing.DEVDAX, "storage": DEVDAX, **changes})


def made(*words: str, **changes: Any) -> Afresh:
    return afresh(guest(*words, **{"ram": (dax_ram(),), **changes}), target())


def text(it: Afresh) -> str:
    return " ".join(it.argv)


def test_the_plainest() -> None:
    it = made()
    assert text(it) == (
        "/opt/qemu/bin/qemu-system-x86_64 -machine pc-q35-7.2,memory-backend=ram0 "
        "-object memory-backend-file,id=ram0,size=1G,mem-path=/dev/dax0.0,share=on -display none " + CONTROL
    )
    assert (it.control, it.control_number) == ("cpr-control", 20)
    assert (it.missing, it.directories, it.needs, it.notes) == ((), (), (), ())


def test_what_touches_the_guest_or_belongs_to_the_old_start_is_left_out() -> None:
    ram = "memory-backend-file,id=ram0,size=1G,mem-path=/dev/dax0.0,share=on,prealloc=on,discard-data=on,policy=bind,host-nodes=0"
    it = made(
        *f"-object {ram} -daemonize -S -incoming tcp::1 -loadvm x -mem-prealloc -D /var/log/q -runas nobody".split(),
        *"-run-with user=nobody,async-teardown=on -chardev socket,id=cpr-control,fd=9 -mon chardev=cpr-control,mode=control".split(),
        argv=ARGV[:3],
    )
    assert it == made(argv=ARGV[:3])
    it = afresh(
        guest(argv=(*ARGV[:3], *f"-object {ram} -daemonize -S -incoming tcp::1 -loadvm x -D /var/log/q -runas nobody".split(), "-run-with", "user=nobody,async-teardown=on"), ram=(dax_ram(),)),
        target(),
    )
    for gone in ("-daemonize", "tcp::1", "-loadvm", "prealloc", "policy", "host-nodes", "/var/log", "nobody"):
        assert gone not in text(it), gone
    assert "discard-data=off" in text(it)
    assert "-run-with async-teardown=on" in text(it)
    assert text(it).endswith(CONTROL)
    assert "-D" in it.notes[0]


def test_the_pid_file_comes_back_wherever_it_is_noted() -> None:
    for it in (made("-pidfile", "/run/q/web1.pid", pidfile="/run/q/web1.pid"), made(pidfile="/run/q/web1.pid")):
        assert text(it).count("-pidfile /run/q/web1.pid") == 1
        assert it.directories == ("/run/q",)


def test_the_environment_has_nothing_of_the_old_process() -> None:
    environ = (("PATH", "/bin"), ("CPR_RUN", "20261120T101500-3f2a/1"), ("CPR_PIDFILE", "/x"), ("QEMU_FD_ram", "7"))
    assert made(environ=environ).environ == (("PATH", "/bin"),)
    marked = afresh(guest(environ=environ), target(extra_options=("-d", "unimp")), mark="run/1")
    assert marked.environ == (("PATH", "/bin"), ("CPR_RUN", "run/1"), ("CPR_QEMU_OPTIONS", '["-d", "unimp"]'))
    assert marked.argv[-5:] == ("-S", "-incoming", "defer", "-d", "unimp")


# -- memory


@pytest.mark.parametrize("kind", [Backing.TMPFS, Backing.HUGETLB, Backing.DISK_FILE, Backing.FSDAX])
def test_ram_goes_by_what_its_descriptor_is(kind: Backing) -> None:
    block = values.ram()
    assert ram_path(replace(block, storage=Storage(kind=kind, path="/mnt/ram"), path="/elsewhere")) == "/mnt/ram"
    assert ram_path(replace(block, storage=None, backing=kind, path="/mnt/ram")) == "/mnt/ram"
    assert ram_path(replace(block, storage=None, backing=kind)) == "", "a number is no name"


def test_ram_without_a_name() -> None:
    memfd = replace(values.ram(), storage=Storage(kind=Backing.MEMFD, path="/memfd:ram"))
    (missing,) = made(ram=(memfd,)).missing
    assert missing.subject == "ram0"
    assert "memfd" in missing.why
    assert missing.hint
    private = replace(values.ram(), shared=False)
    assert [m.subject for m in made(ram=(private,)).missing] == ["-object ram0"], "its number leads nowhere"


def test_ram_at_another_place() -> None:
    moved = with_ram_paths(made().argv, {"ram0": "/dev/dax1.0"})
    assert " ".join(moved) == text(made()).replace("/dev/dax0.0", "/dev/dax1.0")


def anew(block: RamBlock, *words: str, **changes: Any) -> Afresh:
    return afresh(guest(*words, **{"ram": (block,), **changes}), target(), anew={"ram0"})


def test_ram_that_is_made_anew_by_its_own_words() -> None:
    """A file on tmpfs, a directory of huge pages, private and anonymous memory: nothing is put in their place."""
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        ("memory-backend-file,id=ram0,size=1G,mem-path=/dev/shm/a/ram,share=on", {"path": "/dev/shm/a/ram"}),
        ("memory-backend-file,id=ram0,size=1G,mem-path=/dev/hugepages,share=on", {"path": "/dev/hugepages"}),
        ("memory-backend-file,id=ram0,size=1G,mem-path=/vm/t,share=off", {"path": "/vm/t", "shared": False}),
        ("memory-backend-memfd,id=ram0,size=1G,share=on", {"named_file": False, "path": ""}),
        ("memory-backend-ram,id=ram0,size=1G", {"named_file": False, "path": "", "shared": False}),
    )
    for words, changes in cases:
        it = anew(replace(values.ram(), **changes), argv=(*ARGV[:3], "-object", words))
        assert f"-object {words} " in text(it)
        assert (it.missing, it.memory) == ((), ())


def test_ram_of_a_descriptor_is_made_anew_as_one() -> None:
    """So it was started by `cpr run`, or an update has made it so: and so it can be updated again."""
    memfd = replace(values.ram(), storage=Storage(kind=Backing.MEMFD, path="/memfd:ram"))
    it = anew(memfd)
    assert "-object memory-backend-file,id=ram0,size=1G,mem-path=/proc/self/fd/21,share=on " in text(it)
    assert it.memory == (NewMemory(id="ram0", number=21, size=1 << 30),)
    assert it.missing == ()
    gone = Storage(kind=Backing.HUGETLB, path="/dev/hugepages/qemu_back_mem.ram0.x", volatile="it was deleted")
    it = anew(replace(memfd, storage=gone, page_size=2 << 20))
    assert it.memory == (NewMemory(id="ram0", number=21, size=1 << 30, page=2 << 20),)


def test_ram_of_a_descriptor_that_has_a_name_gets_it_back_and_its_directory() -> None:
    named = replace(values.ram(), storage=Storage(kind=Backing.TMPFS, path="/dev/shm/guests/ram"))
    it = anew(named)
    assert "mem-path=/dev/shm/guests/ram,share=on " in text(it)
    assert it.directories == ("/dev/shm/guests",)
    assert it.memory == ()


def test_only_what_is_lost_is_made_anew() -> None:
    second = "memory-backend-file,id=ram1,size=1G,mem-path=/proc/self/fd/22,share=on"
    memfd = replace(values.ram("ram1"), path="/proc/self/fd/22", storage=Storage(kind=Backing.MEMFD, path="/memfd:x"))
    it = afresh(guest("-object", second, ram=(dax_ram(), memfd)), target(), anew={"ram1"})
    assert "id=ram0,size=1G,mem-path=/dev/dax0.0," in text(it)
    assert [m.id for m in it.memory] == ["ram1"]
    assert [m.subject for m in afresh(guest("-object", second, ram=(dax_ram(), memfd)), target()).missing] == ["ram1"]


# -- sockets


def sockets(words: str, *known: Any) -> Afresh:
    return made(*words.split(), chardevs=known)


def test_a_socket_that_is_there_by_number_gets_its_address_back() -> None:
    words = "-chardev socket,id=a,fd=7,server=on,wait=on,logfile=/l -serial chardev:a"
    it = sockets(words, chardev("a", filename="disconnected:unix:/run/q/a,b,server=on"))
    assert "-chardev socket,id=a,logfile=/l,logappend=on,path=/run/q/a,,b,server=on,wait=off" in text(it)
    assert it.directories == ("/run/q",)
    it = sockets(words, chardev("a", filename="tcp:127.0.0.1:4444,server=on <-> 127.0.0.1:5"))
    assert "host=127.0.0.1,port=4444,server=on,wait=off" in text(it)
    it = sockets(words, chardev("a", filename="disconnected:telnet:[::1]:23,server=on"))
    assert "host=::1,port=23" in text(it)
    it = sockets(words, chardev("a", filename="disconnected:unix:name,abstract=on,tight=on,server=on"))
    assert "path=name,abstract=on" in text(it)
    it = sockets(words, chardev("a", filename="disconnected:unix:rel.sock,server=on"))
    assert "path=./rel.sock" in text(it)
    muxed = (chardev("a", backend="mux", filename="mux"), chardev("a-base", filename="unix:/m,server=on"))
    assert "path=/m,server=on" in text(sockets(words.replace(",wait=on", ",mux=on"), *muxed))


def test_a_connection_that_is_there_by_number() -> None:
    words = "-chardev socket,id=t,fd=7 -device virtserialport,chardev=t"
    it = sockets(words, chardev("t", server=False, listener=None, client=7, peer="/run/tpm.sock"))
    assert "-chardev socket,id=t,path=/run/tpm.sock" in text(it)
    assert it.needs == (("socket", "/run/tpm.sock"),)
    assert it.directories == (), "somebody else makes it"
    it = sockets(words, chardev("t", server=False, listener=None, client=7, peer="10.0.0.1:99"))
    assert "host=10.0.0.1,port=99" in text(it)
    assert it.needs == (("address", "10.0.0.1:99"),)


@pytest.mark.parametrize(
    ("words", "known"),
    [
        ("fd=7,server=on", chardev("a", filename="disconnected:fd:7,server=on")),
        ("fd=7,server=on", chardev("a", filename="unix:,server=on")),
        ("fd=7,server=on", chardev("b")),
        ("fd=7", chardev("a", server=False, listener=None, client=7)),
        ("fd=7", chardev("a", server=False, listener=None, client=7, peer="relative")),
    ],
)
def test_a_socket_that_nobody_knows_the_address_of(words: str, known: Any) -> None:
    (missing,) = sockets(f"-chardev socket,id=a,{words}", known).missing
    assert missing.subject == "chardev a"
    assert "fd=7" in missing.why
    assert "path=" in missing.hint


def test_nobody_is_waited_for() -> None:
    for words in (
        "-qmp unix:/run/m,server",
        "-chardev socket,id=a,path=/run/m,server=on",
        "-serial telnet:h:1,server",
        "-chardev socket,id=a,path=/run/m,server,wait=on",
    ):
        assert "wait=off" in text(made(*words.split())), words
    dialled = made("-chardev", "socket,id=a,path=/run/s", "-chardev", "socket,id=b,path=/run/r,reconnect=1")
    assert "wait" not in text(dialled)
    assert dialled.needs == (("socket", "/run/s"),), "the other one is dialled again and again"


def test_directories_of_what_qemu_makes() -> None:
    it = made(
        *"-chardev file,id=f,path=/run/a/log -chardev null,id=n,logfile=b/log -monitor unix:/run/c/m,server".split(),
        *"-gdb unix:/run/d/gdb,server=on,wait=off -vnc unix:/run/e/vnc -qmp unix:top,server".split(),
        cwd="/srv",
    )
    assert it.directories == ("/run/a", "/srv/b", "/run/c", "/run/d", "/srv", "/run/e")


# -- network


def net(words: str, **fact: Any) -> Afresh:
    return made("-netdev", words, "-device", "virtio-net-pci,netdev=net0", netdevs=(netdev(**fact),))


def test_taps() -> None:
    script = "tap,id=net0,ifname=tap0,script=/etc/qemu-ifup"
    it = net(script)
    assert f"-netdev {script} " in text(it)
    assert (it.missing, it.needs, it.notes) == ((), (), ())
    it = net("tap,id=net0,ifname=tap0,script=no,downscript=no", persistent=True)
    assert it.needs == (("interface", "tap0"),)
    it = net("tap,id=net0,ifname=tap0,script=no,downscript=no")
    assert "tap0" in it.notes[0]
    assert net("bridge,id=net0,br=br7").needs == (("bridge", "br7"),)
    assert net("tap,id=net0,helper=/usr/lib/h").needs == (("bridge", "br0"),)


def test_taps_by_number() -> None:
    it = net("tap,id=net0,fds=30:31,vhost=on,vhostfds=33:34", persistent=True, fds=(30, 31), vhost=True)
    assert "-netdev tap,id=net0,ifname=tap0,script=no,downscript=no,queues=2,vhost=on" in text(it)
    assert (it.missing, it.needs) == ((), (("interface", "tap0"),))
    (missing,) = net("tap,id=net0,fd=30").missing
    assert missing.subject == "netdev net0"
    assert "tap0" in missing.why
    assert "ip tuntap" in missing.hint
    (missing,) = net("tap,id=net0,fd=30", ifname="").missing
    assert missing.subject == "netdev net0"
    it = made("-nic", "tap,fd=30,mac=52:54:00:00:00:01", netdevs=(netdev(id="#tap0", persistent=True),))
    assert "-nic tap,mac=52:54:00:00:00:01,ifname=tap0,script=no,downscript=no" in text(it)


def noted(option: str, words: str = "tap,id=net0,fd=30,vhost=on,vhostfd=31", **fact: Any) -> Afresh:
    environ = (("CPR_NETDEVS", json.dumps({"net0": option})),)
    return made("-netdev", words, netdevs=(netdev(**fact),), environ=environ)


def test_taps_that_an_update_passed_on_are_made_as_before() -> None:
    script = "tap,id=net0,ifname=tap0,script=/etc/qemu-ifup,vhost=on"
    it = noted(script)
    assert f"-netdev {script} " in text(it)
    assert it.missing == ()
    assert dict(it.environ) == {"CPR_NETDEVS": json.dumps({"net0": script})}, "for the next update"
    assert noted("bridge,id=net0,br=br7").needs == (("bridge", "br7"),)
    it = noted("tap,id=net0,ifname=tap0,script=no", persistent=True)
    assert (it.missing, it.needs) == ((), (("interface", "tap0"),))
    assert "script=/new" in text(noted(script, "tap,id=net0,ifname=tap0,script=/new")), "argv counts where it says it"


@pytest.mark.parametrize(
    "option", ["tap,id=other,ifname=x", "user,id=net0", "tap,id=net0,fd=9", "{", '{"type":"tap"', "tap,id=net0,vhostfd=7"]
)
def test_a_note_that_could_not_stand_there_is_not_believed(option: str) -> None:
    assert [m.subject for m in noted(option).missing] == ["netdev net0"]
    assert [m.subject for m in made("-netdev", "tap,id=net0,fd=3", environ=(("CPR_NETDEVS", option),)).missing]


def test_forwarded_ports_are_those_of_now() -> None:
    rules = ("tcp::2222-10.0.2.15:22", "udp:127.0.0.1:53-10.0.2.15:53")
    it = net("user,id=net0", kind="user", ifname="", hostfwd=rules)
    assert f"-netdev user,id=net0,hostfwd={rules[0]},hostfwd={rules[1]}" in text(it)
    it = net("user,id=net0,hostfwd=tcp::0-:22", kind="user", ifname="", hostfwd=rules[:1])
    assert f"-netdev user,id=net0,hostfwd={rules[0]} " in text(it)
    it = net('{"type":"user","id":"net0"}', kind="user", ifname="", hostfwd=rules[:1])
    assert f'"hostfwd":[{{"str":"{rules[0]}"}}]' in text(it)
    it = net("user,id=net0,hostfwd=tcp::5-:22", kind="user", ifname="")
    assert "hostfwd=tcp::5-:22" in text(it), "nobody could be asked: the command line counts"


# -- displays and the rest


@pytest.mark.parametrize(
    ("listeners", "words"),
    [
        ([("ipv4", "127.0.0.1", "5901", 9)], "127.0.0.1:1"),
        ([("ipv6", "::1", "5907", 9)], "[::1]:7"),
        ([("ipv4", "0.0.0.0", "5901", 9), ("ipv6", "::", "5901", 10)], ":1"),
        ([("ipv4", "0.0.0.0", "5901", 9)], "0.0.0.0:1"),
        ([("unix", "/run/v", "", 9)], "unix:/run/v"),
        ([("ipv4", "127.0.0.1", "5901", 9), ("unix", "/v", "", 9)], "127.0.0.1:1,vnc=unix:/v"),
    ],
)
def test_a_display_listens_again_where_it_did(listeners: list[tuple[str, str, str, int]], words: str) -> None:
    it = made("-vnc", "none,password=on", vnc=(vnc(listeners=tuple(VncListener(*of) for of in listeners)),))
    assert f"-vnc {words},password=on" in text(it)
    assert it.missing == ()


def test_displays_that_stay_as_they_are_given() -> None:
    somewhere = (vnc(listeners=(VncListener("ipv4", "127.0.0.1", "5903", 9),)),)
    assert "-vnc :1 " in text(made("-vnc", ":1", vnc=somewhere))
    assert "-vnc 127.0.0.1:3 " in text(made("-vnc", "localhost:0,to=9", vnc=somewhere)), "clients know this port"
    assert "-vnc none " in text(made("-vnc", "none", vnc=(vnc(),)))
    low = (vnc(listeners=(VncListener("ipv4", "127.0.0.1", "99", 9),)),)
    (missing,) = made("-vnc", "none", vnc=low).missing
    assert missing.subject == "vnc default"


def test_the_gdb_stub() -> None:
    stub = chardev("gdb", backend="gdb", filename="disconnected:tcp:127.0.0.1:1234,server=on")
    assert "-gdb tcp:127.0.0.1:1234" in text(made(chardevs=(stub,)))
    assert "-gdb unix:/g" in text(made("-gdb", "unix:/g,server=on,wait=off", chardevs=(stub,)))


@pytest.mark.parametrize(
    ("words", "subject", "number"),
    [
        ("-add-fd fd=9,set=2,opaque=rdwr:/img", "-add-fd set 2", "fd=9"),
        ("-device vhost-scsi-pci,id=s0,vhostfd=9", "-device s0", "vhostfd=9"),
        ("-object iommufd,id=io0,fd=9", "-object io0", "fd=9"),
        ("-netdev stream,id=n1,addr.type=fd,addr.str=9", "-netdev n1", "addr.str=9"),
        ("-kernel /proc/self/fd/9", "-kernel", "fd=9"),
    ],
)
def test_other_numbers_lead_nowhere(words: str, subject: str, number: str) -> None:
    (missing,) = made(*words.split()).missing
    assert missing.subject == subject
    assert number in missing.why
    assert missing.hint


def test_what_is_missing_does_not_depend_on_the_new_qemu() -> None:
    bare: Guest = guest("-add-fd", "fd=9,set=2", "-chardev", "socket,id=a,path=/run/s", ram=(dax_ram(),))
    made = afresh(bare, target())
    assert demands(bare) == (made.missing, made.needs)
    assert made.missing
    assert made.needs
