"""Faults on order, at every step of an update: what plants them, and what must be true afterwards.

The product has no hook for this. A directory of the tests' own stands in front of PYTHONPATH; the keeper's interpreter
loads `planted/sitecustomize.py` from it, which patches what the keeper is about to use.

fault      a fault as a value, and the stage where it announces itself
subject    the guest under test, what moves it, and what is well
command    a `cpr update` without all that comes before the keeper, to be killed
"""
