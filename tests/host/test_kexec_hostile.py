"""A new boot in which something is not as it was: refused, nothing overwritten, and restored once it is put right."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import pytest

from tests.host import guests, jumps, kernels
from tests.host.guests import LASTING, Lies
from tests.host.jumps import BY_HAND
from tests.host.machine import NVDIMM

if TYPE_CHECKING:
    from tests.host.conftest import Hosts
    from tests.host.vm import Host

pytestmark = pytest.mark.hostfull
MIB = 64


def refused(host: Host, words: str) -> None:
    """`cpr restore` says so and why, has started nothing that is left, and keeps the guest."""
    said = jumps.restore(host)
    assert said.code == 7, said
    row = jumps.back(said)["web1"]
    assert words in str(row["error"]), said
    assert jumps.count_qemus(host) == 0, said
    (guest,) = jumps.saved(host)["guests"]
    assert guest["restore"]["result"] == "open", said


@pytest.mark.timeout(1500)
def test_refused_until_it_is_put_right(hosts: Hosts) -> None:
    host = hosts.get(jumps.persistent((96,)), fresh=True)
    (path,) = jumps.device_dax(host)
    guest = guests.start(host, "10.0", name="web1", memory=f"{MIB}M", lies=Lies(LASTING, path))
    jumps.jump(host, "7.2", "--all", *BY_HAND)
    state = jumps.saved(host)["guests"][0]["state"]["path"]
    disk = f"{LASTING}/web1.disk"
    host.sh(f"cp -a {state} /state/kept && cp -a {disk} /state/disk")

    host.sh(f"truncate -s 1000 {state}")
    refused(host, "bytes when it was saved")
    host.sh(f"cat /state/kept > {state}")

    host.sh(f"printf '\\377\\376' | dd of={state} bs=1 seek=5000 conv=notrunc 2> /dev/null")
    refused(host, "was changed since it was saved")
    host.sh(f"cat /state/kept > {state}")

    host.sh(f"mv {state} {state}.away")
    refused(host, "No such file")
    host.sh(f"mv {state}.away {state}")

    host.sh(f"touch {disk}")
    refused(host, "was written since")
    host.sh(f"touch -r /state/disk {disk}")

    host.sh("ndctl disable-namespace namespace0.0", 60)
    refused(host, path)
    assert host.run(f"test -e {path}").code != 0, "a file was made where a device was"
    host.sh("ndctl enable-namespace namespace0.0", 60)

    host.inside("ram", "copy", path, MIB)
    host.inside("ram", "spoil", path, MIB)
    refused(host, "differ")
    host.inside("ram", "spoil", path, MIB)
    assert host.inside("ram", "wipe", path, MIB)["held"] == 0
    refused(host, "wiped")
    assert host.inside("ram", "look", path, MIB)["held"] == 0, "something was written over what was found"
    assert host.inside("ram", "back", path, MIB)["held"] > 0

    restored = jumps.restore(host)
    assert restored.code == 0, restored
    guest.pid = jumps.back(restored)["web1"]["pid_after"]
    log = guest.whole()
    assert log.sound, log.problems()

    again = jumps.restore(host)
    assert again.code == 5, again
    assert jumps.count_qemus(host) == 1
    assert guest.goes_on().sound

    # saved by hand; then the power fails, and with it what was memory only by the kernel's command line
    said = host.cpr("save", "web1", "/state/web1.state", "--mode", "reboot")
    assert said.code == 0, said
    host.sh("sync")
    host.power_cycle("7.2")
    lost = host.cpr("load", "/state/web1.state")
    assert lost.code == 3, lost
    jumps.device_dax(host)
    lost = host.cpr("load", "/state/web1.state")
    assert lost.code == 3, lost
    assert jumps.count_qemus(host) == 0
    host.sh("test -s /state/web1.state")


@pytest.mark.timeout(900)
def test_power_fails_instead_of_the_jump(hosts: Hosts) -> None:
    """When the guests are saved, and before anything else is done: what is on disk by then is enough, on an NVDIMM."""
    host = hosts.get(jumps.persistent((160,), NVDIMM), fresh=True)
    (path,) = jumps.device_dax(host)
    guest = guests.start(host, "10.0", name="web1", memory=f"{MIB}M", lies=Lies(LASTING, path))
    held = "until grep -qs '\"phase\": \"committed\"' /var/lib/cpr/reboot/*/manifest.json; do :; done; kill -STOP $cpr"
    words = shlex.join(["update", "--kexec", "-y", "--all", *jumps.next_kernel("7.2"), *BY_HAND])
    host.sh(f"(cpr {words} & cpr=$!; {held}; touch /run/held) > /dev/null 2>&1 < /dev/null &")
    host.sh("until test -e /run/held; do sleep 0.2; done", 240)
    assert host.sh("uname -r").strip() == kernels.obtain("6.12").release
    fsync = f"import os; os.fsync(os.open('{guest.console}', os.O_RDWR))"  # what it said, and nothing of cpr's
    host.sh(f'python3 -S -c "{fsync}"')
    host.power_cycle("7.2")
    restored = jumps.restore(host)
    assert restored.code == 0, restored
    log = guest.whole()
    assert log.sound, log.problems()


@pytest.mark.timeout(900)
def test_power_fails_after_the_jump(hosts: Hosts) -> None:
    """An NVDIMM keeps its content, and what was saved is restored a boot later."""
    host = hosts.get(jumps.persistent((160,), NVDIMM), fresh=True)
    (path,) = jumps.device_dax(host)
    guest = guests.start(host, "10.0", name="web1", memory=f"{MIB}M", lies=Lies(LASTING, path))
    jumps.jump(host, "7.2", "--all", *BY_HAND)
    host.power_cycle("7.2")
    restored = jumps.restore(host)
    assert restored.code == 0, restored
    log = guest.whole()
    assert log.sound, log.problems()


@pytest.mark.timeout(900)
def test_another_kernel_than_the_wanted_one_came_up(hosts: Hosts) -> None:
    """The memory is what counts: it is there, so the guest is restored, and the difference is told."""
    host = hosts.get(jumps.persistent((160,)), fresh=True)
    (path,) = jumps.device_dax(host)
    guest = guests.start(host, "10.0", name="web1", memory=f"{MIB}M", lies=Lies(LASTING, path))
    jumps.jump(host, "7.2", "--all", *BY_HAND)
    host.kexec("6.12")
    restored = jumps.restore(host)
    assert restored.code == 0, restored
    (told,) = (note for note in jumps.back(restored)["web1"]["notes"] if "was to run the kernel" in note)
    assert all(kernels.obtain(key).release in told for key in ("7.2", "6.12")), told
    log = guest.whole()
    assert log.sound, log.problems()


@pytest.mark.timeout(900)
def test_memmap_is_forgotten_by_hand(hosts: Hosts) -> None:
    """Somebody boots on without the word, so the memory is the kernel's: refused, and what is on disk is kept."""
    host = hosts.get(jumps.persistent((160,)), fresh=True)
    (path,) = jumps.device_dax(host)
    guests.start(host, "10.0", name="web1", memory=f"{MIB}M", lies=Lies(LASTING, path))
    jumps.jump(host, "7.2", "--all", *BY_HAND)
    state = jumps.saved(host)["guests"][0]["state"]["path"]
    before = host.sh(f"sha256sum {state}")
    host.kexec("6.12", " ".join(word for word in host.machine.append().split() if not word.startswith("memmap=")))
    refused(host, path)
    assert host.sh(f"sha256sum {state}") == before
    assert host.run(f"test -e {path}").code != 0, "a file was made where a device was"
