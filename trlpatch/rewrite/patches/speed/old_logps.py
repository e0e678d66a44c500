"""Reuse the training forward's per-token log-probabilities as the old ones, where no update lies between them.

GRPO from 0.23 on computes `old_per_token_logps` in a forward pass of its own (no_grad) after every rollout with vLLM:
its importance sampling correction, exp(old - sampling), needs them before the loss. RLOO computes them always. While
on-policy, that pass repeats what the training forward computes a moment later. The hook around the pass decides for
each generation batch; where it leaves the pass out, `old_per_token_logps` is None, GRPO's loss takes
`per_token_logps.detach()` as stock does without vLLM, and a hook behind that line makes the importance sampling ratio
and the `sampling/*` metrics.

GRPO below 0.27.1 does not hand `sampling_per_token_logps` to the loss; a hook puts them in the batch.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import Insertion, PatchTransformer, after, calls_hook, dotted, hook
from trlpatch.rewrite.outline import Outline
from trlpatch.rewrite.patch import Patch, exemptions, variants
from trlpatch.source.syntax import nested_blocks

_OLD = "old_per_token_logps"
_GENERATES = "_generate_and_score_completions"
_LOSS = "_compute_loss"

PASS = Anchor("old_logps_pass", hint=rf"{_OLD}, _", prefilter=(f"{_OLD}, _",))
CORRECTION = Anchor(
    "correction_at_generation",
    hint=r"self\.use_vllm and self\.vllm_importance_sampling_correction",
    prefilter=("self.vllm_importance_sampling_correction",),
)
RATIO = Anchor("old_logps_in_loss", hint=rf"{_OLD} = per_token_logps\.detach\(\)")
SAMPLING = Anchor("ratio_in_batch", hint=r"output\[\"importance_sampling_ratio\"\]")
SUMMED = Anchor("old_logps_summed", hint=r"old_logps = ", prefilter=(f"old_logps = ({_OLD} *",))
SEQUENCE = Anchor("old_logps_of_sequence", hint=r"inputs\[\"old_logps\"\]", prefilter=('inputs["old_logps"]',))

_CORRECTS = "self.use_vllm and self.vllm_importance_sampling_correction"
_DETACHED = f"{_OLD} = per_token_logps.detach() if {_OLD} is None else {_OLD}"
_ABSENT = cst.parse_expression(f"{_OLD} is None")
_PRESENT = cst.parse_expression(f"{_OLD} is not None")


class OldLogps(PatchTransformer):
    """Put the hook around the pass, and let what needs its result at generation time run only if there is one."""

    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        value, target = updated_node.value, updated_node.targets[0].target
        if _computes(target, value):
            assert isinstance(value, cst.Call)
            self.hits[PASS] += 1
            through = value.with_changes(func=hook("old_logps", cst.Name("self"), value.func))
            return updated_node.with_changes(value=through)
        if dotted(target) != "old_logps":
            return updated_node
        if _sums(value):
            self.hits[SUMMED] += 1
            kept = cst.IfExp(test=_ABSENT.deep_clone(), body=cst.Name("None"), orelse=value)
            return updated_node.with_changes(value=kept)
        if _reads(value):
            self.hits[SEQUENCE] += 1
            found = hook("old_sequence_logps", *(cst.Name(name) for name in ("self", "inputs", "logps")))
            return updated_node.with_changes(value=found)
        return updated_node

    def leave_If(self, original_node: cst.If, updated_node: cst.If) -> cst.If:
        if self.region.inner != _GENERATES or not _asks_for_correction(updated_node.test):
            return updated_node
        self.hits[CORRECTION] += 1
        test = cst.BooleanOperation(left=updated_node.test, operator=cst.And(), right=_PRESENT.deep_clone())
        return updated_node.with_changes(test=test)


def _computes(target: cst.BaseExpression, value: cst.BaseExpression) -> bool:
    """Tell whether the statement is `old_per_token_logps, _ = self._get_per_token_logps_and_entropies(...)`."""
    return (
        isinstance(target, cst.Tuple)
        and dotted(target.elements[0].value) == _OLD
        and isinstance(value, cst.Call)
        and dotted(value.func) == "self._get_per_token_logps_and_entropies"
    )


def _sums(value: cst.BaseExpression) -> bool:
    return cst.Module([]).code_for_node(value) == f"({_OLD} * completion_mask).sum(1)"


def _reads(value: cst.BaseExpression) -> bool:
    return cst.Module([]).code_for_node(value) == 'inputs["old_logps"]'


def _asks_for_correction(test: cst.BaseExpression) -> bool:
    return (
        isinstance(test, cst.BooleanOperation)
        and isinstance(test.operator, cst.And)
        and f"{dotted(test.left)} and {dotted(test.right)}" == _CORRECTS
    )


def insertions(file: Outline, expected: Collection[Anchor]) -> Iterator[Insertion]:
    """Put hooks where GRPO's loss has its old log-probabilities, and where its batch has got its ratio."""
    places = {
        (_LOSS, RATIO): (_is_detached, "importance_sampling_ratio", "self, inputs, per_token_logps"),
        (_GENERATES, SAMPLING): (
            _puts_ratio_in_batch,
            "keep_sampling_logps",
            f"output, {_OLD}, sampling_per_token_logps",
        ),
    }
    for function in file.functions:
        for (name, anchor), (matches, called, arguments) in places.items():
            if function.name != name or anchor not in expected:
                continue
            for block in nested_blocks(function.node):
                for statement, following in zip(block, [*block[1:], None], strict=True):
                    if matches(statement) and not calls_hook(following, called):
                        yield after(file, function, statement, anchor, f"_trlpatch.{called}({arguments})")


def _is_detached(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and ast.unparse(statement) == _DETACHED


def _puts_ratio_in_batch(statement: ast.stmt) -> bool:
    inner = statement.body[0] if isinstance(statement, ast.If) and len(statement.body) == 1 else None
    return isinstance(inner, ast.Assign) and ast.unparse(inner.targets[0]) == "output['importance_sampling_ratio']"


_CORRECTED = {PASS: 1, CORRECTION: 3, RATIO: 1}

PATCH = Patch(
    name="old_logps",
    summary='with old_logps="reuse", no extra pass computes old log-probabilities that the training forward has',
    hooks=("old_logps", "importance_sampling_ratio", "keep_sampling_logps", "old_sequence_logps"),
    transformer=OldLogps,
    inserter=insertions,
    option='old_logps="reuse"',
    variants=variants(
        {
            "grpo": {">=0.23,<0.27.1": {**_CORRECTED, SAMPLING: 1}, ">=0.27.1": _CORRECTED},
            "rloo": {">=0.22": {PASS: 1, SUMMED: 1, SEQUENCE: 1}},
        }
    ),
    exemptions=exemptions(
        {"grpo": {">=0.18,<0.23": "on-policy, this release computes no old log-probabilities in the first place"}}
    ),
)
