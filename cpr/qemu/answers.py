"""QMP replies, taken apart with suspicion.

`Answers` is a monitor together with the list of commands that its QEMU has: what it does not know is skipped. A reply
of the wrong shape becomes a `MonitorError` that names the command, so that parsers can be plain functions that take
a reply apart by `reply["key"]` and the helpers below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

from cpr.errors import CommandFailed, MonitorError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cpr.qemu.qmp import Monitor, Pending

T = TypeVar("T")

NONSENSE = (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError)
"""What a parser raises on a reply that QEMU would never give."""


class Answers:
    """Questions to one QEMU. Errors: `MonitorError`; `CommandFailed` where QEMU refuses a command that it has."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self._ahead: dict[str, Pending] = {}
        self.commands: frozenset[str] = frozenset(("query-commands",))
        self.commands = self.read("query-commands", parse_names, frozenset())

    def knows(self, command: str) -> bool:
        return command in self.commands

    def read(self, command: str, parse: Callable[[Any], T], default: Any, /, **arguments: Any) -> T:
        """The parsed reply of `command`; `default` where this QEMU does not have it."""
        if command not in self.commands:
            return cast("T", default)
        sent = self._ahead.pop(_key(command, arguments), None)
        reply = sent.result() if sent is not None else self.monitor.execute(command, **arguments)
        return self.sane(command, lambda: parse(reply))

    def ahead(self, *questions: tuple[str, dict[str, Any]]) -> None:
        """Send questions now whose answers are `read` later, once each: QEMU answers while we do something else."""
        for command, arguments in questions:
            if command in self.commands:
                named = {key.replace("_", "-"): value for key, value in arguments.items()}
                self._ahead[_key(command, arguments)] = self.monitor.submit(command, **named)

    def sane(self, command: str, parse: Callable[[], T]) -> T:
        """What `parse` makes of replies to `command`; `MonitorError` where it stumbles over their shape."""
        try:
            return parse()
        except NONSENSE as error:
            reason = f"answers nonsense to {command}: {type(error).__name__}: {str(error)[:120]}"
            raise MonitorError(self.monitor.address, reason, hint="is this socket really QEMU's?") from None

    def qom_get(self, path: str, name: str, parse: Callable[[Any], T], default: Any) -> T:
        """A QOM property; `default` where the object or the property does not exist."""
        try:
            return self.read("qom-get", parse, default, path=path, property=name)
        except CommandFailed:
            return cast("T", default)

    def children(self, path: str) -> tuple[tuple[str, str], ...]:
        """(name, QOM type) of the children of an object; none where there is no such object."""
        try:
            return self.read("qom-list", parse_children, (), path=path)
        except CommandFailed:
            return ()

    def properties(self, path: str, names: tuple[str, ...]) -> dict[str, Any]:
        """The properties of an object that exist, out of `names`. QEMU >= 10.1 answers in one go."""
        if "qom-list-get" in self.commands:
            try:
                found = self.read("qom-list-get", parse_properties, {}, paths=[path])
            except CommandFailed:
                return {}
            return {name: found[name] for name in names if name in found}
        missing = object()
        values = {name: self.qom_get(path, name, lambda value: value, missing) for name in names}
        return {name: value for name, value in values.items() if value is not missing}

    def human(self, command_line: str) -> str:
        """The text that an HMP command prints; empty where it cannot be asked."""
        try:
            return self.read("human-monitor-command", text, "", command_line=command_line)
        except CommandFailed:
            return ""


def _key(command: str, arguments: Mapping[str, Any]) -> str:
    return f"{command} {sorted(arguments.items())}"


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"not a string: {value!r}"[:80])
    return value


def number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"not a number: {value!r}"[:80])
    return value


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"neither true nor false: {value!r}"[:80])
    return value


def mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"not an object: {value!r}"[:80])
    return value


def mappings(value: Any) -> Iterator[dict[str, Any]]:
    """The members of a list of objects."""
    if not isinstance(value, list):
        raise TypeError(f"not a list: {value!r}"[:80])
    return (mapping(member) for member in value)


def numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise TypeError(f"not a list: {value!r}"[:80])
    return tuple(number(member) for member in value)


def parse_names(reply: Any) -> frozenset[str]:
    return frozenset(text(member["name"]) for member in mappings(reply))


def parse_children(reply: Any) -> tuple[tuple[str, str], ...]:
    """The children among the properties that qom-list gives: their type is `child<TYPE>`."""
    found = []
    for member in mappings(reply):
        kind = text(member["type"])
        if kind.startswith("child<") and kind.endswith(">"):
            found.append((text(member["name"]), kind[6:-1]))
    return tuple(found)


def parse_properties(reply: Any) -> dict[str, Any]:
    """The properties of the first object that qom-list-get gives."""
    return {
        text(member["name"]): member.get("value") for member in mappings(mapping(reply[0])["properties"])
    }
