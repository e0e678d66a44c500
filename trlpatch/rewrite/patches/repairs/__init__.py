"""Repair patches: each makes releases of TRL, transformers and vLLM work together that do not.

Repairs that edit the same file in a common release say in `after` which comes first.
"""
