"""The manifest: everything that is needed to bring guests back after the host was rebooted, in one document on disk.

    DIRECTORY (root, 0700)
     ├── manifest.json   0600   {"format": "cpr.manifest/1", "sha256": of the body, "body": {...}}
     └── the guests' state files

It is written whole and in one piece: a new file, synced, renamed over the old one, its directory synced; what is read
is either the old one or the new one. The first is written before the first guest ends, later ones say what became of
each. Nothing in it is trusted that somebody else could have written.

A release that adds a field stays at version 1: readers pass over what they do not know. One that changes the meaning of
a field does not.

A guest that is saved by hand has a manifest of its own beside its state: FILE and FILE.manifest.

Out of scope: what is done with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from cpr.errors import ManifestError, NotFound
from cpr.linux.appendfile import sync_directory
from cpr.linux.traits import Likeness
from cpr.model import Binary, Guest, MonitorAddress, ProcessId, Storage
from cpr.reboot import codec, stamp
from cpr.reboot.files import Disk, StateFile
from cpr.reboot.stamp import Stamp

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = "cpr.manifest/1"
NAME = "manifest.json"
MAX_BYTES = 64 << 20
"""Of a manifest that is read: a guest takes about 20 KiB."""

_SPECIAL: codec.Special = {Stamp: (stamp.to_json, stamp.from_json)}


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRam:
    """A RAM block: what it lies on, and how to know it again. `offset` in bytes."""

    id: str
    size: int
    path: str
    """Empty: it has no name."""
    storage: Storage
    stamp: Stamp | None = None
    offset: int = 0
    volatile: bool = False
    """Its pages end with the kernel, or their process: it is made anew, and filled from the state. It has no stamp, so
    that a release which does not know this field refuses the guest."""


class RamCopy(StrEnum):
    """Whether the state has the guest's RAM, and how."""

    NONE = "none"
    """It stays in place."""
    STREAM = "stream"
    """All of it, page by page, zeroes too: it fills any memory."""
    MAPPED = "mapped-ram"
    """All of it, at places of its own (QEMU 9.0), but for zeroes: into memory that nobody has written to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VfioDevice:
    """A passed-through PCI device, e.g. 0000:03:00.0."""

    address: str
    driver: str
    """What it was bound to while the guest ran, e.g. vfio-pci; it has to be bound again after the boot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """Where QEMU makes sockets, pid and log files; below /run it is gone after the boot."""

    path: str
    uid: int
    gid: int
    mode: int


class Result(StrEnum):
    """Only an `OPEN` guest's state may be loaded: of the others the RAM has moved on, or may have."""

    OPEN = "open"
    LOADED = "loaded"
    """A new QEMU has the state and may have been told to go on."""
    RESTORED = "restored"
    CONTINUED = "continued"
    """It goes on in the QEMU that it was saved from."""
    GIVEN_UP = "given_up"
    """By a person, by name."""


class Phase(StrEnum):
    """How far a reboot has come; written before it is begun."""

    SAVING = "saving"
    """Guests may stand still; none has ended."""
    SAVED = "saved"
    """Every state is sealed; the old QEMUs stand still with it."""
    COMMITTED = "committed"
    """The old QEMUs are being ended."""
    JUMPING = "jumping"
    """They are gone, and the next kernel is being jumped into."""
    UNDOING = "undoing"
    """The guests go on in their old QEMUs: no state may be loaded any more."""
    UNDONE = "undone"


class Mode(StrEnum):
    """What the RAM has to outlive."""

    RESTART = "restart"
    """Its process."""
    REBOOT = "reboot"
    """The kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """What became of a guest after the boot; `words` say why where it is not back."""

    result: Result = Result.OPEN
    words: str = ""
    time: float = 0.0
    """Seconds since the epoch; 0: not tried yet."""
    pid: int = 0
    start_time: int = 0
    """Of the new QEMU, clock ticks since boot."""
    tries: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedGuest:
    """One guest, saved."""

    name: str
    uuid: str
    pid: int
    """Of the QEMU that was saved."""
    likeness: Likeness
    """Command line, environment, directory, credentials, limits, cgroups, namespaces of its process."""
    own_namespaces: tuple[str, ...]
    """Namespaces that it does not share with the host's init: they are gone after the reboot."""
    machine: str
    runstate: str
    """Before the save."""
    ram: tuple[SavedRam, ...]
    state: StateFile | None
    """None until it is sealed."""
    disks: tuple[Disk, ...]
    binary_before: Binary
    pinned_binary: str
    """A copy of the old QEMU that outlasts an upgrade of the package: the way back. Empty: there is none."""
    binary_after: Binary
    ram_copy: RamCopy = RamCopy.NONE
    state_path: str = ""
    """Where the state is written, from before the first byte of it."""
    options: tuple[str, ...] = ()
    """--qemu-option, for the new QEMU."""
    vfio: tuple[VfioDevice, ...] = ()
    monitor: MonitorAddress | None = None
    agent: str = ""
    """Path of the guest agent's socket."""
    unit: str = ""
    """The systemd unit that it ran in."""
    pidfile: str = ""
    directories: tuple[Directory, ...] = ()
    guest: Guest | None = None
    """All that was known of it, from which the command line of the new QEMU is made."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What no command line says (engines.settings.Settings), to be put back."""
    stopped_at: float | None = None
    """When it was stopped, by QEMU's own event, in seconds since the epoch."""
    suspended: bool = False
    """It is put to sleep for the save, and is to be woken up."""
    data_directories: tuple[str, ...] = ()
    module_directory: str = ""
    """Where the old QEMU has its firmware and modules: from another place its copy would not find them."""
    restore: Restore = Restore()

    @property
    def process(self) -> ProcessId:
        """The QEMU that was saved."""
        return ProcessId(self.pid, self.likeness.start_time)

    @property
    def label(self) -> str:
        return self.name or self.uuid or f"pid {self.pid}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All guests of one reboot."""

    run: str
    boot_id: str
    """Of the boot that saved them."""
    release_before: str
    release: str
    """The kernel that was loaded; empty: none, the host was to be rebooted by other means."""
    command_line: str
    time: float
    """When they were saved, in seconds since the epoch."""
    guests: tuple[SavedGuest, ...]
    phase: Phase = Phase.COMMITTED
    mode: Mode = Mode.REBOOT

    @property
    def open(self) -> tuple[SavedGuest, ...]:
        """Guests that are neither back nor given up."""
        return tuple(g for g in self.guests if g.restore.result is Result.OPEN)


def with_restore(manifest: Manifest, pid: int, restore: Restore) -> Manifest:
    """What became of the guest that had `pid`. Raises NotFound."""
    if pid not in {g.pid for g in manifest.guests}:
        raise NotFound(f"no guest of pid {pid} in the manifest of run {manifest.run}")
    return with_guests(manifest, *(replace(g, restore=restore) for g in manifest.guests if g.pid == pid))


def noted(path: str, manifest: Manifest, pid: int, /, **changed: object) -> Manifest:
    """The manifest at `path` with what became of the guest that had `pid`, as of now; on disk when it returns.

    `changed`: fields of its Restore. Raises NotFound, OSError: it is not on disk.
    """
    before = next((g.restore for g in manifest.guests if g.pid == pid), Restore())
    after = replace(before, time=time.time(), **changed)  # type: ignore[arg-type]
    manifest = with_restore(manifest, pid, after)
    write_file(path, manifest)
    return manifest


def with_guests(manifest: Manifest, *guests: SavedGuest) -> Manifest:
    """With these in the place of those that had their pids."""
    changed = {g.pid: g for g in guests}
    return replace(manifest, guests=tuple(changed.get(g.pid, g) for g in manifest.guests))


# -- as text


def encode(manifest: Manifest) -> bytes:
    body = codec.encode(manifest, _SPECIAL)
    document = {"format": FORMAT, "sha256": _checksum(body), "body": body}
    return json.dumps(document, indent=1).encode() + b"\n"


def decode(data: bytes, path: str = NAME) -> Manifest:
    """Raises ManifestError: `data` is not a manifest of this version, or a damaged one."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: cut short or damaged ({str(error)[:120]})", hint=_HINT) from None
    format = document.get("format") if isinstance(document, dict) else None
    if format != FORMAT:
        hint = "use the release of cpr that wrote it" if str(format).startswith("cpr.manifest/") else _HINT
        raise ManifestError(f"{path}: its format is {format!r:.60}, not {FORMAT}", hint=hint)
    body = document.get("body")
    if document.get("sha256") != _checksum(body):
        raise ManifestError(f"{path}: damaged, its checksum differs", hint=_HINT)
    try:
        manifest = codec.decode(Manifest, body, _SPECIAL, where="body")
    except (ValueError, TypeError, RecursionError) as error:
        raise ManifestError(f"{path}: {error}", hint=_HINT) from None
    pids = [g.pid for g in manifest.guests]
    if len(pids) != len(set(pids)):
        raise ManifestError(f"{path}: a guest stands in it twice", hint=_HINT)
    return manifest


_HINT = "the guests' RAM and state files are where they were: keep them, and do not start the guests afresh"


def _checksum(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# -- on disk


def make_directory(directory: str) -> None:
    """Make the directory, or see that it is ours alone.

    Raises:
        ManifestError: it is somebody else's, or open to others. OSError.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
        sync_directory(directory)
    status = os.stat(directory, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        why = f"owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}"
        raise ManifestError(f"{directory} is not a directory of ours alone ({why})", hint="chmod 700, or name another")


def write(directory: str, manifest: Manifest) -> str:
    """Write or replace the manifest of `directory`; it is on disk when this returns. Its path.

    Raises:
        ManifestError: the directory is not ours alone. OSError: what was there before still is.
    """
    make_directory(directory)
    return write_file(os.path.join(directory, NAME), manifest)


def write_file(path: str, manifest: Manifest) -> str:
    """As `write`, to a file. OSError: what was there before still is."""
    data = encode(manifest)
    new = f"{path}.{os.getpid()}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        os.rename(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise
    sync_directory(path)
    return path


def read(directory: str) -> Manifest:
    """The manifest of `directory`.

    Raises:
        NotFound: there is none. ManifestError: it, or its directory, is not root's or ours, is writable by others, or
            it is damaged, or of another version.
    """
    return read_file(os.path.join(directory, NAME))


def read_file(path: str) -> Manifest:
    """As `read`, of a file."""
    directory = os.path.dirname(os.path.abspath(path))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"no manifest in {directory}", hint="nothing was saved for a reboot, or elsewhere") from None
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from None
    try:
        _trusted(path, os.fstat(fd), stat.S_ISREG)
        _trusted(directory, os.stat(directory), stat.S_ISDIR)
        with open(fd, "rb", closefd=False) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from None
    finally:
        os.close(fd)
    if len(data) > MAX_BYTES:
        raise ManifestError(f"{path}: more than {MAX_BYTES} bytes")
    return decode(data, path)


def _trusted(path: str, status: os.stat_result, kind: Any) -> None:
    mode = stat.S_IMODE(status.st_mode)
    if not kind(status.st_mode):
        raise ManifestError(f"{path} is not what it should be", hint="see who put it there")
    sticky = stat.S_ISDIR(status.st_mode) and mode & stat.S_ISVTX  # others cannot put a file in the place of ours
    if status.st_uid not in (0, os.geteuid()) or (mode & 0o022 and not sticky):
        why = f"its owner is uid {status.st_uid}, its mode {mode:04o}"
        raise ManifestError(f"{path} could have been written by others ({why})", hint="see who put it there")


def namespaces_of_its_own(likeness: Likeness, init: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """Names of the namespaces in which a process is not with the host's init."""
    return tuple(sorted(n for n, it in likeness.namespaces.items() if n in init and init[n] != it))
