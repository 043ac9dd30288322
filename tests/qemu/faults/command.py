"""A command that starts a keeper on the pickled (plan, run id, bounds, run directory) of its standard input, and waits.

What `cpr update` does after its checks, which would be most of the time that a test takes.
"""

from __future__ import annotations

import json
import pickle
import sys

from cpr import keeper
from cpr.journal import outcome_json


def main() -> None:
    plan, run_id, bounds, base = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the test
    handle = keeper.start(plan, run_id=run_id, bounds=bounds, base=base)
    print(json.dumps(outcome_json(handle.outcome())))


if __name__ == "__main__":
    main()
