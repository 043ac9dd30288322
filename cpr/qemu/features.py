"""Asking a QEMU binary what it knows: machine types, devices, commands, capabilities, options.

It is started for a moment with `-machine none`, which has no guest, no RAM and no devices, and with `-help`. A file
that is no program of this machine, that crashes, hangs or talks nonsense, is `BinaryUnusable`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import time
from typing import TYPE_CHECKING, Any

from cpr.errors import BinaryUnusable, CprError, MonitorHeld
from cpr.linux import elf
from cpr.linux.process import RunFailed, end_with_parent, run
from cpr.model import Binary, Target
from cpr.qemu import qmp
from cpr.qemu.answers import Answers, mapping, mappings, number, parse_names, text
from cpr.qemu.options import OptionKnowledge, knowledge_from

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from cpr.qemu.qmp import Monitor

ASK_SECONDS = 120.0
"""A QEMU with `-machine none` answers within 0.1 s; on a host that is emulated, or very busy, in 30 s. Nobody waits but
us."""
LABEL = "cpr"
PENDING = "CPR_RUN_PENDING"
"""Tells `discover` that this is no guest."""
SAID = 2000
"""Characters of its standard error that are kept, from the end."""


def ask(path: str, *, extra_options: Collection[str] = ()) -> Target:
    """What the QEMU at `path` knows. `extra_options` (--qemu-option) are only noted in the answer.

    Raises:
        BinaryUnusable: missing, no program, of another architecture, or it does not answer sensibly.
    """
    path = os.path.abspath(path)
    binary = look_at(path)
    with started(path) as monitor:
        answers = Answers(monitor)
        told = _told(answers, path)
        listed = answers.read("query-command-line-options", lambda reply: list(mappings(reply)), [])
    if _identity(path) != binary.identity:
        raise BinaryUnusable(path, "was replaced while it was being asked", hint="try again")
    knowledge: OptionKnowledge = _sane(path, "-help", lambda: knowledge_from(_help(path), listed))
    version, package = told.pop("version")
    return Target(
        binary=Binary(
            path=path,
            version=version,
            package=package,
            device=binary.device,
            inode=binary.inode,
            build_id=binary.build_id,
        ),
        options=knowledge,
        extra_options=tuple(extra_options),
        **told,
    )


# -- the file


def look_at(path: str) -> Binary:
    """The file as such. Raises `BinaryUnusable` where the kernel could not run it here."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        hint = "it may be a link to nothing" if os.path.lexists(path) else "is the package installed?"
        raise BinaryUnusable(path, "no such file", hint=hint) from None
    except OSError as error:
        raise BinaryUnusable(path, error.strerror or str(error)) from None
    if stat.S_ISDIR(status.st_mode):
        raise BinaryUnusable(path, "is a directory", hint="name the program itself, e.g. qemu-system-x86_64")
    if not stat.S_ISREG(status.st_mode):
        raise BinaryUnusable(path, "is not a file")
    if not os.access(path, os.X_OK) or not status.st_mode & 0o111:
        raise BinaryUnusable(path, "is not executable", hint="chmod +x, or another file is meant")
    try:
        facts = elf.elf_facts(path)
    except elf.NotElf as error:
        raise BinaryUnusable(path, f"is {error}", hint="name the QEMU program itself, not a wrapper") from None
    except OSError as error:
        raise BinaryUnusable(path, f"cannot be read: {error.strerror or error}") from None
    if not facts.program:
        raise BinaryUnusable(path, "is an ELF file, but no program")
    if facts.machine != elf.host_machine():
        raise BinaryUnusable(path, f"is a program for {facts.machine_name}, which this host does not run")
    if facts.interpreter and not os.path.exists(facts.interpreter):
        raise BinaryUnusable(path, f"needs the loader {facts.interpreter}, which is missing")
    return Binary(path=path, device=status.st_dev, inode=status.st_ino, build_id=facts.build_id)


def _identity(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


# -- the process


@contextlib.contextmanager
def started(path: str, *, timeout: float = ASK_SECONDS) -> Iterator[Monitor]:
    """A QEMU without a machine, killed and reaped at the end.

    Raises:
        BinaryUnusable: it does not start, does not greet, or fails while it is being asked; with its own words.
    """
    deadline = time.monotonic() + timeout
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as held:
        held.callback(ours.close)
        said = os.memfd_create("cpr-said", os.MFD_CLOEXEC)
        held.callback(os.close, said)
        with theirs:
            process = _spawn(path, theirs.fileno(), said)
        held.callback(_end, process)
        try:
            monitor = held.enter_context(qmp.negotiate(ours, path, timeout=timeout))
            yield monitor
        except CprError as error:
            status = _status(process, wait=0.0 if isinstance(error, MonitorHeld) else 0.5)
            words = last_words(said)
            what = status or ("does not answer" if time.monotonic() > deadline else f"misbehaves: {error.message}")
            raise BinaryUnusable(path, what + (f': "{words}"' if words else "")) from None


def _spawn(path: str, monitor: int, said: int) -> subprocess.Popen[bytes]:
    argv = [
        *(path, "-machine", "none,accel=tcg:kvm", "-nodefaults", "-display", "none", "-S", "-no-user-config"),
        *("-chardev", f"socket,id={LABEL},fd={monitor}", "-mon", f"chardev={LABEL},mode=control"),
    ]
    try:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            pass_fds=(monitor,),
            cwd="/",
            env=environment(),
            start_new_session=True,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - one system call, no lock is taken
        )
    except OSError as error:
        raise BinaryUnusable(path, f"cannot be run: {error.strerror or error}") from None


def environment() -> dict[str, str]:
    """Ours, without what an update may have left in it, and marked as no guest's."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CPR_RUN", "CPR_PIDFILE", "CPR_QEMU"))}
    return {**kept, PENDING: "1"}


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _status(process: subprocess.Popen[bytes], wait: float) -> str:
    """How it ended; "" while it runs."""
    try:
        code = process.wait(wait)
    except subprocess.TimeoutExpired:
        return ""
    return f"is killed by signal {-code} when started" if code < 0 else f"ends with status {code} when started"


def last_words(said: int) -> str:
    """What a program wrote last, on one line, without mere warnings where there is something else."""
    size = os.fstat(said).st_size
    lines = os.pread(said, SAID, max(0, size - SAID)).decode(errors="replace").splitlines()
    told = [line.strip() for line in lines if line.strip()]
    serious = [line for line in told if "warning:" not in line] or told
    return "; ".join(serious[-4:])[-600:]


def _help(path: str) -> str:
    try:
        return run([path, "-help"], timeout=ASK_SECONDS, env=environment(), cwd="/").stdout.decode(errors="replace")
    except (RunFailed, OSError) as error:
        raise BinaryUnusable(path, f"does not print its options: {error}") from None


# -- the answers


def _told(answers: Answers, path: str) -> dict[str, Any]:
    """The fields of `Target` that QMP answers."""
    schema: list[dict[str, Any]] = answers.read("query-qmp-schema", lambda reply: list(mappings(reply)), [])
    machines: tuple[frozenset[str], dict[str, str]] = answers.read("query-machines", parse_machines, (frozenset(), {}))
    if not machines[0]:
        raise BinaryUnusable(path, "names no machine types: is it a QEMU system emulator?")
    return {
        "version": answers.read("query-version", parse_version, ("", "")),
        "machines": machines[0],
        "machine_aliases": machines[1],
        "device_types": answers.read("qom-list-types", parse_names, frozenset(), implements="device"),
        "commands": answers.commands,
        "migrate_modes": answers.sane("query-qmp-schema", lambda: migrate_modes(schema)),
        "capabilities": answers.sane("query-qmp-schema", lambda: capabilities(schema)),
    }


def _sane(path: str, what: str, parse: Callable[[], Any]) -> Any:
    try:
        return parse()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BinaryUnusable(path, f"answers nonsense to {what}: {error}") from None


def parse_version(reply: Any) -> tuple[str, str]:
    """("7.2.22", "Debian 1:7.2+dfsg-7+deb12u18+b3")"""
    numbers = mapping(reply["qemu"])
    return ".".join(str(number(numbers[key])) for key in ("major", "minor", "micro")), text(reply.get("package", ""))


def parse_machines(reply: Any) -> tuple[frozenset[str], dict[str, str]]:
    """Names of machine types, and alias -> name (`q35` -> `pc-q35-11.1`)."""
    entries = list(mappings(reply))
    names = frozenset(text(e["name"]) for e in entries) - {"none"}
    return names, {text(e["alias"]): text(e["name"]) for e in entries if e.get("alias")}


def capabilities(schema: Sequence[dict[str, Any]]) -> frozenset[str]:
    """Members of MigrationCapability."""
    return _members(schema, "migrate-set-capabilities", "capabilities", "capability")


def migrate_modes(schema: Sequence[dict[str, Any]]) -> frozenset[str]:
    """Members of MigMode (QEMU 8.2); empty before."""
    return _members(schema, "migrate-set-parameters", "mode")


def _members(schema: Sequence[dict[str, Any]], command: str, *path: str) -> frozenset[str]:
    """The values of an enumeration that an argument of a command takes; empty where there is no such argument.

    Types have no names in the schema, only numbers, so the way to one leads through its command.
    """
    types = {text(e["name"]): e for e in schema}
    if command not in types:
        return frozenset()
    here = types[text(types[command]["arg-type"])]
    for name in path:
        member = next((m for m in mappings(here.get("members", [])) if m["name"] == name), None)
        if member is None:
            return frozenset()
        here = types[text(member["type"])]
        if here["meta-type"] == "array":
            here = types[text(here["element-type"])]
    if "values" in here:
        return frozenset(text(value) for value in here["values"])
    return frozenset(text(m["name"]) for m in mappings(here.get("members", [])))
