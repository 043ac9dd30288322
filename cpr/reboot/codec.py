"""Frozen dataclasses as JSON values and back, by their annotations; what has another shape is refused with its place.

str, int, float, bool, None, unions with None, tuples, frozensets, mappings with string keys, StrEnums, dataclasses.

Keys that are not known are passed over, and a field with a default may be missing: so a later release can add one.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
Special = Mapping[type, tuple["Callable[[Any], Any]", "Callable[[Any], Any]"]]
"""Classes with a form of their own: (to JSON, from JSON; the latter raises KeyError, TypeError, ValueError)."""


def encode(value: Any, special: Special = types.MappingProxyType({})) -> Any:
    """The JSON value. Raises TypeError for what has none."""
    if type(value) in special:
        return special[type(value)][0](value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return str(value) if isinstance(value, StrEnum) else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name), special) for f in dataclasses.fields(value)}
    if isinstance(value, frozenset):
        return sorted(encode(v, special) for v in value)
    if isinstance(value, (tuple, list)):
        return [encode(v, special) for v in value]
    if isinstance(value, Mapping):
        return {str(k): encode(v, special) for k, v in value.items()}
    raise TypeError(f"no JSON for {type(value).__name__}")


def decode(wanted: type[T], value: Any, special: Special = types.MappingProxyType({}), *, where: str = "") -> T:
    """The inverse.

    Raises:
        ValueError: something is missing, or of another type; the text says where.
    """
    return cast("T", _decode(wanted, value, special, where or wanted.__name__))


def _decode(wanted: Any, value: Any, special: Special, where: str) -> Any:
    if wanted is Any:
        return value
    origin = typing.get_origin(wanted)
    if origin in (typing.Union, types.UnionType):
        kinds = typing.get_args(wanted)
        if value is None and type(None) in kinds:
            return None
        [kind] = [k for k in kinds if k is not type(None)]
        return _decode(kind, value, special, where)
    if wanted in special:
        try:
            return special[wanted][1](value)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where}: {type(error).__name__}: {error}"[:200]) from None
    if origin is tuple:
        return _decode_tuple(typing.get_args(wanted), _of(list, value, where), special, where)
    if origin is frozenset:
        [kind] = typing.get_args(wanted)
        return frozenset(_decode(kind, v, special, f"{where}[{n}]") for n, v in enumerate(_of(list, value, where)))
    if origin is not None and issubclass(origin, Mapping):
        kind = typing.get_args(wanted)[1]
        return {k: _decode(kind, v, special, f"{where}.{k}") for k, v in _of(dict, value, where).items()}
    if dataclasses.is_dataclass(wanted):
        return _decode_fields(cast("type", wanted), _of(dict, value, where), special, where)
    if issubclass(wanted, StrEnum):
        return wanted(_of(str, value, where))
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return _of(wanted, value, where)


def _of(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: {str(value)[:60]!r} where {kind.__name__} is meant")
    return value


def _decode_tuple(kinds: tuple[Any, ...], value: list[Any], special: Special, where: str) -> tuple[Any, ...]:
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"{where}: {len(value)} members where {len(kinds)} are meant")
    pairs = zip(kinds, value, strict=True)
    return tuple(_decode(kind, v, special, f"{where}[{n}]") for n, (kind, v) in enumerate(pairs))


def _decode_fields(wanted: type, value: dict[str, Any], special: Special, where: str) -> Any:
    hints = typing.get_type_hints(wanted, localns={"Mapping": Mapping})
    found = {}
    for field in dataclasses.fields(wanted):
        if field.name in value:
            found[field.name] = _decode(hints[field.name], value[field.name], special, f"{where}.{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: no {field.name}")
    return wanted(**found)
