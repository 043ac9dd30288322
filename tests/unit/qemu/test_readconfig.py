"""-readconfig files written out."""

from __future__ import annotations

import pytest

from cpr.qemu.cmdline import CommandLineError, chardevs, drives, machine
from cpr.qemu.readconfig import inline_readconfig, parse_config
from tests.unit.qemu.test_cmdline_chardevs import line, words

CONFIG = """# a comment

[machine]
  type = "q35"
  hpet = "off"

[memory]
  size = "512"

[smp-opts]
  cpus = "2"

[chardev "con"]
  backend = "socket"
  path = "/run/a,b"
  server = "on"
  wait = "off"

[mon "mon0"]
  chardev = "con"
  mode = "control"

[drive "disk"]
  if = "none"
  file = "/srv/a,b.qcow2"

[device "vblk"]
  driver = "virtio-blk-pci"
  drive = "disk"

[object "rng0"]
  qom-type = "rng-random"
  filename = "/dev/urandom"

[netdev "n0"]
  type = "user"

[global]
  driver = "virtio-blk-pci"
  property = "physical_block_size"
  value = "4096"

[name]
  guest = "a,b=c"
[rtc]
  base = "utc"
[boot-opts]
  menu = "on"
[accel]
  accel = "tcg"
"""

INLINED = (
    "-machine q35,hpet=off -m 512 -smp 2 -chardev socket,id=con,path=/run/a,,b,server=on,wait=off"
    " -mon con,id=mon0,mode=control -drive id=disk,if=none,file=/srv/a,,b.qcow2"
    " -device virtio-blk-pci,id=vblk,drive=disk -object rng-random,id=rng0,filename=/dev/urandom -netdev user,id=n0"
    " -global driver=virtio-blk-pci,property=physical_block_size,value=4096 -name guest=a,,b=c -rtc base=utc"
    " -boot menu=on -accel tcg"
)


def test_every_group() -> None:
    done = inline_readconfig(line("-nodefaults -readconfig /c -S"), {"/c": CONFIG}.__getitem__)
    assert words(done) == f"-nodefaults {INLINED} -S"
    assert machine(done).type == "q35"
    assert [c.label for c in chardevs(done)] == ["con"]
    assert drives(done)[0].file == "/srv/a,b.qcow2"


def test_order_of_overriding_options_is_kept() -> None:
    files = {"/a": '[machine]\ntype = "pc"\n', "/b": '[machine]\nhpet = "off"\n'}
    done = inline_readconfig(line("-nodefaults -M q35 -readconfig /a -readconfig /b -M x"), files.__getitem__)
    assert words(done) == "-nodefaults -M q35 -machine pc -machine hpet=off -M x"


@pytest.mark.parametrize(
    ("text", "config", "added"),
    [
        ("", '[netdev "n"]\ntype = "user"', "-net nic -net user"),
        ("-nic none", '[netdev "n"]\ntype = "user"', ""),
        ("", '[net]\ntype = "nic"', ""),
        ("", '[mon "m"]\nchardev = "c"', "-monitor vc:80Cx24C"),
        ("-nographic", '[mon "m"]\nchardev = "c"', "-serial mon:stdio"),
        ("-nographic -serial null", '[mon "m"]\nchardev = "c"', "-monitor stdio"),
        ("-monitor none", '[mon "m"]\nchardev = "c"', ""),
        ("", '[device "d"]\ndriver = "e1000"', ""),
    ],
)
def test_defaults_that_a_file_does_not_take_away(text: str, config: str, added: str) -> None:
    done = words(inline_readconfig(line(f"{text} -readconfig /c"), lambda _path: config))
    inlined = words(inline_readconfig(line(f"{text} -nodefaults -readconfig /c"), lambda _path: config))
    assert done == (inlined.replace("-nodefaults ", "") + " " + added).strip()


def test_a_key_said_twice_has_the_later_value() -> None:
    (group,) = parse_config('[drive "d"]\nfile = "a"\nif = "none"\nfile = "b"\n')
    assert (group.name, group.id, group.pairs) == ("drive", "d", (("file", "b"), ("if", "none")))


@pytest.mark.parametrize("text", ['file = "a"', "[drive\nfile = x", '[machine]\nfile = a"'])
def test_bad_files(text: str) -> None:
    with pytest.raises(CommandLineError, match="line"):
        parse_config(text)


def test_unknown_group() -> None:
    with pytest.raises(CommandLineError, match="frobnicate"):
        inline_readconfig(line("-readconfig /c"), lambda _path: '[frobnicate "x"]\na = "b"\n')
