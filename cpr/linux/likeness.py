"""Starting a process in the likeness of another, and saying in what two processes differ.

    likeness ── the face of:
     ├── traits     Likeness, likeness_of, differences: the value
     ├── launch     launch, Launched, LaunchError: our side of a start
     │    └── launcher   the helper that becomes the program
     └── placement  ThreadPlacement, thread_placement, apply_placement: the threads, afterwards

Out of scope: which program, with which arguments; those are the caller's.
"""

from __future__ import annotations

from cpr.linux.launch import Launched, LaunchError, Places, launch
from cpr.linux.placement import ThreadPlacement, apply_placement, thread_placement
from cpr.linux.traits import Likeness, differences, likeness_of, own_likeness

__all__ = [
    "LaunchError",
    "Launched",
    "Likeness",
    "Places",
    "ThreadPlacement",
    "apply_placement",
    "differences",
    "launch",
    "likeness_of",
    "own_likeness",
    "thread_placement",
]
