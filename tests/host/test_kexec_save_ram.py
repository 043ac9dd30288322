"""`cpr update --kexec --save-ram` in the host VM: RAM that no kexec keeps is there after a real one, from the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.host import guests, jumps, kernels
from tests.host.guests import LASTING, Lies
from tests.host.jumps import BY_HAND
from tests.host.machine import Machine

if TYPE_CHECKING:
    from tests.host.conftest import Hosts

COPIES = "/state/copies"
SHM = "/dev/shm"


@pytest.mark.hostfull
@pytest.mark.timeout(900)
def test_ram_on_shm_is_copied_over_a_jump(hosts: Hosts) -> None:
    """In a file with a name, by a stream, and in one without, in mapped form; refused while nobody asks for it."""
    host = hosts.get(Machine(), fresh=True)
    both = {
        name: guests.start(host, "10.0", name=name, memory="96M", lies=Lies(LASTING, path))
        for name, path in (("named", f"{SHM}/named.ram"), ("nameless", SHM))
    }
    refused = host.cpr("check", "--kexec", "--json", *BY_HAND, *jumps.next_kernel("7.2"))
    assert refused.code == 3, refused
    assert "ram-volatile-over-kexec" in refused.out
    assert "--save-ram DIR" in refused.out

    took = jumps.jump(host, "7.2", "--all", "--save-ram", COPIES, *BY_HAND)
    assert host.sh("uname -r").strip() == kernels.obtain("7.2").release
    assert jumps.count_qemus(host) == 0
    assert host.sh(f"ls {SHM}").split() == [], "RAM that was there without a copy"
    forms = {g["name"]: g["ram_copy"] for g in jumps.saved(host)["guests"]}
    assert forms == {"named": "stream", "nameless": "mapped-ram"}
    assert host.sh(f"stat -c %a {COPIES} {COPIES}/*").split() == ["700", "600", "600"]
    restored = jumps.restore(host)
    assert restored.code == 0, restored
    rows = jumps.back(restored)
    hosts.lines.append(
        f"kexec 6.12 -> 7.2, RAM of two guests copied to a disk: saved and jumped in {took:.1f} s, "
        f"restored in {max(row['total_seconds'] for row in rows.values()):.1f} s"
    )
    for name, guest in both.items():
        guest.pid = rows[name]["pid_after"]
        log = guest.whole()
        assert log.sound, log.problems()
    assert host.sh(f"ls {COPIES}").split() == []
