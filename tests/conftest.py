"""The table of docs/support.md: `--support-table=FILE` writes what the tests moved from where to where."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from tests.bench.host import host
from tests.support_table import Move, page

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import FrameType

    from tests.bench.host import Host
    from tests.lab.qemu import QemuBuild


class RecordPair(Protocol):
    """What the fixture `record_pair` is."""

    def __call__(
        self, born: QemuBuild, old: QemuBuild, new: QemuBuild, outcome: Mapping[str, Any], *, machine: str, guest: str
    ) -> None:
        """Note what came out of an update: `outcome` as in `cpr update --json`, `guest` in words for the table."""


class SupportTable:
    """Collects the moves of a session and writes the page at its end."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.moves: list[Move] = []
        self.before: Host = host()

    def pytest_sessionfinish(self) -> None:
        if self.path is not None and self.moves:
            self.path.write_text(page(self.moves, self.before, host()))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.path is not None:
            said = f"{len(self.moves)} moves in {self.path}" if self.moves else "nothing was moved, no table"
            terminalreporter.write_line(f"support table: {said}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--support-table", metavar="FILE", type=Path, help="write the table of docs/support.md to FILE at the end"
    )


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


TABLE = pytest.StashKey[SupportTable]()


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGTERM, _as_interrupt)  # a lab's guests are orphans: they are ended on the way out
    config.stash[TABLE] = SupportTable(config.getoption("--support-table"))
    config.pluginmanager.register(config.stash[TABLE], "support-table")


@pytest.fixture
def record_pair(request: pytest.FixtureRequest) -> RecordPair:
    """Notes what came out of an update for the table of docs/support.md."""
    table = request.config.stash[TABLE]

    def record(
        born: QemuBuild, old: QemuBuild, new: QemuBuild, outcome: Mapping[str, Any], *, machine: str, guest: str
    ) -> None:
        table.moves.append(Move.of(born, old, new, outcome, machine=machine, guest=guest))

    return record
