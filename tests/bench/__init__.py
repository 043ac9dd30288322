"""The benchmark table: every way to put a running guest on another QEMU, measured in turns in one run.

    python -m tests.bench --quick

    guest      the counting guest in its QEMU, and the proof that it survived
    ways       what is compared, as a table; native: those that QEMU has by itself, driven over QMP
    measure    one sample; all samples, round-robin, so that drift of the machine hits all ways alike
    table      medians and the page that is printed
    test_bars  what must hold, judged from such a run (pytest -m bench)

Blackout is the time from the STOP event of the old QEMU to the RESUME event of the new one, by the events' own
timestamps. Out of scope: what the guest's users notice (the lab measures that), and judging whether it is good.
"""


class WayFailed(Exception):
    """A sample that is not a figure: the move did not happen, or the guest did not survive it; the text says what."""
