"""Put the engine to sleep while the optimizer works, with live weights when it wakes.

TRL sleeps at level 2 from 0.25.0 on, also right after construction, which discards the weights of an attached engine
and every LoRA buffer; 0.26.0-1.9.2 then run `reload_weights`, which loads the checkpoint from disk over the policy
(trl #5312). The hooks choose the level by what the engine holds, never reload from disk, and synchronise again before
a rollout whenever a sleep has discarded the weights.

Where TRL has no sleep code for a trainer, a sleep follows the rollout call; the wake is in the hooks that precede it.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Sequence

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import Insertion, PatchTransformer, after, calls_hook, engine_call, engine_method, hook
from trlpatch.rewrite.outline import Outline
from trlpatch.rewrite.patch import Patch, exemptions, variants
from trlpatch.source.syntax import nested_blocks
from trlpatch.trl_names import ENGINE_ATTRIBUTES

SLEEP = Anchor(
    "sleep_call", hint=r"\bsleep\(", sign=lambda node: engine_call(node, "sleep") is not None, prefilter=(".sleep(",)
)
WAKE = Anchor(
    "wake_call",
    hint=r"wake_up\(",
    sign=lambda node: engine_call(node, "wake_up") is not None,
    prefilter=(".wake_up(",),
)
RELOAD = Anchor(
    "reload_call",
    hint=r"reload_weights",
    sign=lambda node: (call := engine_call(node, "collective_rpc")) is not None and reloads(call),
    prefilter=(".collective_rpc(",),
)
UNSLEPT = Anchor("rollout_without_sleep", hint=r"\.(generate|chat)\(")

_IN_VLLM_GENERATION = "the engine sleeps in VLLMGeneration"


def reloads(call: ast.Call) -> bool:
    """Tell whether `collective_rpc` is called for `reload_weights`."""
    return bool(call.args) and isinstance(call.args[0], ast.Constant) and call.args[0].value == "reload_weights"


class Sleep(PatchTransformer):
    """Send TRL's own sleep, wake and reload calls through the hooks."""

    def edit_call(self, node: cst.Call) -> cst.Call:
        for method, anchor in (("sleep", SLEEP), ("wake_up", WAKE)):
            found = engine_method(node, method)
            if found is not None:
                self.hits[anchor] += 1
                return _through_hook(method, found, node.args)
        found = engine_method(node, "collective_rpc")
        if found is not None and _names_reload(node):
            self.hits[RELOAD] += 1
            return _through_hook("reload_weights", found, node.args[1:])
        return node


def _through_hook(
    name: str, found: tuple[cst.BaseExpression, cst.BaseExpression], arguments: Sequence[cst.Arg]
) -> cst.Call:
    call = hook(name, *found)
    return call.with_changes(args=[*call.args, *arguments])


def _names_reload(node: cst.Call) -> bool:
    first = node.args[0].value if node.args else None
    return isinstance(first, cst.SimpleString) and first.evaluated_value == "reload_weights"


def insertions(file: Outline, expected: Collection[Anchor]) -> Iterator[Insertion]:
    """Put a sleep after every rollout of a trainer that has no sleep code of its own."""
    if UNSLEPT not in expected:
        return
    for function in file.functions:
        for block in nested_blocks(function.node):
            for statement, following in zip(block, [*block[1:], None], strict=True):
                engine = _rolls_out(statement)
                if engine and not calls_hook(following, "sleep"):
                    owner = engine.rpartition(".")[0]
                    yield after(file, function, statement, UNSLEPT, f"_trlpatch.sleep({owner}, {engine})")


def _rolls_out(statement: ast.stmt) -> str:
    """Return the engine's expression if the statement assigns what `<engine>.generate` or `.chat` returns."""
    call = statement.value if isinstance(statement, ast.Assign) else None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        return ""
    engine = ast.unparse(call.func.value)
    is_engine = engine.rpartition(".")[2] in ENGINE_ATTRIBUTES
    return engine if is_engine and call.func.attr in {"generate", "chat"} else ""


PATCH = Patch(
    name="sleep",
    summary="the engine sleeps while the optimizer works and wakes with the live policy",
    hooks=("sleep", "wake_up", "reload_weights"),
    transformer=Sleep,
    inserter=insertions,
    after=("live_adapter",),
    variants=variants(
        {
            "grpo": {
                ">=0.18,<0.23": {UNSLEPT: 1},
                ">=0.23,<0.25": {SLEEP: 2, WAKE: 1},
                ">=0.25,<0.26": {SLEEP: 2, WAKE: 2},
                ">=0.26,<0.28": {SLEEP: 2, WAKE: 2, RELOAD: 1},
            },
            "rloo": {
                # Not yet in 0.23, where GRPO has sleep.
                ">=0.22,<0.24": {UNSLEPT: 1},
                ">=0.24,<0.25": {SLEEP: 2, WAKE: 1},
                ">=0.25,<0.26": {SLEEP: 2, WAKE: 2},
                ">=0.26,<0.28": {SLEEP: 2, WAKE: 2, RELOAD: 1},
            },
            "online_dpo": {
                ">=0.18,<0.23": {UNSLEPT: 2},
                ">=0.23,<0.28": {UNSLEPT: 1},
                ">=0.28": {SLEEP: 2, WAKE: 2},
            },
            "gold": {
                ">=0.25,<0.26": {SLEEP: 2, WAKE: 2},
                ">=0.26,<1.0": {SLEEP: 2, WAKE: 2, RELOAD: 1},
            },
            "openenv": {">=0.26,<1.9": {SLEEP: 1, WAKE: 1, RELOAD: 1}},
            "vllm_generation": {
                ">=0.28,<0.29": {SLEEP: 2, WAKE: 2, RELOAD: 1},
                ">=0.29,<1.10": {SLEEP: 2, WAKE: 3, RELOAD: 1},
                ">=1.10": {SLEEP: 2, WAKE: 2},
            },
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
