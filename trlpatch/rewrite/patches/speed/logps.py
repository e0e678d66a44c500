"""Compute per-token log-probabilities and entropies in chunks of tokens, without the logits of the whole batch.

GRPO and RLOO below 1.15 compute logits [batch, length, vocab] in float32, divide them by the temperature in a second
such tensor, and reduce each position to a log-probability (`selective_log_softmax`) and an entropy
(`entropy_from_logits`); 1.14 divides inside of these. From 1.15 on, TRL has a language modeling head of its own that
works in chunks (`fused_lm_head`). Here, only callees are replaced: the model's forward pass returns what stands for
logits, and the functions that reduce them are called chunk by chunk.
"""

from __future__ import annotations

import libcst as cst

from trlpatch.rewrite.anchor import Anchor
from trlpatch.rewrite.edits import PatchTransformer, dotted, hook
from trlpatch.rewrite.patch import Patch, exemptions, variants

_FUNCTIONS = ("_get_per_token_logps", "_get_per_token_logps_and_entropies", "_full_logits_logps")
_BOTH = "selective_log_softmax_and_entropy"

FORWARD = Anchor("forward_for_logits", hint=r"\bmodel\(", prefilter=("= model(",))
LOGPS = Anchor("log_softmax_of_logits", hint=r"\bselective_log_softmax\(", prefilter=("selective_log_softmax(",))
ENTROPY = Anchor("entropy_of_logits", hint=r"\bentropy_from_logits\(", prefilter=("entropy_from_logits(",))
BOTH = Anchor("log_softmax_and_entropy", hint=rf"\b{_BOTH}\(", prefilter=(f"{_BOTH}(",))


class Logps(PatchTransformer):
    """Replace what is called for logits, log-probabilities and entropies; the arguments stay."""

    def edit_call(self, node: cst.Call) -> cst.Call:
        called = dotted(node.func)
        if self.region.inner not in _FUNCTIONS or called is None:
            return node
        if called == "model":
            return self._through(node, FORWARD, "deferred_logits", cst.Name("self"), node.func)
        if called == "selective_log_softmax":
            # Entropies are asked for in a call of their own, except where a temperature is an argument: 1.14.
            with_entropies = "compute_entropy" in self.region.parameters and len(node.args) == 2
            names = (called, "entropy_from_logits", "compute_entropy") if with_entropies else (called,)
            return self._through(node, LOGPS, called, *map(cst.Name, names))
        if called == "entropy_from_logits":
            return self._through(node, ENTROPY, called, node.func)
        if called == _BOTH:
            return self._through(node, BOTH, called, node.func)
        return node

    def _through(self, node: cst.Call, anchor: Anchor, name: str, *arguments: cst.BaseExpression) -> cst.Call:
        self.hits[anchor] += 1
        return node.with_changes(func=hook(name, *arguments))


_SEPARATE = {FORWARD: 1, LOGPS: 1, ENTROPY: 1}
_WITH_BONUS = {FORWARD: 1, LOGPS: 1, ENTROPY: 2}
_TOGETHER = {FORWARD: 1, LOGPS: 1, BOTH: 1}
_CHUNKED = "TRL computes its log-probabilities in chunks by itself"

PATCH = Patch(
    name="logps",
    summary='with logps="chunked", log-probabilities are computed without the logits of the whole batch',
    hooks=("deferred_logits", "selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy"),
    transformer=Logps,
    option='logps="chunked"',
    variants=variants(
        {
            "grpo": {
                ">=0.18,<0.20": {FORWARD: 1, LOGPS: 1},
                ">=0.20,<1.8": _SEPARATE,
                ">=1.8,<1.14": _WITH_BONUS,
                ">=1.14,<1.15": _TOGETHER,
            },
            "rloo": {">=0.22,<1.14": _SEPARATE, ">=1.14,<1.15": _TOGETHER},
        }
    ),
    exemptions=exemptions({"grpo": {">=1.15": _CHUNKED}, "rloo": {">=1.15": _CHUNKED}}),
)
