"""What is said while a run goes on."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from cpr.progress import JsonLines, LiveLines, PlainLines, Several, milliseconds, sentence


def step(text: str, state: str, **more: Any) -> dict[str, Any]:
    return {"event": "step", "step": "X", "text": text, "state": state, "commit": False, **more}


def test_plain_lines_say_each_step_once() -> None:
    stream = io.StringIO()
    progress = PlainLines(stream)
    for event in (
        step("prepare", "doing"),
        step("prepare", "done"),
        step("continue", "doing", commit=True),
        step("continue", "failed", error="no answer"),
        step("prepare", "undoing"),
        step("prepare", "undone"),
        {"event": "blackout", "seconds": 0.0041},
        {"event": "something of the future"},
    ):
        progress.event("web1", event)
    assert stream.getvalue().splitlines() == [
        "web1: prepare",
        "web1: continue (no way back from here)",
        "web1: failed: continue: no answer",
        "web1: undoing: prepare",
        "web1: the vCPUs stood still for 4.1 ms",
    ]


def test_live_lines_rewrite_one_line_a_guest() -> None:
    stream = io.StringIO()
    progress = LiveLines(stream, columns=40)
    progress.event("a", step("prepare", "doing"))
    progress.event("b", step("prepare", "doing"))
    progress.event("a", {"event": "blackout", "seconds": 0.0041})
    progress.event("a", step("a very long step that does not fit on the line", "doing"))
    last = stream.getvalue().split("\x1b[2A")[-1]
    first, second, _ = last.replace("\x1b[K", "").split("\n")
    assert first.strip().startswith("a: [paused 4.1 ms] a very long")
    assert len(first.strip("\r")) < 40
    assert second.strip() == "b: prepare"
    said = stream.getvalue()
    progress.close()
    progress.event("c", step("prepare", "doing"))
    assert stream.getvalue()[len(said) :] == "\rc: prepare\x1b[K\n", "what was said meanwhile is overwritten"


def test_json_lines() -> None:
    stream = io.StringIO()
    progress = JsonLines(stream)
    progress.event("a", step("prepare", "doing"))
    [line] = stream.getvalue().splitlines()
    assert json.loads(line)["guest"] == "a"
    assert json.loads(line)["state"] == "doing"


class Gone(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(text)


def test_a_reader_that_has_gone_does_not_stop_the_update() -> None:
    progress = Several([JsonLines(Gone()), PlainLines(Gone()), LiveLines(Gone())])
    progress.event("a", step("prepare", "doing"))
    progress.close()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.00412, "4.1 ms"), (0.31, "310 ms"), (2.5, "2.5 s"), (0.0, "0.0 ms")]
)
def test_milliseconds(seconds: float, text: str) -> None:
    assert milliseconds(seconds) == text


def test_the_outcome_in_words() -> None:
    event = {"event": "outcome", "status": "rolled_back", "where": "x", "blackout_seconds": None}
    assert sentence(event, live=True) == "rolled back"
    assert sentence(event) == ""
