"""`cpr update --kexec` for several guests: everything is real but the loaded kernel and the jump (rebooting.py).

After the jump that was only recorded, `cpr restore` is called in this same boot, which by the manifest is another one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cpr.model import MonitorAddress
from cpr.qemu import qmp
from cpr.reboot import manifest as manifests
from tests.qemu.conftest import Result, qemus_of
from tests.qemu.moving import monitor
from tests.qemu.rebooting import HOLD_AT, KILL_AT, PIDS, RECORD, REFUSE
from tests.qemu.saving import Subject, changed, virtio
from tests.qemu.surveying import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab
    from tests.qemu.conftest import Command

    Builds = Callable[[str], QemuBuild]

full = pytest.mark.full
ROOT = Path(__file__).parents[2]


class Host:
    """The guests of a lab, and nobody else's."""

    def __init__(self, lab: Lab, cpr: Command) -> None:
        self.lab = lab
        self.cpr = cpr
        self.guests: list[Subject] = []
        self.state = lab.directory / "state"
        self.record = lab.directory / "record"

    def guest(self, build: QemuBuild, *words: str) -> Subject:
        subject = Subject.start(self.lab, self.cpr, build, *words, name=f"guest{len(self.guests)}")
        self.guests.append(subject)
        return subject

    def start(self, *words: object, **environment: str) -> subprocess.Popen[str]:
        known = {
            RECORD: str(self.record),
            PIDS: ",".join(str(g.pid) for g in self.guests),
            "CPR_STATE_DIR": str(self.state),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "tests.qemu.rebooting", *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**self.cpr.environment, **known, **environment},
        )

    def call(self, *words: object, **environment: str) -> Result:
        with self.start(*words, **environment) as process:
            out, err = process.communicate(timeout=150)
        return Result(process.returncode, out, err)

    def update(self, *words: object, **environment: str) -> Result:
        return self.call("update", "--kexec", "-y", "--json", *words, **environment)

    def restore(self, *words: object) -> Result:
        result = self.call("restore", "--json", *words)
        self.found(result)
        return result

    def found(self, result: Result) -> None:
        """Where the guests are now."""
        by_name = {g["name"]: g["pid_after"] for g in result.json.get("guests", ())}
        for number, guest in enumerate(self.guests):
            pid = by_name.get(f"guest{number}")
            if pid:
                guest.pid = pid
                self.lab.adopt(pid)

    def happened(self) -> list[str]:
        """What was recorded so far."""
        return self.record.read_text().split("\n")[:-1] if self.record.exists() else []

    def wait(self, what: str) -> None:
        until(lambda: what in self.happened(), 60)

    def go(self) -> None:
        (self.lab.directory / "record.go").touch()

    def run_as_before(self, counts: list[int]) -> None:
        """All in their old QEMUs, nothing of theirs left switched on, on disk or loaded."""
        for guest, count in zip(self.guests, counts, strict=True):
            until(lambda guest=guest: guest.status() == "running", 30)  # type: ignore[misc]
            assert guest.guest.process.alive
            guest.counts_on(count)
        assert not (self.state / "reboot" / "current").is_symlink()
        assert not list(self.state.rglob("*.state")), "a state that is void was left"

    def counts(self) -> list[int]:
        return [g.guest.log.number for g in self.guests]


@pytest.fixture
def host(lab: Lab, cpr: Command) -> Host:
    return Host(lab, cpr)


def statuses(result: Result) -> list[str]:
    return [g["status"] for g in result.json["guests"]]


def guests_of(result: Result) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = result.json["guests"]
    return found


def test_two_guests_one_paused(host: Host, builds: Builds) -> None:
    """The phases in their order; both end, both come back in the new QEMU, the paused one paused; nothing is left.

    The jump does not return: what there is to say was said before.
    """
    host.guest(builds("7.2"))
    host.guest(builds("7.2"))
    host.guests[1].stop()
    counts = host.counts()
    result = host.update("--qemu", builds("11.1.a").binary, **{KILL_AT: "jump"})
    assert result.code == -9, str(result)
    assert statuses(result) == ["saved", "saved"]
    assert (result.json["status"], result.json["restored_by"]) == ("ok", "cpr-restore.service")
    for guest, told in zip(host.guests, guests_of(result), strict=True):
        assert [ram["path"] for ram in told["ram"]] == [str(guest.ram)]
        assert os.path.getsize(told["state"]) == told["state_bytes"]
        assert told["pid_after"] == 0
    (run,) = host.call("runs", "--json").json["runs"]
    assert (run["run"], run["counts"], run["next"]) == (result.json["run"], {"waiting": 2}, "cpr restore")
    assert host.happened() == ["load", "[saving]", "[saved]", "[committed]", "[jumping]", "jump"]
    assert qemus_of(host.lab) == []
    assert (host.state.stat().st_mode & 0o777) == 0o700
    result = host.restore()
    assert result.code == 0, str(result)
    assert [g["runstate"] for g in guests_of(result)] == ["running", "paused"]
    for guest in host.guests:
        assert os.readlink(f"/proc/{guest.pid}/exe") == str(builds("11.1.a").binary)
    host.guests[1].cont()
    for guest, count in zip(host.guests, counts, strict=True):
        guest.counts_on(count)
    assert host.restore().code == 5, "there is nothing to be restored any more"


def test_a_kernel_that_cannot_be_loaded(host: Host, builds: Builds) -> None:
    """Nobody was paused: nothing of a guest was touched before."""
    subject = host.guest(builds("10.0"))
    counts = host.counts()
    with monitor(subject.guest) as session:
        seen = session.event_count
    result = host.update(**{REFUSE: "load"})
    assert result.code == 1, str(result)
    assert host.happened()[0] == "load"
    assert "[saving]" not in host.happened()
    with monitor(subject.guest) as session:
        assert not [e for e in session.events()[seen:] if e.name == "STOP"]
    host.run_as_before(counts)


def test_a_jump_that_is_refused(host: Host, builds: Builds) -> None:
    """After the commit: every guest comes back at once, in the QEMU that it was in; a second document says so."""
    host.guest(builds("7.2"))
    host.guest(builds("7.2"))
    counts = host.counts()
    result = host.update("--qemu", builds("11.1.a").binary, **{REFUSE: "jump"})
    assert result.code == 6, str(result)
    announced, came = result.documents
    assert [g["status"] for g in announced["guests"]] == ["saved", "saved"]
    assert (came["exit_code"], came["run"]) == (6, announced["run"])
    host.found(replace(result, out=json.dumps(came)))
    assert host.happened()[5:8] == ["jump", "[committed]", "unload"]
    for guest, count in zip(host.guests, counts, strict=True):
        assert os.path.basename(os.path.dirname(os.readlink(f"/proc/{guest.pid}/exe"))).startswith("old-")
        guest.counts_on(count)


@full
def test_the_third_of_three_cannot_be_saved(host: Host, builds: Builds) -> None:
    """A device that QEMU does not migrate is plugged into it between look and save: all three run on."""
    for _ in range(3):
        port = ("-device", "pcie-root-port,id=rp0,chassis=1")
        path = host.lab.directory / f"second{len(host.guests)}.qmp"
        host.guest(builds("10.0"), *port, "-qmp", f"unix:{path},server=on,wait=off")
    counts = host.counts()
    process = host.start("update", "--kexec", "-y", "--json", **{HOLD_AT: "saving"})
    host.wait("[saving]")
    with qmp.connect(MonitorAddress(label="m", path=str(host.lab.directory / "second2.qmp"))) as session:
        session.execute("device_add", driver="nvme", id="n0", serial="x", bus="rp0")
    host.go()
    out, err = process.communicate(timeout=120)
    result = Result(process.returncode, out, err)
    assert result.code == 6, str(result)
    assert "nvme" in guests_of(result)[0]["error"], "QEMU's own words"
    assert statuses(result) == ["rolled_back"] * 3
    assert "jump" not in host.happened()
    host.run_as_before(counts)


@full
def test_one_that_dies_on_the_way(host: Host, builds: Builds) -> None:
    """The others run on, and of the dead one it is said that it is gone."""
    for _ in range(2):
        host.guest(builds("10.0"))
    count = host.guests[0].guest.log.number
    process = host.start("update", "--kexec", "-y", "--json", **{HOLD_AT: "saving"})
    host.wait("[saving]")
    host.guests[1].guest.process.kill()
    host.go()
    out, err = process.communicate(timeout=120)
    result = Result(process.returncode, out, err)
    assert result.code == 7, str(result)
    assert guests_of(result)[0]["where"] == "the guest runs in the old QEMU as before"
    until(lambda: host.guests[0].status() == "running", 20)
    host.guests[0].counts_on(count)


@full
@pytest.mark.parametrize("phase", ["saving", "saved"])
def test_interrupted(host: Host, builds: Builds, phase: str) -> None:
    """SIGTERM before the commit: everything is undone, exit 143."""
    host.guest(builds("10.0"))
    counts = host.counts()
    process = host.start("update", "--kexec", "-y", "--json", **{HOLD_AT: phase})
    host.wait(f"[{phase}]")
    process.terminate()
    time.sleep(0.2)
    host.go()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, f"{out}\n{err}"
    host.run_as_before(counts)
    assert "unload" in host.happened()


@pytest.mark.parametrize("phase", [pytest.param("saving", marks=full), "saved", pytest.param("committed", marks=full)])
def test_killed(host: Host, builds: Builds, phase: str) -> None:
    """SIGKILL of the command where no old QEMU has ended yet: nobody is called, and the guests run again."""
    host.guest(builds("10.0"))
    host.guest(builds("10.0"))
    counts = host.counts()
    result = host.update(**{KILL_AT: phase})
    assert result.code == -9, str(result)
    began = time.monotonic()
    until(lambda: all(g.status() == "running" for g in host.guests), 20)
    assert time.monotonic() - began < 10
    until(lambda: not (host.state / "reboot" / "current").is_symlink(), 10)
    host.run_as_before(counts)


@full
def test_killed_with_its_guardian(host: Host, builds: Builds) -> None:
    """Nobody is left: the guests stand still, updates are refused, and recover has them go on."""
    host.guest(builds("10.0"))
    host.guest(builds("10.0"))
    counts = host.counts()
    process = host.start("update", "--kexec", "-y", "--json", **{HOLD_AT: "saved"})
    host.wait("[saved]")
    (guardian,) = processes_with("cpr.app.guardian", str(host.state))
    os.kill(guardian, signal.SIGKILL)
    process.kill()
    process.communicate(timeout=20)
    time.sleep(1)
    assert [g.status() for g in host.guests] == ["postmigrate"] * 2
    blocked = host.update()
    assert blocked.code == 75, str(blocked)
    result = host.call("recover", "--json")
    assert result.code == 6, str(result)
    host.run_as_before(counts)


def processes_with(*words: str) -> list[int]:
    """Pids of processes in whose command line all of them stand."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            said = (entry / "cmdline").read_text() if entry.name.isdigit() else ""
            if said and all(word in said for word in words):
                found.append(int(entry.name))
    return found


@full
def test_a_restore_that_is_killed(host: Host, builds: Builds) -> None:
    """Once its state is loaded it is not loaded again: it goes on, in the QEMU that has it."""
    host.guest(builds("10.0"))
    count = host.counts()[0]
    assert host.update().code == 0
    result = host.call("restore", **{KILL_AT: "loaded"})
    assert result.code == -9, str(result)
    (pid,) = qemus_of(host.lab)
    host.guests[0].pid = pid
    assert host.guests[0].status() == "paused"
    result = host.restore()
    assert result.code == 0, str(result)
    assert qemus_of(host.lab) == [pid]
    host.guests[0].counts_on(count)


@full
def test_a_qemu_left_from_an_attempt_that_was_killed(host: Host, builds: Builds) -> None:
    """It had not got the state: it is ended, and the next attempt is not kept from the guest's RAM."""
    host.guest(builds("10.0"))
    count = host.counts()[0]
    assert host.update().code == 0
    process = host.start("restore")
    until(lambda: qemus_of(host.lab), 20)
    process.kill()
    process.communicate(timeout=20)
    result = host.restore()
    assert result.code == 0, str(result)
    assert len(qemus_of(host.lab)) == 1
    host.guests[0].counts_on(count)


@full
def test_killed_in_front_of_the_jump(host: Host, builds: Builds) -> None:
    """All old QEMUs have ended; the guardian keeps still, for the host may be going down; recover brings them back."""
    host.guest(builds("10.0"))
    host.guest(builds("10.0"))
    counts = host.counts()
    result = host.update(**{KILL_AT: "jumping"})
    assert result.code == -9, str(result)
    time.sleep(2)
    assert qemus_of(host.lab) == []
    refused = host.restore()
    assert refused.code == 3, str(refused)
    assert "about to jump" in refused.err
    assert qemus_of(host.lab) == []
    result = host.call("recover", "--json")
    assert result.code == 6, str(result)
    host.found(result)
    for guest, count in zip(host.guests, counts, strict=True):
        guest.counts_on(count)


@full
def test_after_another_boot(host: Host, builds: Builds) -> None:
    """One guest's memory was wiped (fake: the boot is, by its id in the manifest): it is refused, the other is back.

    As long as it is not back, no second reboot is begun.
    """
    host.guest(builds("10.0"))
    host.guest(builds("10.0"))
    counts = host.counts()
    assert host.update().code == 0
    directory = str(host.state / "reboot" / os.readlink(host.state / "reboot" / "current"))
    manifests.write(directory, replace(manifests.read(directory), boot_id="another boot"))
    with changed(host.guests[1].ram, 0, bytes(32 << 20)):
        result = host.restore()
        assert result.code == 7, str(result)
        assert statuses(result) == ["updated", "needs_attention"]
        assert "the memory was wiped" in guests_of(result)[1]["error"]
        host.guests[0].counts_on(counts[0])
        again = host.update()
        assert again.code == 3, str(again)
        assert "guest1" in again.err
    assert host.restore().code == 0
    for guest, count in zip(host.guests, counts, strict=True):
        guest.counts_on(count)
    assert host.restore("guest1").code == 5, "nothing is open any more"


@full
def test_restored_in_the_old_qemu(host: Host, builds: Builds) -> None:
    """Asked for with --qemu old: in the copy of the QEMU that it was saved from, whatever stands at its path now."""
    host.guest(builds("7.2"))
    counts = host.counts()
    assert host.update("--qemu", builds("11.1.a").binary).code == 0
    result = host.restore("--qemu", "old")
    assert result.code == 0, str(result)
    (guest,) = guests_of(result)
    assert guest["binary_after"]["version"] == builds("7.2").version
    program = os.readlink(f"/proc/{host.guests[0].pid}/exe")
    assert program.startswith(str(host.state)), program
    host.guests[0].counts_on(counts[0])


def test_a_new_qemu_that_does_not_take_the_state(host: Host, builds: Builds) -> None:
    """Found out before anybody is stopped for good: blocked, in QEMU's words, and all run on."""
    host.guest(builds("10.0"), *virtio(host.lab))
    host.guest(builds("10.0"))
    counts = host.counts()
    result = host.update("--qemu", builds("11.1.a").binary)
    assert result.code == 3, str(result)
    assert "state-not-accepted" in guests_of(result)[0]["error"]
    assert "[saved]" not in host.happened()
    host.run_as_before(counts)


@full
def test_nobody_reads_what_is_said(host: Host, builds: Builds) -> None:
    """Whoever was to read it has gone, when all are saved: the host goes on into the new kernel."""
    host.guest(builds("10.0"))
    counts = host.counts()
    process = host.start("update", "--kexec", "-y", "--json", **{HOLD_AT: "jumping"})
    host.wait("[jumping]")
    assert process.stdout is not None
    process.stdout.close()
    host.go()
    process.wait(60)
    assert host.happened()[-1] == "jump"
    assert process.stderr is not None
    process.stderr.close()
    assert host.restore().code == 0
    host.guests[0].counts_on(counts[0])
