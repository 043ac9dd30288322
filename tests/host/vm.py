"""The host VM running: an outer QEMU under TCG, its agent, its serial log, kexec and power cycles.

The outer QEMU is ``OUTER`` of the lab. The nested SVM of 7.2's TCG panics the host. That of later ones writes where it
should not when two vCPUs run at the same time and nested guests are busy: guests are reset or the host panics, with
11.1 within a minute or two, with 10.0 now and then. Where two vCPUs take turns (``thread=single``) a nested Linux hangs
as it boots, in a spin lock that nobody holds. So there is one vCPU.
It ends when the process that started it does, however that ends, and with a kernel panic (``panic=-1`` and
``-no-reboot``); whoever waits for anything notices at once and gets the serial log.

Out of scope: the images (see ``image``), guests (see ``guests``).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.host import image
from tests.host.agent import Agent, AgentSilent
from tests.host.machine import SMALL, Machine, port
from tests.lab import cache, qemu

if TYPE_CHECKING:
    from types import TracebackType

OUTER = "10.0"
DEAD = re.compile(
    rb"Kernel panic|\bBUG: (?!soft lockup|workqueue)|general protection fault|Oops:|host VM: no root disk"
)
PREFIX = "cpr-host-"
LEFT = "/state/left"
"""Stem of the files about the command that left for another kernel."""


class HostDied(Exception):
    """The host VM is gone or its kernel is; the text ends with the serial log's last words."""


class CommandFailed(Exception):
    """A command in the host VM ended with something else than 0."""


class Stayed(Exception):
    """What was to boot another kernel did not; `said` is how it ended (code -1: it has not ended in time)."""

    def __init__(self, said: Said) -> None:
        super().__init__(str(said))
        self.said = said


@dataclass(frozen=True)
class Said:
    """What a command in the host VM came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The document on standard output."""
        value: dict[str, Any] = json.loads(self.out)
        return value

    def __str__(self) -> str:
        return f"exit {self.code}\n{self.out}\n{self.err}"


@dataclass
class Times:
    """What took how long, in seconds."""

    boot: float = 0.0
    kexecs: list[float] = field(default_factory=list)


class Host:
    """A host VM.  A context manager: it is started on the way in, and nothing is left of it on the way out."""

    def __init__(self, machine: Machine = SMALL, *, terminal: bool = False) -> None:
        """terminal: connect its second serial port, with a shell on it, to our standard input and output."""
        self.machine = machine
        self.disks = image.obtain()
        self.build = qemu.obtain(OUTER)
        remove_leftovers()
        self.directory = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir="/tmp"))
        self.serial = self.directory / "serial.log"
        self.times = Times()
        self._terminal = terminal
        self._kernel = machine.kernel
        self._process: subprocess.Popen[bytes] | None = None
        self._read = 0
        self._agent = Agent(self.directory / "agent", self.check)
        self._make_disks()

    # -- its life

    def start(self, seconds: float = 120) -> Self:
        """Power it on and wait until its agent answers and, with systemd, until it is up."""
        began = time.monotonic()
        said = (self.directory / "qemu.log").open("ab")
        quiet = None if self._terminal else subprocess.DEVNULL
        with said:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self.command()],
                stdin=quiet,
                stdout=None if self._terminal else said,
                stderr=said,
                cwd=self.directory,
            )
        self._wait_up(seconds)
        self.times.boot = time.monotonic() - began
        return self

    def close(self) -> None:
        """Power it off, the hard way, and remove everything."""
        self._power_off()
        shutil.rmtree(self.directory, ignore_errors=True)

    def power_cycle(self, kernel: str | None = None) -> None:
        """Power it off without a warning, and on again; disks and NVDIMM stay."""
        self._power_off()
        self._kernel = kernel or self._kernel
        self.start()

    def kexec(self, kernel: str | None = None, append: str | None = None, seconds: float = 90) -> float:
        """Boot another kernel without a reset; returns how long it took until the agent of the new one answered."""
        kernel = kernel or self._kernel
        append = append or self.machine.append()
        files = f"/boot/{kernel}/vmlinuz --initrd=/boot/{kernel}/initrd"
        self.sh(f"kexec -s -l {files} --command-line={shlex.quote(append)}", seconds=60)
        how = "systemctl kexec" if self.machine.systemd else "exec kexec -e"
        return self.leave(f"sync; {how}", kernel, seconds)

    def leave(self, command: str, kernel: str, seconds: float = 180) -> float:
        """Run in it what boots the kernel `kernel`, and wait for that boot; returns how long it took.

        Raises Stayed if the command ended otherwise.  What it says is in LEFT.out and LEFT.err.
        """
        before = self.boot_id()
        script = f"sleep 0.3; ({command}) > {LEFT}.out 2> {LEFT}.err; echo $? > {LEFT}.code"
        self.sh(f"rm -f {LEFT}.*; ({script}) > /dev/null 2>&1 < /dev/null &")
        began = time.monotonic()
        end = began + seconds
        look = f"cat /proc/sys/kernel/random/boot_id; cat {LEFT}.code 2> /dev/null || true"
        while True:
            try:
                self._agent.sync(max(0.1, end - time.monotonic()))
                # the old agent may swallow it
                boot, *code = self.sh(look, seconds=1.5).split()
            except AgentSilent:
                if time.monotonic() > end:
                    raise
                continue
            if boot != before:
                break
            if code not in ([], ["0"]) or time.monotonic() > end:  # systemd is asked, and comes later
                raise Stayed(Said(int((code or ["-1"])[0]), self.sh(f"cat {LEFT}.out"), self.sh(f"cat {LEFT}.err")))
            time.sleep(0.1)
        self._kernel = kernel
        self._wait_up(max(1.0, end - time.monotonic()))
        self.times.kexecs.append(time.monotonic() - began)
        return self.times.kexecs[-1]

    def wait(self) -> None:
        """Wait until it is powered off from within."""
        if self._process is not None:
            self._process.wait()

    @property
    def alive(self) -> bool:
        """It runs and its kernel has not said that it is done for."""
        try:
            self.check()
        except HostDied:
            return False
        return True

    def check(self) -> None:
        """Return if all is well as far as the outer QEMU and the serial log show.  Raises HostDied."""
        if self._process is None or self._process.poll() is not None:
            code = None if self._process is None else self._process.returncode
            said = (self.directory / "qemu.log").read_text(errors="replace")[-600:]
            raise HostDied(f"the host VM has ended ({code}) {said}\n{self.serial_tail()}")
        try:
            with self.serial.open("rb") as file:
                file.seek(max(0, self._read - 64))
                new = file.read()
        except FileNotFoundError:
            return
        self._read = max(self._read, self.serial.stat().st_size)
        if DEAD.search(new):
            self._process_wait(2.0)  # it is about to end, with more words
            raise HostDied(f"the kernel of the host VM is done for\n{self.serial_tail()}")

    def serial_tail(self, size: int = 6000) -> str:
        """The last words of the serial log."""
        try:
            return "serial log of the host VM:\n" + self.serial.read_text(errors="replace")[-size:]
        except FileNotFoundError:
            return "the host VM said nothing"

    def boot_id(self) -> str:
        """Of the kernel that runs now."""
        return self.sh("cat /proc/sys/kernel/random/boot_id").strip()

    # -- in it

    def run(self, script: str, seconds: float = 30, given: bytes = b"") -> Said:
        """Run a shell script in it.  Raises AgentSilent if it takes longer, HostDied."""
        ended = self._agent.run(["/bin/sh", "-c", script], seconds, given)
        return Said(ended.code, ended.out.decode(errors="replace"), ended.err.decode(errors="replace"))

    def sh(self, script: str, seconds: float = 30) -> str:
        """What a shell script prints.  Raises CommandFailed as well."""
        said = self.run(script, seconds)
        if said.code:
            raise CommandFailed(f"{script}\n{said}")
        return said.out

    def put(self, path: str, content: bytes | str) -> None:
        """Write a file in it."""
        content = content.encode() if isinstance(content, str) else content
        for at in range(0, max(1, len(content)), 1 << 20):
            said = self.run(f"cat {'>>' if at else '>'} {shlex.quote(path)}", 30, content[at : at + (1 << 20)])
            if said.code:
                raise CommandFailed(f"{path}: {said.err}")

    def get(self, path: str) -> bytes:
        """Read a file of it."""
        ended = self._agent.run(["/bin/cat", path], 60)
        if ended.code:
            raise CommandFailed(f"{path}: {ended.err.decode(errors='replace')}")
        return ended.out

    def cpr(self, *words: object, seconds: float = 400) -> Said:
        """Call cpr in it as a user would."""
        return self.run("exec cpr " + shlex.join(map(str, words)), seconds)

    def inside(self, module: str, *words: object, seconds: float = 120) -> dict[str, Any]:
        """Run ``tests.host.inside.MODULE`` in it and return the document that it prints."""
        lab = f"CPR_LAB_CACHE={shlex.quote(str(cache.root()))}"
        call = f"python3 -m tests.host.inside.{module} {shlex.join(map(str, words))}"
        try:
            said = self.run(f"{lab} exec {call} 2> /run/inside.log", seconds)
        except AgentSilent as error:
            raise AgentSilent(f"{error}\n{self.run('tail -n 30 /run/inside.log').out}") from None
        if said.code:
            raise CommandFailed(f"{module}: {said}\n{self.run('tail -n 30 /run/inside.log').out}")
        return said.json

    # -- how it is made

    def command(self) -> list[str]:
        """The outer QEMU's command line."""
        kernel, initrd = self.disks.kernel(self._kernel)
        words = [*self.machine.arguments(self.disks, self.directory), *port(self.serial, terminal=self._terminal)]
        append = self.machine.append() + (" cpr.shell" if self._terminal else "")
        return [*self.build.command, *words, "-kernel", str(kernel), "-initrd", str(initrd), "-append", append]

    def _make_disks(self) -> None:
        backing = ["-b", str(self.disks.root), "-F", "raw"]
        create = [str(qemu.qemu_img()), "create", "-q", "-f", "qcow2", *backing, str(self.directory / "root.qcow2")]
        subprocess.run(create, check=True, stdin=subprocess.DEVNULL)
        if self.machine.devices:
            with (self.directory / "nvme").open("wb") as file:
                file.truncate(64 << 20)

    def _wait_up(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self._agent.sync(seconds)
        self.sh("until [ -e /run/cpr-host-ready ]; do sleep 0.05; done", max(1.0, end - time.monotonic()))
        if self.machine.systemd:
            said = self.run("systemctl is-system-running --wait", max(1.0, end - time.monotonic()))
            if said.out.strip() not in ("running", "degraded"):
                raise HostDied(f"systemd is {said.out.strip()}\n{self.serial_tail()}")

    def _power_off(self) -> None:
        self._agent.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait(20)
            self._process = None

    def _process_wait(self, seconds: float) -> None:
        assert self._process is not None
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Host({self.machine}, pid {self._process.pid if self._process else None})"


def remove_leftovers() -> None:
    """Remove the directories of processes that are gone; their VMs went with them."""
    for path in Path("/tmp").glob(f"{PREFIX}*"):
        owner = path.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(path, ignore_errors=True)


def fits(seconds: float) -> float:
    """A time bar on this machine: CPR_HOST_SLOW (a factor) stretches it on one that is busy."""
    return seconds * float(os.environ.get("CPR_HOST_SLOW", "1"))
