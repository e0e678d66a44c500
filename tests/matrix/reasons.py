"""Why a run of docs/matrix.json is not green: each reason once, with upstream's own word on it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.matrix.runs import Run
from trlpatch.source.releases import ReleaseRange, parse_release


@dataclass(frozen=True)
class Reason:
    """Attributes:
    text: the cause, in words that need no context.
    link: upstream's change or thread; empty where upstream has none.
    error: searched for in a run's error and note.
    case: full match of a run's case.
    """

    text: str
    link: str
    verdicts: frozenset[str]
    error: str = ""
    case: str = ".*"
    trl: str = ">=0.18"
    stock: bool | None = None

    def explains(self, run: Run) -> bool:
        return (
            run.verdict in self.verdicts
            and parse_release(run.trl) in ReleaseRange(self.trl)
            and re.fullmatch(self.case, run.case) is not None
            and re.search(self.error, f"{run.error}\n{run.note}") is not None
            and self.stock in (None, run.stock)
        )


ERROR = frozenset({"error"})
WRONG = frozenset({"wrong"})

REASONS: tuple[Reason, ...] = (
    Reason(
        "TRL imports `GuidedDecodingParams`, which vLLM took out in 0.12. Cured by the patch `guided_decoding`.",
        "https://github.com/huggingface/trl/issues/4617",
        ERROR,
        error="GuidedDecodingParams",
        trl=">=0.18,<0.27",
    ),
    Reason(
        "TRL imports `GuidedDecodingParams`, which vLLM took out in 0.12. Cured by the patch `guided_decoding`. (Of "
        "TRL's message the runs kept the first line; the cause is that of the same import with the same versions.)",
        "https://github.com/huggingface/trl/issues/4617",
        ERROR,
        error="Failed to import trl.trainer.grpo_trainer",
        trl=">=0.18,<0.26",
        stock=True,
    ),
    Reason(
        "`import trl` imports `vllm.transformers_utils.tokenizer`, which vLLM moved in 0.12. Cured by the patch "
        "`vllm_tokenizer`.",
        "https://github.com/vllm-project/vllm/pull/29793",
        ERROR,
        error=r"vllm\.transformers_utils\.tokenizer",
        trl=">=0.26,<0.27",
    ),
    Reason(
        "TRL takes `(False, None)`, which transformers 5.3 and newer return for a package that is not installed, for "
        "true, and imports it. Cured by the patch `package_checks`.",
        "https://github.com/modelscope/ms-swift/pull/9770",
        ERROR,
        error="No module named '(vllm_ascend|mergekit|weave|llm_blender|joblib|deepspeed)'",
        trl=">=0.18,<0.29",
    ),
    Reason(
        "With sleep on, OnlineDPO pushes the policy once a step and discards the weights after every rollout: later "
        "micro-batches sample from discarded weights. Cured by the patch `sleep`.",
        "https://github.com/huggingface/trl/blob/v1.16.0/trl/experimental/online_dpo/online_dpo_trainer.py",
        WRONG,
        case="online_dpo-.*",
        trl=">=0.28",
        stock=True,
    ),
    Reason(
        "With sleep on, TRL pushes the policy once a step and discards the weights after every rollout: later "
        "micro-batches and evaluation batches sample from discarded weights. Cured by the patch `sleep`.",
        "https://github.com/vllm-project/vllm/issues/29341",
        WRONG,
        trl=">=0.25,<0.26",
        stock=True,
    ),
    Reason(
        "With sleep on, TRL fetches the checkpoint from disk on waking, over the policy that it has pushed. Cured by "
        "the patch `sleep`; TRL mended it in 1.10.",
        "https://github.com/huggingface/trl/issues/5312",
        WRONG,
        trl=">=0.26,<1.10",
        stock=True,
    ),
    Reason(
        "With sleep on, TRL pushes the policy into memory that is not mapped, before it wakes the engine. Cured by "
        "the patch `sleep`.",
        "https://github.com/huggingface/trl/issues/5312",
        ERROR,
        error="CUDA error|device-side assert|illegal memory access",
        trl=">=0.28,<0.29",
        stock=True,
    ),
    Reason(
        "OnlineDPO below 0.28 asks transformers' trainer for `use_apex` (up to 0.23) and `_nested_gather`, which "
        "version 5 does not have. Cured after this run by the patch `trainer_parts`; not run on a GPU since, on a CPU "
        "these releases pass with transformers 5.23.",
        "https://github.com/huggingface/trl/pull/4139",
        ERROR,
        error="has no attribute '(use_apex|_nested_gather)'",
        case="online_dpo-.*",
        trl=">=0.18,<0.28",
    ),
    Reason(
        "GFPO of these releases unpacks five of the seven values that GRPO gives it: it cannot train, with vLLM or "
        "without. Not cured: its own file is not patched. TRL mended it in 1.1.",
        "https://github.com/huggingface/trl/blob/v1.0.0/trl/experimental/gfpo/gfpo_trainer.py",
        ERROR,
        error="too many values to unpack",
        case="gfpo-.*",
        trl=">=0.26,<1.1",
    ),
    Reason(
        "torch 2.11 fails to compile the loss of liger-kernel 0.8.5, which trlpatch does not touch; uncompiled it "
        "trains (tests/cpu/test_liger.py). TRL 1.13 dropped this loss; 1.16 ran with Liger's layers.",
        "https://github.com/linkedin/Liger-Kernel/issues/174",
        ERROR,
        error="torch._dynamo.exc",
        case="grpo-liger",
    ),
)


def reason_of(run: Run) -> Reason | None:
    """Return the first reason that explains a run that is not green; None for a green run or an unknown reason."""
    return next((reason for reason in REASONS if reason.explains(run)), None)
