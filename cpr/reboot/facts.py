"""What a decision about a reboot needs to know besides what a survey reads: read here, once, before the checks.

    guest = with_reboot_facts(guest)                       # what its RAM and disks lie on, its agent, what is by fd
    kexec = next_kernel(image="", initrd="", append="quiet", reuse=True, state_directory="/var/lib/cpr")

Out of scope: judging (checks/reboot.py, persistence.py).
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from cpr.checks.command import command_of
from cpr.errors import CprError
from cpr.linux import dax, kexec, proc, tun
from cpr.linux.process import RunFailed, run
from cpr.model import Backing, GuestAgent, NextKernel
from cpr.qemu import qmp, sockets
from cpr.qemu.agent import CALL_SECONDS, Agent
from cpr.qemu.answers import Answers, flag
from cpr.qemu.chardevs import parse_filename
from cpr.qemu.cmdline import CommandLineError, devices
from cpr.qemu.qmp import path_in
from cpr.reboot.afresh import demands
from cpr.reboot.afresh_ram import NAMED
from cpr.reboot.ramcopy import ram_directory
from cpr.survey_host import lasting_room

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cpr.model import Chardev, Guest, RamBlock, Storage

AGENT_PORT = "org.qemu.guest_agent.0"
AGENT_SECONDS = CALL_SECONDS
"""Nothing stands still meanwhile, and a guest that shares its processors with many others may take seconds."""
SYSTEMD_SECONDS = 3.0
RESTORE_UNIT = "cpr-restore.service"
POWER_MANAGEMENT = ("ICH9-LPC", "PIIX4_PM")
"""QOM types whose `disable_s3` decides what the ACPI tables offer (hw/isa/lpc_ich9.c, hw/acpi/piix4.c)."""


def with_reboot_facts(guest: Guest) -> Guest:
    """The guest with what the model says is read for a reboot only, as far as it can be read."""
    pid = guest.process.pid
    known = replace(
        guest,
        ram=tuple(replace(block, storage=ram_storage(pid, block)) for block in guest.ram),
        disks=tuple(disk_storage(pid, [f for chain in guest.chains for f in chain.files])),
        netdevs=tuple(replace(n, persistent=bool(n.ifname) and tun.persistent(n.ifname)) for n in guest.netdevs),
        chardevs=tuple(replace(c, peer=peer_of(guest, c)) for c in guest.chardevs),
        agent=ask_agent(guest),
        s3_disabled=ask_s3(guest),
        own_namespaces=own_namespaces(guest),
        unguarded_unit=next((s.who for s in guest.supervisors if s.kind == "systemd" and unguarded(s.who)), ""),
    )
    try:
        missing, needs = demands(known)
    except CommandLineError:
        return known  # `command-line` speaks of it
    return replace(known, not_had_again=missing, needed_after_boot=needs)


def ram_storage(pid: int, block: RamBlock) -> Storage | None:
    """By the descriptor that is this RAM, never by a path that may lead elsewhere; None where there is none."""
    if block.fd is None:
        return None
    try:
        storage = dax.storage_of(f"/proc/{pid}/fd/{block.fd}")
    except OSError:
        return None
    if storage.volatile or storage.kind not in NAMED or _leads_to(path_in(pid, storage.path), storage):
        return storage
    return replace(storage, volatile=f"{storage.path} was deleted or leads elsewhere now: nobody could open it again")


def _leads_to(path: str, storage: Storage) -> bool:
    """Whether the path is still this file or device."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    if storage.kind is Backing.DEVDAX:
        return (os.major(status.st_rdev), os.minor(status.st_rdev)) == storage.device
    return ((os.major(status.st_dev), os.minor(status.st_dev)), status.st_ino) == (storage.device, storage.inode)


def peer_of(guest: Guest, chardev: Chardev) -> str:
    """Path or HOST:PORT at the other end of a connection that QEMU has made; "" where there is none or nobody tells."""
    if chardev.server or chardev.client is None:
        return ""
    if told := parse_filename(chardev.filename).peer:
        return told
    inode = next((f.inode for f in guest.open_files if f.number == chardev.client), 0)
    return sockets.peer_path(sockets.Endpoint(number=chardev.client, inode=inode), guest.process.pid)


def disk_storage(pid: int, files: Sequence[str]) -> list[Storage]:
    """Of the names that are local paths, each once. What is not there is left out: `file-gone` speaks of it."""
    found = []
    for name in dict.fromkeys(files):
        if name.startswith("/"):
            with contextlib.suppress(OSError):
                found.append(replace(dax.storage_of(path_in(pid, name)), path=name))
    return found


def agent_socket(guest: Guest) -> str:
    """Path of the socket behind the guest agent's port, as the guest's process sees it; "" where there is none."""
    return _agent_port(guest)[0]


def _agent_port(guest: Guest) -> tuple[str, bool]:
    """That path, and whether a program in the guest has opened the port."""
    command = command_of(guest)
    ports = devices(command) if command is not None else ()
    labels = [p.params.get("chardev") for p in ports if p.params.get("name") == AGENT_PORT]
    for chardev in guest.chardevs:
        described = parse_filename(chardev.filename)
        if chardev.label in labels and described.protocol == "unix":
            return described.address, chardev.frontend_open
    return "", False


def ask_agent(guest: Guest) -> GuestAgent | None:
    """What answers at the agent's socket; None where there is no socket."""
    path, opened = _agent_port(guest)
    if not path:
        return None
    if not opened:  # nobody would answer, and most guests of a manager have the port
        return GuestAgent(path=path, error=f"guest agent {path}: no program in the guest has opened its port")
    try:
        with Agent(path, pid=guest.process.pid, timeout=AGENT_SECONDS) as agent:
            info = agent.info()
    except CprError as error:
        return GuestAgent(path=path, error=error.message)
    return GuestAgent(path=path, version=info.version, can_suspend=info.can_suspend)


def own_namespaces(guest: Guest) -> tuple[str, ...]:
    """Namespaces in which the guest is not with us; those it only gives to its children do not count."""
    ours = {name: inode for name, (_, inode) in proc.namespaces(os.getpid()).items() if "_for_" not in name}
    return tuple(name for name, inode in guest.namespaces if name in ours and ours[name] != inode)


def unguarded(unit: str) -> bool:
    """Whether systemd may start this service at a boot without asking `cpr may-start` first."""
    try:
        shown = run(["systemctl", "show", "-p", "UnitFileState", "-p", "ExecCondition", unit], timeout=SYSTEMD_SECONDS)
    except (RunFailed, OSError):
        return False
    values = dict(line.partition("=")[::2] for line in shown.stdout.decode(errors="replace").splitlines())
    starts = values.get("UnitFileState", "") not in ("", "disabled", "masked", "masked-runtime", "transient")
    return starts and "may-start" not in values.get("ExecCondition", "")


def restores_by_itself(unit: str = RESTORE_UNIT) -> bool:
    """Whether the unit that restores guests runs in the next boot; without systemd nothing does."""
    if not kexec.systemd_runs():  # systemctl may be there all the same, and reads what is on disk
        return False
    try:
        return run(["systemctl", "is-enabled", unit], timeout=SYSTEMD_SECONDS).stdout.strip() == b"enabled"
    except (RunFailed, OSError):
        return False


def ask_s3(guest: Guest) -> bool | None:
    """Asked only of a guest that has to be suspended."""
    if guest.monitor is None or not any(f.kind == "vfio" for f in guest.open_files):
        return None
    try:
        with qmp.connect(guest.monitor, guest.process.pid) as monitor:
            return s3_disabled(Answers(monitor))
    except CprError:
        return None


def s3_disabled(answers: Answers) -> bool | None:
    """Whether the machine offers no suspend to RAM; None where that cannot be told."""
    for name, kind in answers.children("/machine/unattached"):
        if kind in POWER_MANAGEMENT:
            value = answers.qom_get(f"/machine/unattached/{name}", "disable_s3", lambda value: value, None)
            return None if value is None else bool(value) if isinstance(value, int) else flag(value)
    return None


def next_kernel(
    *,
    image: str = "",
    initrd: str = "",
    append: str = "",
    reuse: bool = True,
    state_directory: str,
    unsaved: Sequence[str] = (),
    restoring: bool | None = None,
    save_ram: str = "",
    timeout: float = 0.0,
    root: str = "/",
) -> NextKernel:
    """The named kernel, or the newest that is installed; its command line is the running one with `append` added.

    `reuse=False`: its command line is `append` alone. `restoring`: whether guests are restored by themselves; asked if
    None. `save_ram`, `timeout`: as of `ram_directory`; empty: none.
    """
    installed = kexec.installed_kernels(root=root)
    chosen = next((k for k in installed if not image or os.path.realpath(k.image) == os.path.realpath(image)), None)
    if image and chosen is None:
        chosen = kexec.Kernel(release=kexec.image_release(image), image=image)
    line = kexec.next_command_line(kexec.running_command_line(root=root) if reuse else "", append)
    named = initrd or (chosen.initrd if chosen else "")
    free, volatile = lasting_room(state_directory, line)
    return NextKernel(
        image=chosen.image if chosen else "",
        initrd=named,
        release=chosen.release if chosen else "",
        command_line=line,
        missing=tuple(path for path in (image, initrd) if path and not os.path.isfile(path)),
        obstacles=kexec.obstacles(root=root),
        unsaved=tuple(unsaved),
        state_directory=state_directory,
        state_directory_free=free,
        state_directory_volatile=volatile,
        restores_by_itself=restores_by_itself() if restoring is None else restoring,
        live_update=kexec.live_update(root=root),
        save_ram=ram_directory(save_ram, line, timeout=timeout) if save_ram else None,
    )
