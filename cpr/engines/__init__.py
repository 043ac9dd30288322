"""Ways to move a running guest to a new QEMU; `ENGINES` has those of this release, in the order `auto` tries them."""

from cpr.engines.base import Engine, Request
from cpr.engines.handover import Handover
from cpr.engines.reexec import Reexec

ENGINES: dict[str, Engine] = {engine.name: engine for engine in (Handover(), Reexec())}

LATER = ("cpr-exec", "cpr-transfer", "cprsave", "copy")
"""Engines that have a name already, and come with a later release."""

__all__ = ["ENGINES", "LATER", "Engine", "Request"]
