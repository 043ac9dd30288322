"""What a CPU model means to a QEMU: its boolean properties, expanded.

The same `-cpu` can mean more or less in another version, or on the same one with another machine type; a guest that has
booted with a feature must keep it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from cpr.errors import CommandFailed
from cpr.qemu import cmdline as cl
from cpr.qemu.answers import mapping, mappings, text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cpr.qemu.answers import Answers

TYPE = re.compile(r"(.+)-[^-]+-cpu")
"""QOM type of a CPU: MODEL-TARGET-cpu (qemu64-x86_64-cpu)."""
NOT_FEATURES = frozenset({"realized", "hotplugged", "hotpluggable", "start-powered-off", "check", "enforce"})


def features(answers: Answers, command: cl.CommandLine | None) -> tuple[tuple[str, bool], ...]:
    """(property, value) of the model that the guest's CPUs have; empty where this QEMU does not tell."""
    if not answers.knows("query-cpu-model-expansion"):
        return ()
    given = cl.settings(command).cpu if command is not None else None
    name, properties = parse_cpu(given) if given else (_default_model(answers), {})
    if not name:
        return ()
    model: dict[str, Any] = {"name": name, **({"props": properties} if properties else {})}
    try:
        return answers.read("query-cpu-model-expansion", parse_expansion, (), type="full", model=model)
    except CommandFailed:
        return ()


def parse_cpu(value: str) -> tuple[str, dict[str, Any]]:
    """`qemu64,+avx2,-sse4a,pmu=on,phys-bits=40` -> the model and what query-cpu-model-expansion takes with it."""
    name, *words = value.split(",")
    properties: dict[str, Any] = {}
    for word in words:
        key, equals, text_value = word.partition("=")
        if word.startswith(("+", "-")):
            properties[word[1:].replace("_", "-")] = word.startswith("+")
        elif not equals:
            properties[key.replace("_", "-")] = True
        elif text_value in ("on", "off"):
            properties[key.replace("_", "-")] = text_value == "on"
        elif re.fullmatch(r"\d+|0x[0-9a-fA-F]+", text_value):
            properties[key] = int(text_value, 0)
        else:
            properties[key] = text_value
    return name, {k: v for k, v in properties.items() if k and k not in ("check", "enforce")}


def parse_expansion(reply: Any) -> tuple[tuple[str, bool], ...]:
    properties = mapping(mapping(mapping(reply)["model"]).get("props", {}))
    return tuple(sorted((k, v) for k, v in properties.items() if isinstance(v, bool) and k not in NOT_FEATURES))


def _default_model(answers: Answers) -> str:
    """By the QOM type of the first vCPU: what the machine takes where argv names none."""

    def first(reply: Any) -> str:
        return next((text(e["qom-path"]) for e in mappings(reply)), "")

    path = answers.read("query-cpus-fast", first, "")
    match = TYPE.fullmatch(answers.qom_get(path, "type", text, "")) if path else None
    return match[1] if match else ""


def differences(before: Mapping[str, bool], after: Mapping[str, bool]) -> tuple[str, ...]:
    """Features that both know and value differently, in words. Spellings of one feature are said once."""
    said: dict[str, str] = {}
    for name in sorted(before.keys() & after.keys()):
        if before[name] != after[name]:
            canonical = name.replace("_", "-").replace(".", "-")
            said.setdefault(canonical, f"{canonical} is {_word(before[name])} and would be {_word(after[name])}")
    return tuple(said.values())


def _word(value: bool) -> str:
    return "on" if value else "off"
