"""What a guest's command line says of files: which are gone, whose a descriptor of one is, where the pid file lies."""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import TYPE_CHECKING

from cpr.linux import proc
from cpr.qemu import cmdline as cl

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

TEXT_FILES = frozenset({"kernel", "initrd", "dtb"})
PARAMETER_FILES = {
    "object": ("file", "filename", "dir"),
    "acpitable": ("file", "data"),
    "smbios": ("file",),
    "fw_cfg": ("file",),
    "device": ("romfile",),
    "option-rom": ("romfile",),
    "spice": ("x509-dir", "x509-key-file", "x509-cert-file", "x509-cacert-file"),
}
"""Parameters that name a file QEMU reads when it starts."""
CHARDEV_OPTIONS_OF_ANOTHER_KIND = ("memory-backend-", "input-", "can-", "rng-", "filter-")
AFTER_ADDED = (("-S", "-incoming", "defer"), ("-incoming", "defer"), ("-S",), ())
"""What an update puts behind the options that it was asked to add."""


def gone_files(command: cl.CommandLine | None, pid: int, cwd: str) -> tuple[str, ...]:
    """Files that the command line names and that are not there any more: a second QEMU could not start.

    Looked up as the guest sees them; with -chroot as we see them, for they were opened before it took effect.
    """
    if command is None:
        return ()
    chrooted = cl.settings(command).chroot is not None
    gone = []
    for path in dict.fromkeys(read_at_start(command)):
        absolute = os.path.join(cwd, path)
        places = [absolute] if chrooted else [f"/proc/{pid}/root{absolute}", absolute]
        if not any(_is_there(place) for place in places):
            gone.append(path)
    return tuple(gone)


def _is_there(path: str) -> bool:
    try:
        os.stat(path)
    except PermissionError:
        return True  # nobody can say
    except OSError:
        return False
    return True


def read_at_start(command: cl.CommandLine) -> Iterator[str]:
    """Paths that a start of this command line reads. Names without a slash may lie in QEMU's data directory."""
    for option in command.options:
        text = option.value or ""
        if (option.name in TEXT_FILES and text) or (option.name == "bios" and "/" in text):
            yield text
        elif option.name == "machine" and "/" in (option.params.get("firmware") or ""):
            yield option.params.get("firmware") or ""
        elif option.name in PARAMETER_FILES:
            yield from _parameters(option)
    for drive in cl.drives(command):
        if drive.file and _is_local(drive.file):
            yield drive.file.removeprefix("file:")


def _parameters(option: cl.Option) -> Iterator[str]:
    params = option.params
    kind = params.get("qom-type") or ""
    if option.name == "object" and kind.startswith(CHARDEV_OPTIONS_OF_ANOTHER_KIND):
        return
    for key in PARAMETER_FILES[option.name]:
        for value in params.all(key):
            for path in value.split(":") if option.name == "acpitable" else (value,):
                if path and _is_local(path) and (key != "romfile" or "/" in path):
                    yield path


def _is_local(name: str) -> bool:
    """Not a URL, a pseudo-file of JSON, or a descriptor."""
    name = name.removeprefix("file:")
    protocol, colon, _ = name.partition(":")
    return not name.startswith(("/dev/fdset/", "/dev/fd/", "/proc/self/fd/")) and not (
        colon and "/" not in protocol and protocol.isascii()
    )


def owned_files(command: cl.CommandLine | None, environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """(path, owner) of files that QEMU keeps open for the command line: logs, chardevs, flash, the pid file."""
    if command is None:
        return []
    found: list[tuple[str, str]] = []
    for chardev in cl.chardevs(command):
        for path in (chardev.path, chardev.logfile):
            if path:
                found.append((path, f"chardev:{chardev.label}"))
                if chardev.backend == "pipe":
                    found += [(f"{path}{end}", f"chardev:{chardev.label}") for end in (".in", ".out")]
    found += [(option.value or "", "log") for _, option in command.find("D")]
    path = pidfile(command, environ)
    return [*found, *([(path, "pidfile")] if path else [])]


def pidfile(command: cl.CommandLine | None, environ: Mapping[str, str]) -> str:
    """-pidfile, or where an update has noted it: it cannot stay in argv."""
    given = cl.settings(command).pidfile if command is not None else None
    return given or environ.get("CPR_PIDFILE", "")


def added_options(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[str, ...]:
    """What an earlier update's --qemu-option added: noted in the environment, believed where argv ends so."""
    try:
        noted = json.loads(environ.get("CPR_QEMU_OPTIONS", "[]"))
    except ValueError:
        return ()
    if not isinstance(noted, list) or not noted or not all(isinstance(word, str) for word in noted):
        return ()
    for tail in AFTER_ADDED:
        if tuple(argv[len(argv) - len(tail) :]) == tail:
            before = argv[: len(argv) - len(tail)]
            if list(before[len(before) - len(noted) :]) == noted:
                return tuple(noted)
    return ()


def changed_since(pid: int, start_time: int, texts: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Configuration files that were modified after the process began (`start_time` in clock ticks since boot)."""
    ago = time.clock_gettime(time.CLOCK_BOOTTIME) - start_time / os.sysconf("SC_CLK_TCK")
    began = time.time() - ago
    changed = []
    for path, _ in texts:
        place = f"/proc/{pid}/root{path}" if path.startswith("/") else f"/proc/{pid}/cwd/{path}"
        with contextlib.suppress(OSError):
            if os.stat(place).st_mtime > began + 1:  # a start time is counted in hundredths of a second
                changed.append(path)
    return tuple(changed)


def working_directory(pid: int) -> str:
    """Without the mark of one that is gone."""
    return proc.cwd(pid).removesuffix(" (deleted)")
