"""Roll out with the live LoRA adapter: `lora_request=` on every generate and chat call of an in-process engine.

No TRL release passes it (TRL merges the adapter and pushes all weights instead). A call that is missed here samples
from the base model without an error, so the number of calls is pinned for every release.

`llm.chat` renders prompts, with the template of the engine's tokenizer (OnlineDPO below 0.23; GRPO and RLOO 0.25 to
0.29.0): it is given the trainer's, as where TRL renders them itself.
"""

from __future__ import annotations

import ast

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import (
    PatchTransformer,
    engine_call,
    engine_method,
    hook,
    is_hook,
    is_hook_call,
    keyword,
    with_keyword,
)
from trlpatch.rewrite.patch import Patch, exemptions, variants

ROLLOUT = Anchor(
    "rollout_call",
    hint=r"\.(generate|chat)\(",
    sign=lambda node: (call := engine_call(node, "generate", "chat")) is not None and not requests_adapter(call),
    prefilter=(".generate(", ".chat("),
)

_IN_VLLM_GENERATION = "rollouts run in VLLMGeneration"


def requests_adapter(call: ast.Call) -> bool:
    """Tell whether a rollout call carries the adapter being trained."""
    return any(word.arg == "lora_request" and is_hook_call(word.value, "lora_request") for word in call.keywords)


class LiveAdapter(PatchTransformer):
    """Add the keyword to every rollout call, around a value that is already there."""

    def edit_call(self, node: cst.Call) -> cst.Call:
        found = engine_method(node, "generate", "chat")
        if found is None:
            return node
        owner, engine = found
        explicit = keyword(node, "lora_request")
        if explicit is not None and is_hook(explicit.value, "lora_request"):
            return node
        self.hits[ROLLOUT] += 1
        given = [] if explicit is None else [explicit.value]
        made = with_keyword(node, "lora_request", hook("lora_request", owner, engine, *given))
        return made if engine_method(node, "chat") is None else _with_template(made, owner)


def _with_template(node: cst.Call, owner: cst.BaseExpression) -> cst.Call:
    explicit = keyword(node, "chat_template")
    given = [] if explicit is None else [explicit.value]
    return with_keyword(node, "chat_template", hook("chat_template", owner, *given))


PATCH = Patch(
    name="live_adapter",
    summary="every rollout carries the adapter being trained",
    hooks=("lora_request", "chat_template"),
    transformer=LiveAdapter,
    requires=("adapter_sync", "sleep", "rollout_func"),
    after=("adapter_sync",),
    variants=variants(
        {
            "grpo": {">=0.18,<0.25": {ROLLOUT: 1}, ">=0.25,<0.28": {ROLLOUT: 2}},
            "rloo": {">=0.22,<0.25": {ROLLOUT: 1}, ">=0.25,<0.28": {ROLLOUT: 2}},
            "online_dpo": {">=0.18,<0.23": {ROLLOUT: 2}, ">=0.23": {ROLLOUT: 1}},
            "gold": {">=0.25,<1.0": {ROLLOUT: 1}},
            "openenv": {">=0.26,<1.9": {ROLLOUT: 2}},
            # 0.29.1 drops llm.chat inside a patch release: generate takes token ids from then on.
            "vllm_generation": {">=0.28,<0.29.1": {ROLLOUT: 2}, ">=0.29.1": {ROLLOUT: 1}},
        }
    ),
    exemptions=exemptions(
        {
            "grpo": {">=0.28": _IN_VLLM_GENERATION},
            "rloo": {">=0.28": _IN_VLLM_GENERATION},
            "gold": {">=1.0": _IN_VLLM_GENERATION},
        }
    ),
)
