"""One copy of the base weights for the engine and the trainer.

The transformers model is built over the storage of vLLM's parameters: every parameter of it is a frozen view. What
this takes is that vLLM holds each weight as transformers has it (dense, unquantized, on one device, in this process),
alone or as a run of rows of a larger one. Whether it does is found out name by name; nothing is known here about
single architectures.
"""

from __future__ import annotations

from trlpatch.engine.sharing.aliasing import overlaps, verify_overlap
from trlpatch.engine.sharing.build import model_over_engine, why_not_shareable
from trlpatch.engine.sharing.logits import compare_logits
from trlpatch.engine.sharing.protect import check_frozen, protect, unprotect

__all__ = [
    "check_frozen",
    "compare_logits",
    "model_over_engine",
    "overlaps",
    "protect",
    "unprotect",
    "verify_overlap",
    "why_not_shareable",
]
