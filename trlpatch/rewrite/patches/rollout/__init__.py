"""Rollout patches: their hooks decide which engine, adapter and sampling parameters a trainer rolls out with.

In the order of a training run: the engine is chosen, built, synchronised, used and put to sleep.
"""
