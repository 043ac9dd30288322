"""The executor's promises, with steps that only take notes and real processes as the two QEMUs."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from cpr import errors, journal
from cpr.errors import Exit, StepFailed
from cpr.linux.process import open_process
from cpr.model import Status, Step
from cpr.run import Bounds, CommitRefused, Run
from tests.unit import values

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@dataclass(frozen=True, slots=True, kw_only=True)
class Note(Step):
    name: str
    fails: str = ""
    undo_fails: bool = False
    effect: Any = None

    def describe(self) -> str:
        return self.name

    def do(self, run: Run) -> None:
        run.notes.append(f"do {self.name}")
        run.extra["touched"] = True
        if self.effect is not None:
            self.effect(run)
        if self.fails == "refused":
            raise CommitRefused("no")
        if self.fails:
            raise StepFailed(self.name, self.fails)

    def undo(self, run: Run) -> None:
        run.notes.append(f"undo {self.name}")
        if self.undo_fails:
            raise StepFailed("undo", "cannot")


Events = list[dict[str, Any]]


def make(tmp_path: Path, sleeper: subprocess.Popen[bytes], *steps: Step, **how: Any) -> tuple[Run, Events]:
    process = open_process(sleeper.pid)
    plan = values.plan(*steps, pid=process.pid, start_time=process.start_time)
    events: Events = []
    run = Run(
        plan=plan,
        journal=journal.Journal(plan, "run-1", directory=str(tmp_path)),
        report=events.append,
        **how,
    )
    return run, events


def alive_new(run: Run) -> None:
    assert run.old is not None
    run.new = open_process(run.old.pid)


def record(run: Run) -> journal.Record:
    return journal.read(run.journal.path)


def test_steps_run_in_order_and_close_the_journal(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run, events = make(
        tmp_path, sleeper, Note(name="a"), Note(name="b", commit=True, effect=alive_new), Note(name="c")
    )
    outcome = run.execute()
    assert run.notes == ["do a", "do b", "do c"]
    assert [(e["step"], e["state"]) for e in events] == [("Note", s) for s in ("doing", "done") * 3]
    assert record(run).steps == {0: "done", 1: "done", 2: "done"}
    assert record(run).committed
    # no monitor answers for this `new`, so it cannot be said to be well
    assert outcome.status is Status.NEEDS_ATTENTION
    assert not record(run).open


def test_a_failure_before_the_commit_undoes_in_reverse(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run, _ = make(
        tmp_path, sleeper, Note(name="a"), Note(name="b"), Note(name="c", fails="broken"), Note(name="d", commit=True)
    )
    outcome = run.execute()
    assert run.notes == ["do a", "do b", "do c", "undo c", "undo b", "undo a"]
    assert (outcome.status, outcome.exit_code) == (Status.ROLLED_BACK, Exit.ROLLED_BACK)
    assert outcome.where == errors.AS_BEFORE
    assert "broken" in outcome.error
    assert record(run).steps == {0: "undone", 1: "undone", 2: "undone"}
    assert not record(run).open
    assert not record(run).committed


def test_a_failure_after_the_commit_goes_forward(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run, _ = make(
        tmp_path, sleeper, Note(name="a", commit=True, effect=alive_new), Note(name="b", fails="odd"), Note(name="c")
    )
    outcome = run.execute()
    assert run.notes == ["do a", "do b", "do c"]
    assert outcome.exit_code in (Exit.DIFFERS, Exit.NEEDS_ATTENTION)
    assert "odd" in outcome.error


def test_a_new_qemu_that_dies_after_the_commit_is_a_crash(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:

        def dies(run: Run) -> None:
            run.new = open_process(other.pid)
            run.new.kill()
            run.new.wait_dead(5)

        run, _ = make(tmp_path, sleeper, Note(name="a", commit=True, effect=dies, fails="gone"), Note(name="last"))
        outcome = run.execute()
        assert run.notes == ["do a"]
        assert outcome.exit_code == Exit.NEEDS_ATTENTION
        assert "crashed" in outcome.where


def test_a_commit_that_qemu_refuses_is_undone(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run, _ = make(tmp_path, sleeper, Note(name="a"), Note(name="b", commit=True, fails="refused"))
    outcome = run.execute()
    assert run.notes == ["do a", "do b", "undo b", "undo a"]
    assert outcome.exit_code == Exit.ROLLED_BACK
    assert not record(run).committed


def cut_journal(run: Run, when: str) -> None:
    """From now on it cannot be written: `refused` lines, the outcome."""
    write = run.journal._write

    def cut(record: Any) -> None:
        if record.get("state") == when or when in record:
            raise errors.JournalError("no space left on device")
        write(record)

    run.journal._write = cut  # type: ignore[method-assign]


def test_a_refused_commit_is_undone_though_the_journal_is_full(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    run, _ = make(tmp_path, sleeper, Note(name="a"), Note(name="b", commit=True, fails="refused"))
    cut_journal(run, "refused")
    outcome = run.execute()
    assert run.notes == ["do a", "do b", "undo b", "undo a"]
    assert outcome.exit_code == Exit.ROLLED_BACK


def test_an_outcome_that_cannot_be_recorded_is_told_all_the_same(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    run, _ = make(tmp_path, sleeper, Note(name="a", fails="broken"), Note(name="b", commit=True))
    cut_journal(run, "outcome")
    outcome = run.execute()
    assert (outcome.status, outcome.where) == (Status.ROLLED_BACK, errors.AS_BEFORE)
    assert any("journal stays open" in note for note in outcome.notes)
    assert record(run).open


@pytest.mark.parametrize(
    ("state", "committed"),
    [("doing", True), ("failed", True), ("done", True), ("refused", False), ("undoing", False), ("undone", False)],
)
def test_what_the_commits_line_means(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], state: str, committed: bool
) -> None:
    """`failed` alone does not say that nothing ran; being undone does."""
    run, _ = make(tmp_path, sleeper, Note(name="a"), Note(name="b", commit=True))
    run.journal.step(1, "doing")
    run.journal.step(1, state)
    assert record(run).committed is committed
    run.journal.abandon()


def test_an_undo_that_fails_leaves_the_journal_open(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run, _ = make(tmp_path, sleeper, Note(name="a"), Note(name="b", undo_fails=True), Note(name="c", fails="broken"))
    outcome = run.execute()
    assert run.notes[:6] == ["do a", "do b", "do c", "undo c", "undo b", "could not undo 'b': undo: cannot"]
    assert run.notes[-1] == "undo a"
    assert outcome.exit_code == Exit.NEEDS_ATTENTION
    assert "cpr recover run-1" in outcome.where
    assert record(run).open


def test_an_interrupt_is_heard_between_steps(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run, _ = make(
        tmp_path,
        sleeper,
        Note(name="a", effect=lambda run: run.interrupt(143)),
        Note(name="b"),
        Note(name="c", commit=True),
    )
    outcome = run.execute()
    assert run.notes == ["do a", "undo a"]
    assert outcome.exit_code == Exit.TERMINATED
    assert outcome.where == errors.AS_BEFORE


def test_an_interrupt_after_the_commit_is_held(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    def effect(run: Run) -> None:
        alive_new(run)
        run.interrupt(130)

    run, _ = make(tmp_path, sleeper, Note(name="a", commit=True, effect=effect), Note(name="b"))
    run.execute()
    assert run.notes == ["do a", "do b"]


def test_the_deadline_undoes(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run, _ = make(
        tmp_path, sleeper, Note(name="a"), Note(name="b"), Note(name="c", commit=True), bounds=Bounds(timeout=0.0)
    )
    outcome = run.execute()
    assert "--timeout" in outcome.hint
    assert run.notes == []
    assert outcome.where == errors.UNTOUCHED


def test_a_guest_that_is_another_process_now_is_not_touched(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    plan = values.plan(Note(name="a", commit=True), pid=sleeper.pid, start_time=1)
    run = Run(plan=plan, journal=journal.Journal(plan, "r", directory=str(tmp_path)), report=lambda _: None)
    outcome = run.execute()
    assert run.notes == []
    assert f"pid {sleeper.pid} vanished" in outcome.error


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a readable journal"),
        (b"{}\n", "not a readable journal"),
        (b'{"format": "cpr.journal/9"}\n', "cpr.journal/9"),
        (b"\x00\x00\x00", "not a readable journal"),
        (b"[1, 2]\n", "not a readable journal"),
        (b"\xff\xfe garbage\n", "not a readable journal"),
    ],
)
def test_a_journal_that_is_none_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.journal"
    path.write_bytes(content)
    with pytest.raises(errors.JournalError, match=words):
        journal.read(str(path))


def test_a_cut_last_line_is_not_believed(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run, _ = make(tmp_path, sleeper, Note(name="a"))
    run.journal.step(0, "doing")
    with open(run.journal.path, "rb") as file:
        text = file.read().split(b"\0")[0]
    cut = tmp_path / "cut.journal"
    cut.write_bytes(text[:-5])
    assert journal.read(str(cut)).steps == {}
    assert journal.read(run.journal.path).steps == {0: "doing"}
    run.journal.abandon()


def test_a_full_disk_is_met_before_anything_is_done(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    with pytest.raises(errors.JournalError, match="no journal can be written"):
        journal.Journal(values.plan(), "r", directory=str(blocked))
