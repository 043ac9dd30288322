"""What is started in a lab is nobody's child and does not outlive it."""

import os
import time
from pathlib import Path

import pytest

from tests.lab import LabError
from tests.lab.start import Lab, marked


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_program_is_an_orphan_in_its_own_session_and_ends_with_the_lab() -> None:
    with Lab() as lab:
        orphan = lab.start(["sleep", "100"])
        while (name := Path(f"/proc/{orphan.pid}/comm").read_text()) == "setsid\n":  # about to become it
            time.sleep(0.01)
        assert name == "sleep\n"
        assert parent(orphan.pid) != os.getpid()
        assert os.getsid(orphan.pid) == orphan.pid
        assert orphan.alive
    assert not list(marked(str(lab.directory)))
    assert not lab.directory.exists()


def test_successors_end_with_the_lab_though_nobody_registered_them() -> None:
    with Lab() as lab:
        lab.start(["sh", "-c", "setsid sleep 100 & setsid sleep 100 & sleep 0.1"], name="short")
        while len(successors := list(marked(str(lab.directory)))) < 2:
            time.sleep(0.01)
    assert not list(marked(str(lab.directory)))
    assert len(successors) >= 2


def test_adopted_process_ends_with_the_lab() -> None:
    with Lab() as elsewhere:
        orphan = elsewhere.start(["sleep", "100"])
        with Lab() as lab:
            lab.adopt(orphan.pid)
        assert orphan.wait(1)


def test_output_is_in_the_log_and_in_the_error() -> None:
    with Lab() as lab:
        lab.start(["sh", "-c", "echo hello; exec sleep 100"], name="talker", environment={"X": "y"})
        log = lab.directory / "talker.log"
        while log.read_text() != "hello\n":
            time.sleep(0.01)
        with pytest.raises(LabError, match="ended at once: no good"):
            lab.start(["sh", "-c", "echo no good; exit 1"], name="bad")
