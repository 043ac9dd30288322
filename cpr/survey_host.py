"""The facts about this host that a decision needs."""

from __future__ import annotations

import os
import re
import resource

from cpr.journal import run_directory
from cpr.linux import capabilities, dax, madvise, proc
from cpr.model import Host
from cpr.persistence import persistence


def survey_host() -> Host:
    """Read now; the run directory need not exist yet, then what lies above it is measured."""
    directory = run_directory()
    room = os.statvfs(existing_directory(directory))
    return Host(
        boot_id=proc.boot_id(),
        uid=os.geteuid(),
        capabilities=capabilities.names(proc.read_status(os.getpid()).effective),
        limits={
            name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")
        },
        run_directory=directory,
        run_directory_free=room.f_bavail * room.f_frsize,
        run_directory_inodes=room.f_favail,
        memory_available=_memory_available(),
        architecture=os.uname().machine,
        keeps_memory_over_exec=madvise.keeps_memory_over_exec(),
    )


def existing_directory(path: str) -> str:
    """`path`, or the nearest directory above it that is there."""
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "/"
    return path


def lasting_room(path: str, command_line: str) -> tuple[int, str]:
    """Bytes that are free at `path`, which need not exist yet, and why the next kernel loses what is written there, in
    words; "" if it does not. `command_line`: that kernel's. OSError."""
    there = existing_directory(path)
    room = os.statvfs(there)
    kept = persistence(dax.storage_of(there), command_line)
    return room.f_bavail * room.f_frsize, "" if kept.kept else kept.reason


def _memory_available() -> int:
    with open("/proc/meminfo") as file:
        return parse_meminfo(file.read())


def parse_meminfo(printed: str) -> int:
    """MemAvailable in bytes."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", printed, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
