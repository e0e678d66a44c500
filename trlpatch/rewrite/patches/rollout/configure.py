"""Configure the trainer (`use_vllm`, `vllm_mode`) for the engine that its model carries.

At the head of `__init__`, before TRL copies `args.use_vllm` and `args.vllm_mode` to the trainer. RLOO, OnlineDPO and
GOLD default to `vllm_mode="server"` up to TRL 0.29.1 and would otherwise wait 240 s for a server.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import Insertion, before, calls_hook
from trlpatch.rewrite.outline import Outline
from trlpatch.rewrite.patch import Patch, variants

INIT = Anchor("init", hint=r"def __init__\(")


def insertions(file: Outline, expected: Collection[Anchor]) -> Iterator[Insertion]:
    """Put the call at the head of the trainer's `__init__`."""
    for function in file.functions:
        takes_both = {"model", "args"} <= function.parameters
        if function.name == "__init__" and takes_both and not calls_hook(function.body[0], "configure"):
            yield before(file, function, function.body[0], INIT, "_trlpatch.configure(self, model, args)")


PATCH = Patch(
    name="configure",
    summary="a model that carries an engine makes its trainer use it, colocated, asleep as the engine was built",
    hooks=("configure",),
    inserter=insertions,
    variants=variants(
        {
            "grpo": {">=0.18": {INIT: 1}},
            "rloo": {">=0.22": {INIT: 1}},
            "online_dpo": {">=0.18": {INIT: 1}},
            "gold": {">=0.25": {INIT: 1}},
            "distillation": {">=1.1": {INIT: 1}},
            "self_distillation": {">=1.0,<1.6": {INIT: 1}},
            "sdpo": {">=1.6": {INIT: 1}},
            "sdft": {">=1.6": {INIT: 1}},
            "ssd": {">=1.2,<1.16": {INIT: 1}},
            "iw_opd": {">=1.9": {INIT: 1}},
        }
    ),
)
