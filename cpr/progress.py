"""What is said while a run goes on: live lines on a terminal, plain lines elsewhere, JSON lines, or nothing.

A consumer behind an interface: those who work only call `event`. Everything goes to standard error or to a file of the
user's choice; standard output belongs to results. Events are dicts, the same in the journal's words:

    {"event": "step", "step": "StartNew", "text": "...", "state": "doing|done|undoing|undone|failed", "commit": false}
    {"event": "blackout", "seconds": 0.0041}
    {"event": "rehearsal", "seconds": 0.0118}
    {"event": "outcome", "status": "updated", ...}
"""

from __future__ import annotations

import datetime
import json
import threading
from typing import IO, TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Progress(Protocol):
    """Somebody who is told what happens. Called from several threads."""

    def event(self, guest: str, event: Mapping[str, Any]) -> None:
        """Something happened to `guest`."""

    def close(self) -> None:
        """Nothing more will come."""


class Silent:
    """Says nothing."""

    def event(self, guest: str, event: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Several:
    """Tells everybody in turn."""

    def __init__(self, members: Iterable[Progress]) -> None:
        self._members = tuple(members)

    def event(self, guest: str, event: Mapping[str, Any]) -> None:
        for member in self._members:
            member.event(guest, event)

    def close(self) -> None:
        for member in self._members:
            member.close()


class JsonLines:
    """One JSON object a line, with the guest and the time."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def event(self, guest: str, event: Mapping[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        line = json.dumps({"time": now, "guest": guest, **event})
        with self._lock:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except OSError:
                return  # whoever read this has gone; the update goes on

    def close(self) -> None:
        """The stream is its owner's."""


class PlainLines:
    """One line a step: for logs, pipes, and terminals that cannot move the cursor."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def event(self, guest: str, event: Mapping[str, Any]) -> None:
        text = sentence(event)
        if text:
            with self._lock:
                _say(self._stream, f"{guest}: {text}\n")

    def close(self) -> None:
        """Nothing to clear."""


class LiveLines:
    """One line for each guest, rewritten in place."""

    def __init__(self, stream: IO[str], columns: int = 80) -> None:
        self._stream = stream
        self._columns = max(20, columns)
        self._lock = threading.Lock()
        self._lines: dict[str, str] = {}
        self._pauses: dict[str, str] = {}

    def event(self, guest: str, event: Mapping[str, Any]) -> None:
        text = sentence(event, live=True)
        if not text:
            return
        with self._lock:
            drawn = len(self._lines)
            if event.get("event") == "blackout":
                self._pauses[guest] = f" [paused {milliseconds(float(event.get('seconds', 0)))}]"
                text = self._lines.get(guest, text)
            self._lines[guest] = text
            self._draw(drawn)

    def _draw(self, drawn: int) -> None:
        up = f"\x1b[{drawn}A" if drawn else ""
        lines = (f"{g}:{self._pauses.get(g, '')} {text}"[: self._columns - 1] for g, text in self._lines.items())
        _say(self._stream, up + "".join(f"\r{line}\x1b[K\n" for line in lines))

    def close(self) -> None:
        """The last state of each guest stays on the screen: what comes after all begins below it."""
        with self._lock:
            self._lines.clear()


def sentence(event: Mapping[str, Any], *, live: bool = False) -> str:
    """An event in words; "" for what is not worth a line."""
    match event.get("event"):
        case "step":
            return _step(event, live)
        case "blackout":
            return f"the vCPUs stood still for {milliseconds(float(event.get('seconds', 0)))}"
        case "rehearsal":
            return f"the vCPUs stood still for the rehearsal for {milliseconds(float(event.get('seconds', 0)))}"
        case "outcome":  # elsewhere it is the command's result, on standard output
            return f"{event.get('status')}".replace("_", " ") if live else ""
        case "note":
            return str(event.get("text", ""))
    return ""


def _step(event: Mapping[str, Any], live: bool) -> str:
    text, state = str(event.get("text", "")), event.get("state")
    commit = " (no way back from here)" if event.get("commit") else ""
    match state:
        case "doing":
            return text + commit
        case "done":
            return f"{text}: done" if live else ""
        case "failed":
            why = event.get("error")
            return f"failed: {text}" + (f": {why}" if why else "")
        case "undoing":
            return f"undoing: {text}"
        case "undone":
            return f"undone: {text}" if live else ""
    return ""


def milliseconds(seconds: float) -> str:
    """A short time for people: 4.1 ms, 310 ms, 2.5 s."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else f"{seconds * 1000:.0f} ms"


def _say(stream: IO[str], text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        return
