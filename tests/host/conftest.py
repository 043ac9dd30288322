"""Fixtures for tests in the host VM: one runs at a time, and is used again as long as nothing happens to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.host import image
from tests.host.machine import SMALL, SYSTEMD, Machine
from tests.host.vm import Host
from tests.lab import LabError

if TYPE_CHECKING:
    from collections.abc import Generator


class Hosts:
    """Hands out host VMs; there is one at most."""

    def __init__(self) -> None:
        self.current: Host | None = None
        self.lines: list[str] = []
        """For the summary: what was measured."""
        self.silences: list[str] = []
        """Also for the summary: what was to see of guests that fell silent."""

    def get(self, machine: Machine, *, fresh: bool = False) -> Host:
        """A host VM like `machine`: the one that runs if it is, and `fresh` is not asked for."""
        if self.current is None or fresh or self.current.machine != machine or not self.current.alive:
            self.end()
            try:
                image.obtain()
            except LabError as error:
                pytest.skip(f"host VM: {error}")
            self.current = Host(machine)
            self.current.start()
            self.lines.append(f"boot {self.current.times.boot:.1f} s: {machine}")
        return self.current

    def end(self) -> None:
        """Power off what runs."""
        if self.current is not None:
            self.current.close()
            self.current = None


HOSTS = pytest.StashKey[Hosts]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[HOSTS] = Hosts()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/tests/host/" in str(item.path):
            item.add_marker(pytest.mark.host)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    hosts = item.config.stash[HOSTS]
    if report.failed and hosts.current is not None:
        report.sections.append(("host VM", hosts.current.serial_tail()))
        hosts.end()  # the next test shall not suffer from it
    return report


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Other tests shall have the machine to themselves."""
    if nextitem is None or nextitem.get_closest_marker("host") is None:
        item.config.stash[HOSTS].end()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash[HOSTS].lines:
        terminalreporter.write_line(f"host VM: {line}")
    for text in config.stash[HOSTS].silences:
        terminalreporter.section("a guest that fell silent in the host VM")
        terminalreporter.write_line(text)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[HOSTS].end()


@pytest.fixture
def hosts(request: pytest.FixtureRequest) -> Hosts:
    return request.config.stash[HOSTS]


@pytest.fixture
def host(hosts: Hosts) -> Host:
    """The small host VM."""
    return hosts.get(SMALL)


@pytest.fixture
def systemd_host(hosts: Hosts) -> Host:
    """The host VM with systemd as process 1."""
    return hosts.get(SYSTEMD)


