"""Settings: defaults < /usr/lib/cpr/cpr.toml < /etc/cpr/cpr.toml < environment (CPR_...) < options.

    [update]
    engine = "auto"
    jobs = 4
    timeout = 120.0          # seconds, from the first step to the commit
    max-downtime = 5.0       # seconds of blackout
    manager-events = "hide"  # or "show": whether who holds a monitor hears of STOP and RESUME

The options are laid over by the command line; this module only knows files and the environment.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cpr.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FILES = ("/usr/lib/cpr/cpr.toml", "/etc/cpr/cpr.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What an update does where no option says otherwise."""

    engine: str = "auto"
    jobs: int = 4
    timeout: float = 120.0
    """Seconds from the first step to the commit."""
    max_downtime: float = 5.0
    """Seconds that the vCPUs may stand still."""
    manager_events: str = "hide"
    """Whether STOP and RESUME of an update are kept from a client whose monitor is borrowed: hide or show."""


_TYPES: dict[str, type[str] | type[int] | type[float]] = {
    "engine": str,
    "jobs": int,
    "timeout": float,
    "max_downtime": float,
    "manager_events": str,
}
MANAGER_EVENTS = ("hide", "show")


def load(environ: Mapping[str, str] | None = None, files: Iterable[str] = FILES) -> Config:
    """The settings of this host.

    Raises:
        UsageError: a file or variable cannot be read, or says something that cannot be meant.
    """
    config = Config()
    for path in files:
        try:
            with open(path, "rb") as file:
                data = tomllib.load(file)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: {error}", hint="correct the file or move it away") from None
        section = data.get("update", {})
        if set(data) - {"update"} or not isinstance(section, dict):
            raise UsageError(f"{path}: there is one section, [update]; found {', '.join(map(str, data))}")
        for key, value in section.items():
            config = _with(config, key, value, where=path)
    for name in _TYPES:
        text = (os.environ if environ is None else environ).get(f"CPR_{name.upper()}")
        if text:
            config = _with(config, name, text, where=f"CPR_{name.upper()}")
    return config


def _with(config: Config, key: str, value: Any, *, where: str) -> Config:
    name = key.replace("-", "_")
    if name not in _TYPES:
        known = ", ".join(n.replace("_", "-") for n in _TYPES)
        raise UsageError(f"{where}: there is no setting {key!r}", hint=f"settings: {known}")
    try:
        converted: Any = _TYPES[name](value)
    except (TypeError, ValueError):
        raise UsageError(f"{where}: {key} = {value!r} is no {_TYPES[name].__name__}") from None
    if not isinstance(converted, str) and not converted > 0:
        raise UsageError(f"{where}: {key} = {value!r} has to be greater than zero")
    if name == "manager_events" and converted not in MANAGER_EVENTS:
        raise UsageError(f"{where}: {key} = {value!r}: {' or '.join(MANAGER_EVENTS)}")
    return replace(config, **{name: converted})
