"""Weights in place: the policy's parameters written straight into those of an engine, adapters merged on the way.

For what no LoRA request can carry (full fine-tuning, DoRA, `modules_to_save`, trained biases, ranks above the
engine's), and with adapter="merge". Where the engine's layout is not proven, TRL's own push runs as before.
"""
