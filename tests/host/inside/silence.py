"""What there is to see of a guest that is heard of no more: its QEMU's threads, its vCPU, KVM, the interrupts.

For the report of a test; nothing here judges, and whatever cannot be read is left out.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from pathlib import Path

TRACING = Path("/sys/kernel/tracing")
DEBUG = Path("/sys/kernel/debug")
TRACED_SECONDS = 1.0
TRACED_LINES = 60
MONITOR_SECONDS = 5.0
ASKED = ("info registers", "info pic", "info lapic", "info chardev", "info status", "info qtree")
SERIAL_LINES = 12


def describe(pid: int, monitor: Path | None = None) -> str:
    """The state of the guest in process `pid`, twice a second apart.  monitor: its QMP socket, if nobody holds it."""
    for kind, place in (("tracefs", TRACING), ("debugfs", DEBUG)):
        subprocess.run(["mount", "-t", kind, kind, place], stderr=subprocess.DEVNULL, check=False)
    parts = [threads(pid), _text(Path("/proc/interrupts"))]
    first = _counters(pid)
    parts.append(_traced())
    second = _counters(pid)
    moved = (f"{name} {first.get(name)} -> {value}" for name, value in second.items() if first.get(name) != value)
    parts.append("KVM's counters that move:\n" + "\n".join(moved))
    parts += [threads(pid), _text(Path("/proc/interrupts")), _text(Path("/proc/loadavg"))]
    parts.append(_monitor(monitor) if monitor else "its monitor was not asked")
    return "\n\n".join(parts)


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip()
    return ""


def threads(pid: int) -> str:
    """Of each thread: name, state, the processor it ran on last, user and system time (ticks), where it waits."""
    lines = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        fields = _text(task / "stat").rpartition(")")[2].split()
        if not fields:
            continue
        state, user, system, cpu = fields[0], fields[11], fields[12], fields[36]
        lines.append(f"{task.name} {_text(task / 'comm')}: {state}, cpu {cpu}, user {user} system {system}")
        lines.append(f"  syscall {_text(task / 'syscall')}")
        lines += [f"  {line}" for line in _text(task / "stack").splitlines()]
    return f"threads of process {pid}:\n" + "\n".join(lines)


def _counters(pid: int) -> dict[str, str]:
    return {
        f"{file.parent.name}/{file.name}": text
        for place in (DEBUG / "kvm").glob(f"{pid}-*")
        for file in place.rglob("*")
        if file.is_file() and "hist" not in file.name and (text := _text(file)) and len(text) < 40
    }


def _traced() -> str:
    """What KVM does within a second."""
    enable = TRACING / "events/kvm/enable"
    try:
        (TRACING / "trace").write_text("")
        enable.write_text("1")
        time.sleep(TRACED_SECONDS)
        enable.write_text("0")
    except OSError as error:
        return f"KVM is not to be traced: {error}"
    lines = [line for line in _text(TRACING / "trace").splitlines() if not line.startswith("#")]
    return f"KVM in {TRACED_SECONDS:g} s, {len(lines)} events:\n" + "\n".join(lines[:TRACED_LINES])


def _monitor(path: Path) -> str:
    """What QEMU itself says, unless its main loop hangs."""
    said = []
    try:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(MONITOR_SECONDS)
            peer.connect(str(path))
            with peer.makefile("rw") as file:
                file.readline()
                for request in [
                    {"execute": "qmp_capabilities"},
                    *(
                        {"execute": "human-monitor-command", "arguments": {"command-line": line}} for line in ASKED
                    ),
                ]:  # fmt: skip
                    file.write(json.dumps(request))
                    file.flush()
                    while "return" not in (answer := json.loads(file.readline())):
                        if "error" in answer:
                            break
                    said.append(str(answer.get("return", answer)))
    except (OSError, ValueError) as error:
        said.append(f"the monitor: {error!r}")
    tree = said[-1].splitlines() if len(said) > len(ASKED) else []
    serial = next((at for at, line in enumerate(tree) if "isa-serial" in line), len(tree))
    return "\n".join([*said[: len(ASKED)], *tree[serial : serial + SERIAL_LINES]])
