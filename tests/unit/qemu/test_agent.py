"""The guest agent's client against a fake agent: stale, hostile, silent, cut and endless answers."""

from __future__ import annotations

import json
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from cpr.errors import AgentError, AgentTimeout, CommandFailed
from cpr.qemu import agent as agent_module
from cpr.qemu.agent import Agent
from tests.unit.fake_agent import INFO, agent, questions, say
from tests.unit.fake_monitor import FakeMonitor, saying

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def served(tmp_path: Path, script: Callable[[socket.socket], None]) -> FakeMonitor:
    return FakeMonitor(tmp_path / "qga.sock", script)


def test_info(tmp_path: Path) -> None:
    with served(tmp_path, agent({"guest-info": INFO})) as fake, Agent(fake.path) as client:
        client.ping()
        info = client.info()
        assert (info.version, info.can_suspend) == ("10.0.2", True)
        assert info.commands == {"guest-suspend-ram", "guest-set-time"}


def test_set_time(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    with served(tmp_path, agent({"guest-set-time": {}}, asked=asked)) as fake, Agent(fake.path) as client:
        client.set_time(1_700_000_000.5)
        client.set_time()
    said = [m.get("arguments") for m in asked if m["execute"] == "guest-set-time"]
    assert said == [{"time": 1_700_000_000_500_000_000}, None]


def test_every_call_syncs_with_an_id_of_its_own(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    with served(tmp_path, agent({"guest-info": INFO}, asked=asked)) as fake, Agent(fake.path) as client:
        client.info()
        client.info()
    ids = [m["arguments"]["id"] for m in asked if m["execute"] == "guest-sync-delimited"]
    assert len(set(ids)) == len(ids) == 2
    assert all(0 < number < 1 << 63 for number in ids)


STALE = [
    b'{"return": {"version": "stale", "supported_commands": []}}\n',
    b'{"return": 4711}\n\xff{"return": 4712}\n',
    b'{"return": "half an answer\n',
    b"\xff\xff\n\n\n\r\n",
    b"\x00\x01\x02 no JSON at all \x80\n",
    b"[" * 100_000 + b"\n",
    b'"a string"\n17\nnull\n[]\n{"return": true}\n',
]


@pytest.mark.parametrize("stale", STALE)
def test_what_came_before_the_sync_is_dropped(tmp_path: Path, stale: bytes) -> None:
    with served(tmp_path, agent({"guest-info": INFO}, first=stale)) as fake, Agent(fake.path) as client:
        assert client.info().version == "10.0.2"


def test_an_agent_that_starts_late_is_asked_again(tmp_path: Path) -> None:
    with served(tmp_path, agent({"guest-info": INFO}, deaf_to=2)) as fake, Agent(fake.path) as client:
        assert client.info().version == "10.0.2"


def test_answers_to_earlier_syncs_are_not_taken_for_the_last(tmp_path: Path) -> None:
    """The agent was slow, not deaf: it answers every sync, and then the question."""

    def script(sock: socket.socket) -> None:
        asked = questions(sock)
        first, second = next(asked), next(asked)
        for message in (first, second):
            say(sock, {"return": message["arguments"]["id"]}, delimited=True)
        assert next(asked)["execute"] == "guest-info"
        say(sock, {"return": INFO})

    with served(tmp_path, script) as fake, Agent(fake.path) as client:
        assert client.info().version == "10.0.2"


def test_an_agent_that_is_always_slower_than_we_ask_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer to the latest question would else always come after the next one was put."""
    monkeypatch.setattr(agent_module, "SYNC_AGAIN_SECONDS", 0.05)

    def script(sock: socket.socket) -> None:
        for message in questions(sock):
            time.sleep(0.12)
            if message["execute"] == "guest-info":
                say(sock, {"return": INFO})
                return
            say(sock, {"return": message["arguments"]["id"]}, delimited=True)

    with served(tmp_path, script) as fake, Agent(fake.path) as client:
        assert client.info().version == "10.0.2"


def test_nobody_answers(tmp_path: Path) -> None:
    with served(tmp_path, agent({}, deaf_to=1000)) as fake, Agent(fake.path, timeout=0.7) as client:
        began = time.monotonic()
        with pytest.raises(AgentTimeout, match=r"within 0\.7 s") as caught:
            client.info()
        assert time.monotonic() - began < 2
        assert "qemu-guest-agent" in caught.value.hint


def test_it_syncs_and_then_falls_silent(tmp_path: Path) -> None:
    with served(tmp_path, agent({"guest-info": None})) as fake, Agent(fake.path, timeout=0.3) as client:
        with pytest.raises(AgentTimeout, match="guest-info"):
            client.info()


def test_a_trickle_does_not_stretch_the_deadline(tmp_path: Path) -> None:
    def script(sock: socket.socket) -> None:
        for _ in range(100):
            sock.sendall(b"x")
            time.sleep(0.05)

    with served(tmp_path, script) as fake, Agent(fake.path, timeout=0.5) as client:
        began = time.monotonic()
        with pytest.raises(AgentTimeout):
            client.ping()
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("flood", [b"\n" * 65536, b'{"return": 1}\n' * 4096, b"\xff" * 65536 + b"\n"])
def test_a_flood_does_not_stretch_the_deadline(tmp_path: Path, flood: bytes) -> None:
    def script(sock: socket.socket) -> None:
        while True:
            sock.sendall(flood)

    with served(tmp_path, script) as fake, Agent(fake.path, timeout=0.5) as client:
        began = time.monotonic()
        with pytest.raises(AgentTimeout):
            client.ping()
        assert time.monotonic() - began < 3


def test_an_endless_line_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "MAX_ANSWER", 1 << 20)
    with served(tmp_path, saying(b"x" * (3 << 20), hang_up=False)) as fake, Agent(fake.path) as client:
        with pytest.raises(AgentError, match="longer than"):
            client.info()


def test_it_hangs_up(tmp_path: Path) -> None:
    with served(tmp_path, saying(b"")) as fake, Agent(fake.path) as client:
        with pytest.raises(AgentError, match="hung up"):
            client.info()


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\n",
        b"[]\n",
        b"{}\n",
        b'{"return": []}\n',
        b'{"return": {"version": 5, "supported_commands": []}}\n',
        b'{"return": {"version": "1", "supported_commands": [{"name": 1, "enabled": true}]}}\n',
        b'{"return": {"version": "1", "supported_commands": [{"name": "x", "enabled": "yes"}]}}\n',
        b'{"error": "flat"}\n',
        b'\xff\xfe{"return": 1}\n',
        b"[" * 200_000 + b"\n",
    ],
)
def test_nonsense(tmp_path: Path, answer: bytes) -> None:
    with served(tmp_path, agent({"guest-info": answer})) as fake, Agent(fake.path) as client:
        with pytest.raises(AgentError, match="nonsense"):
            client.info()


def test_after_a_failure_the_next_call_is_right(tmp_path: Path) -> None:
    late = b'{"return": {"version": "late", "supported_commands": []}}\n'
    answers = {"guest-set-time": b"", "guest-info": INFO}
    with served(tmp_path, agent(answers)) as fake, Agent(fake.path, timeout=0.3) as client:
        with pytest.raises(AgentTimeout):
            client.set_time()
        answers["guest-info"] = json.dumps({"return": INFO}).encode() + b"\n" + late
        client.timeout = 5
        assert client.info().version == "10.0.2"
        assert client.info().version == "10.0.2"


def test_suspend_is_not_answered(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    with served(tmp_path, agent({"guest-suspend-ram": None}, asked=asked)) as fake, Agent(fake.path) as client:
        client.suspend_ram()
    assert asked[-1]["execute"] == "guest-suspend-ram"


def test_suspend_is_refused_in_the_agents_words(tmp_path: Path) -> None:
    with served(tmp_path, agent({})) as fake, Agent(fake.path) as client:
        with pytest.raises(CommandFailed, match="has been disabled") as caught:
            client.suspend_ram()
        assert caught.value.error_class == "CommandNotFound"


def test_a_socket_that_closes_with_the_suspension_is_no_failure(tmp_path: Path) -> None:
    def script(sock: socket.socket) -> None:
        asked = questions(sock)
        say(sock, {"return": next(asked)["arguments"]["id"]}, delimited=True)
        next(asked)
        sock.shutdown(socket.SHUT_RDWR)

    with served(tmp_path, script) as fake, Agent(fake.path) as client:
        client.suspend_ram()


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="cannot connect"):
        Agent(str(tmp_path / "nobody"))
