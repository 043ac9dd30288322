"""How often the long tests do a thing: `CPR_TEST_ROUNDS` and `CPR_TEST_SEED` say otherwise."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

FEW = 4


def rounds(default: int) -> Any:
    """A parameter: so often, in the full suite."""
    number = int(os.environ.get("CPR_TEST_ROUNDS", default))
    return pytest.param(number, marks=pytest.mark.full, id=f"full-{default}")


def seed() -> int:
    """Of a test's random numbers; it is to be printed."""
    return int(os.environ.get("CPR_TEST_SEED", "0")) or random.randrange(1, 1 << 32)  # noqa: S311 - not a secret
