"""`cpr update --kexec` with everything real but the kernel: loading one and jumping are recorded in a file.

Run by the tests as `python -m tests.qemu.rebooting WORDS...`, which calls the command with a world in which

    load_kernel, unload_kernel, jump   write their name into $RECORD (fake: no kernel is loaded and nobody jumps, but by
                                       the manifest this is another boot afterwards);
                                       $REFUSE names the one that raises
    next_kernel                        is the real one, with what this container lacks left out: a kernel in /boot, the
                                       right to kexec, a unit that restores, the other guests of this host; and, where
                                       $ANY_ROOM is set, with all the room there can be in a --save-ram on whatever
    after a phase was written          it stands in $RECORD too; $KILL_AT names one at which we are killed
                                       (SIGKILL; "loaded": when a guest is; "jump": in it, which as a kexec -e does
                                       not return), $HOLD_AT one at which we wait for a file $RECORD.go

Everything else is this machine: guests, state files, manifests, locks, the guardian.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cpr.app import world as worlds
from cpr.cli import main
from cpr.errors import KexecFailed
from cpr.reboot import manifest as manifests
from cpr.reboot import store

if TYPE_CHECKING:
    from cpr.model import NextKernel
    from cpr.reboot.manifest import Manifest

RECORD, REFUSE, PIDS = "CPR_TEST_RECORD", "CPR_TEST_REFUSE", "CPR_TEST_PIDS"
KILL_AT, HOLD_AT, ANY_ROOM = "CPR_TEST_KILL_AT", "CPR_TEST_HOLD_AT", "CPR_TEST_ANY_ROOM"
ANOTHER_BOOT = "another boot"


def recorded(name: str) -> str:
    """Write it down, or refuse."""
    with open(os.environ[RECORD], "a") as file:
        file.write(f"{name}\n")
    if os.environ.get(REFUSE) == name:
        raise KexecFailed(f"{name} is refused by the test")
    return name


def only(names: set[str]) -> Any:
    """Candidates of one lab: other guests of this host are nobody's business here."""
    from cpr import discover

    return lambda: tuple(c for c in discover.candidates() if str(c.process.pid) in names)


def the_world() -> worlds.World:
    real = REAL()

    def next_kernel(directory: str, **named: Any) -> NextKernel:
        found = real.next_kernel(directory, **named)
        if found.save_ram is not None and os.environ.get(ANY_ROOM):
            found = replace(found, save_ram=replace(found.save_ram, volatile="", free=1 << 50))
        return replace(
            found, image="/boot/vmlinuz-test", initrd="/boot/initrd-test", release="6.99-test", missing=(),
            obstacles=(), restores_by_itself=True, state_directory_volatile="",
        )  # fmt: skip

    pids = set(os.environ[PIDS].split(","))
    return replace(
        real,
        candidates=only(pids),
        next_kernel=next_kernel,
        load_kernel=lambda kernel: recorded("load"),
        unload_kernel=lambda: (recorded("unload"), None)[1],
        jump=jump,
    )


def jump() -> None:
    """Nobody jumps: but for the manifest that was open."""
    recorded("jump")
    path = store.current()
    WRITE(path, replace(manifests.read_file(path), boot_id=ANOTHER_BOOT))
    if os.environ.get(KILL_AT) == "jump":
        os.kill(os.getpid(), signal.SIGKILL)


def write_and_die(path: str, manifest: Manifest) -> str:
    """The real write; then we are killed, if it is time."""
    written = WRITE(path, manifest)
    with open(os.environ[RECORD], "a") as file:
        file.write(f"[{manifest.phase}]\n")
    loaded = any(g.restore.result is manifests.Result.LOADED for g in manifest.guests)
    if os.environ.get(KILL_AT) == (manifests.Result.LOADED if loaded else manifest.phase):
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get(HOLD_AT) == manifest.phase:
        while not os.path.exists(f"{os.environ[RECORD]}.go"):
            time.sleep(0.01)
    return written


REAL = worlds.real_world
WRITE = manifests.write_file

if __name__ == "__main__":
    from cpr.app import check  # noqa: F401 - so that all who have taken the name are there

    for module in list(sys.modules.values()):
        if getattr(module, "real_world", None) is REAL:
            module.real_world = the_world  # type: ignore[attr-defined]
    manifests.write_file = write_and_die
    sys.exit(main.run(sys.argv[1:]))
