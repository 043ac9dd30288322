"""Real QEMUs, kernels and guests for tests and for the demonstration.

Everything comes from Debian's packages through the mirror that apt is configured with, is unpacked (never
installed) and kept in a cache.  Nothing here is needed to use cpr; nothing here imports cpr.
"""


class LabError(Exception):
    """Something the lab needs cannot be had; the text says what, why and what to do."""
