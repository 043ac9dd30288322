"""The value of one option: `socket,id=mon,server,nowait` or `{"driver": "qcow2", ...}`.

`Params` remembers how every item was spelt, so that what is not changed is rendered as it stood. In scope: QEMU's two
notations (comma separated `key=value` with `,,` for a comma, and JSON), sizes and booleans. Out of scope: which keys an
option knows, and what they mean.

`get()` always answers with the text QEMU would have got: JSON `true` is `on`, a number its digits. A key may be dotted
(`file.filename`): in the comma notation that is how QEMU itself writes nesting (util/keyval.c), in JSON it is a path.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

Scalar = str | int | float | bool | None

_ON = frozenset({"on", "yes", "true", "y"})
_OFF = frozenset({"off", "no", "false", "n"})
_SUFFIXES = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50, "e": 1 << 60}


class CommandLineError(ValueError):
    """A command line QEMU itself would not have understood, or an edit that cannot be made."""


class Form(Enum):
    """How an item of the comma notation was spelt."""

    PAIR = "key=value"
    IMPLIED = "value"  # the first item, whose key goes without saying
    FLAG = "key"  # for key=on
    NO_FLAG = "nokey"  # for key=off


@dataclass(frozen=True, slots=True)
class Item:
    """One `key=value` of the comma notation."""

    key: str
    value: str
    form: Form = Form.PAIR

    def render(self) -> str:
        escaped = self.value.replace(",", ",,")
        match self.form:
            case Form.IMPLIED:
                return escaped
            case Form.FLAG:
                return self.key
            case Form.NO_FLAG:
                return f"no{self.key}"
            case _:
                return f"{self.key}={escaped}"


@dataclass(frozen=True, slots=True)
class Params:
    """The parameters of one option, in order, duplicates kept. Immutable; every edit gives a new one."""

    items: tuple[Item, ...] = ()
    json: Mapping[str, Any] | None = field(default=None, hash=False)  # never changed in place

    @classmethod
    def of(cls, first: tuple[str, str] | None = None, /, **pairs: Scalar) -> Params:
        """`Params.of(("backend", "socket"), id="mon", server=True)`: `first` is the implied key and its value."""
        items = [Item(*first, Form.IMPLIED)] if first else []
        return cls(tuple(items)).with_(pairs)

    # -- reading

    def get(self, key: str, default: str | None = None) -> str | None:
        """The text of `key`; of several the last, as in QEMU. A key with no text (an object, null) gives `default`."""
        texts = self.all(key)
        return texts[-1] if texts else default

    def all(self, key: str) -> tuple[str, ...]:
        """Every text given for `key` (`hostfwd` and `guestfwd` may come many times; in JSON as a list)."""
        if self.json is None:
            return tuple(item.value for item in self.items if item.key == key)
        found = self.raw(key)
        members = found if isinstance(found, list) else [found]
        texts = (_text(m.get("str") if isinstance(m, dict) else m) for m in members)
        return tuple(t for t in texts if t is not None)

    def raw(self, key: str) -> Any:
        """The JSON value at a dotted path (`host-nodes`, `server.type`), None if absent or not JSON."""
        node: Any = self.json
        if isinstance(node, dict) and key in node:
            return node[key]
        for part in key.split("."):
            if isinstance(node, list) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, dict) and part in node:
                node = node[part]
            else:
                return None
        return node

    def flag(self, key: str, default: bool = False) -> bool:
        """`key` as a boolean; `default` where it is absent or no boolean."""
        value = parse_bool(self.get(key))
        return default if value is None else value

    def size(self, key: str) -> int | None:
        """`key` as a number of bytes; a bare number counts bytes."""
        text = self.get(key)
        return None if text is None else parse_size(text)

    def names(self) -> tuple[str, ...]:
        """Every key once, in order; nested ones dotted."""
        if self.json is None:
            return tuple(dict.fromkeys(item.key for item in self.items))
        return tuple(_flat_keys(self.json))

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str):
            return False
        if self.json is None:
            return any(item.key == key or item.key.startswith(key + ".") for item in self.items)
        return _holds(self.json, key)

    # -- editing

    def with_(self, changes: Mapping[str, Scalar] | None = None, /, **more: Scalar) -> Params:
        """Every key set: in the place of the last one of that name, else at the end. None stands for JSON null."""
        result = self
        for key, value in {**(changes or {}), **more}.items():
            result = result._set_json(key, value) if result.json is not None else result._set_item(key, value)
        return result

    def without(self, *keys: str) -> Params:
        """`keys` removed, with everything nested below them (`server` also takes `server.path`)."""
        if self.json is None:
            gone = tuple(key + "." for key in keys)
            kept = (i for i in self.items if i.key not in keys and not i.key.startswith(gone))
            return replace(self, items=tuple(kept))
        data = copy.deepcopy(dict(self.json))
        for key in keys:
            _drop(data, key)
        return replace(self, json=data)

    def render(self) -> str:
        """The option's value again, in the notation it came in."""
        if self.json is not None:
            return json.dumps(self.json, separators=(",", ":"), ensure_ascii=False)
        return ",".join(item.render() for item in self.items)

    def _set_item(self, key: str, value: Scalar) -> Params:
        text = _text(value)
        at = [n for n, item in enumerate(self.items) if item.key == key]
        if text is None:
            raise CommandLineError(f"{key}=null can only be said in JSON")
        if not at:
            return replace(self, items=(*self.items, Item(key, text)))
        form = Form.IMPLIED if self.items[at[-1]].form is Form.IMPLIED and "=" not in text else Form.PAIR
        items = list(self.items)
        items[at[-1]] = Item(key, text, form)
        return replace(self, items=tuple(i for n, i in enumerate(items) if n not in at[:-1]))

    def _set_json(self, key: str, value: Scalar) -> Params:
        data = copy.deepcopy(dict(self.json or {}))
        node: Any = data
        *parents, last = [key] if key in data else key.split(".")
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        if isinstance(node, list):
            node[int(last)] = value
        else:
            node[last] = value
        return replace(self, json=data)


def parse_keyval(value: str, implied_key: str | None = None, *, flags: bool = True) -> Params:
    """The comma notation: `,,` is a comma, `key` is on, `nokey` is off, a first bare item belongs to `implied_key`.

    `flags=False` is for what QEMU parses with util/keyval.c (-object, -blockdev, -display, -audiodev, -machine): a
    bare item other than the first is an error there.
    """
    items: list[Item] = []
    for number, part in enumerate(split_commas(value)):
        key, equals, text = part.partition("=")
        if equals and "," not in key:
            items.append(Item(key, text))
        elif number == 0 and implied_key is not None:
            items.append(Item(implied_key, part, Form.IMPLIED))
        elif not part:
            continue  # a trailing comma
        elif not flags:
            raise CommandLineError(f"expected '=' after parameter {part!r} in {value!r}")
        elif part.startswith("no") and len(part) > 2:
            items.append(Item(part[2:], "off", Form.NO_FLAG))
        else:
            items.append(Item(part, "on", Form.FLAG))
    return Params(tuple(items))


def parse_json(value: str) -> Params:
    """The JSON notation; the top level is an object."""
    try:
        data = json.loads(value)
    except ValueError as err:
        raise CommandLineError(f"not JSON: {value!r}: {err}") from err
    if not isinstance(data, dict):
        raise CommandLineError(f"not a JSON object: {value!r}")
    return Params(json=data)


def parse_params(value: str, implied_key: str | None = None, *, flags: bool = True) -> Params:
    """Either notation, told apart by a leading `{` as QEMU does."""
    return parse_json(value) if value.startswith("{") else parse_keyval(value, implied_key, flags=flags)


def split_commas(value: str) -> list[str]:
    """The parts between single commas, with `,,` made one comma (util/qemu-option.c get_opt_value)."""
    parts = [""]
    pieces = value.split(",")
    at = 0
    while at < len(pieces):
        parts[-1] += pieces[at]
        # an empty piece between two commas is an escaped comma
        if at + 2 < len(pieces) and pieces[at + 1] == "":
            parts[-1] += ","
            at += 2
            continue
        at += 1
        if at < len(pieces):
            parts.append("")
    return parts


def escape(text: str) -> str:
    """`text` as it stands as a value in the comma notation."""
    return text.replace(",", ",,")


def parse_bool(text: str | None) -> bool | None:
    """on/off and the other words QEMU takes for them; None for anything else."""
    if text is None:
        return None
    return True if text.lower() in _ON else False if text.lower() in _OFF else None


def parse_size(text: str, *, default_suffix: str = "b") -> int:
    """Bytes: `4G`, `512M`, `1.5G`, `0x40000000`; a bare number counts `default_suffix` (`-m 512` counts M)."""
    digits, unit = text.strip(), default_suffix
    hexadecimal = digits.lower().startswith(("0x", "+0x"))
    if digits and digits[-1].lower() in _SUFFIXES and not (hexadecimal and digits[-1].lower() in "be"):
        digits, unit = digits[:-1], digits[-1].lower()
    scale = _SUFFIXES[unit.lower()]
    try:
        return int(digits, 16) * scale if hexadecimal else int(digits) * scale
    except ValueError:
        pass
    try:
        return int(float(digits) * scale)
    except ValueError:
        raise CommandLineError(f"not a size: {text!r}") from None


def _text(value: Any) -> str | None:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (str, int, float)):
        return str(value)
    return None


def _holds(node: Any, key: str) -> bool:
    if isinstance(node, dict):
        if key in node:
            return True
        head, _, rest = key.partition(".")
        return bool(rest) and head in node and _holds(node[head], rest)
    if isinstance(node, list):
        head, _, rest = key.partition(".")
        there = head.isdigit() and int(head) < len(node)
        return there and (not rest or _holds(node[int(head)], rest))
    return False


def _drop(node: Any, key: str) -> None:
    if not isinstance(node, dict):
        return
    if key in node:
        del node[key]
        return
    head, _, rest = key.partition(".")
    if rest and head in node:
        _drop(node[head], rest)


def _flat_keys(node: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flat_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key
