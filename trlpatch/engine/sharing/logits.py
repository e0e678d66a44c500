"""Compare logits: one short prompt through the engine and through the trainer's model."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trlpatch.engine import probes
from trlpatch.engine.protocols import RolloutEngine
from trlpatch.errors import EngineMismatch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PROMPT_TOKENS = 32

TOLERANCE = {"torch.float32": 0.02}
HALF_TOLERANCE = 0.1
"""Largest answers of `compare_logits` that rounding explains.

Measured with random weights on a CPU, 4 to 36 layers of Qwen2, Qwen3, Gemma 2, Gemma 3 and Phi-3: at most 0.017 in
bfloat16 and 1e-5 in float32; at least 0.18 with one layer's down_proj taken from another layer, 0.66 with a whole one.
"""


def compare_logits(model: PreTrainedModel, llm: RolloutEngine, *, prompt_ids: Sequence[int] | None = None) -> float:
    """How far the engine's log-probabilities of a prompt are from the model's, base weights only.

    The mean absolute difference over the prompt's tokens, in units of the standard deviation of log-probabilities
    over the vocabulary: nats alone say nothing, since a random-weight model is nearly indifferent between tokens. The
    default prompt is 32 tokens spread over the vocabulary. The engine must be awake.

    Raises:
        EngineMismatch: they are above 0.02 (float32) or 0.1 (bfloat16 and float16).
    """
    import torch

    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = list(prompt_ids) if prompt_ids is not None else _prompt(vocabulary, probes.max_model_len(llm))
    logprobs = _model_logprobs(model, ids)
    picked = logprobs.gather(1, torch.tensor(ids[1:], device=logprobs.device)[:, None]).squeeze(1)
    engine = torch.tensor(_engine_logprobs(llm, ids), device=picked.device, dtype=picked.dtype)
    found = float((picked - engine).abs().mean() / logprobs.std(dim=1).mean())
    dtype = str(getattr(probes.model_config(llm), "dtype", None))
    limit = TOLERANCE.get(dtype, HALF_TOLERANCE)
    if not found <= limit:  # not a number is no agreement
        raise EngineMismatch(
            f"comparing the engine's log-probabilities with {type(model).__name__}'s on {len(ids)} tokens: they "
            f"differ by {found:.3g} standard deviations of the log-probabilities, expected at most {limit} for "
            f"{dtype}; engine and trainer do not compute the same function: check that both come from one checkpoint "
            "and revision"
        )
    return found


def _prompt(vocabulary: int, longest: int | None) -> list[int]:
    """Different tokens from all over the vocabulary, the same on every call."""
    count = min(PROMPT_TOKENS, (longest or PROMPT_TOKENS) - 1)
    return [(index * 2_654_435_761 + 12_345) % vocabulary for index in range(count)]


def _model_logprobs(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Log-probabilities after each token but the last: [len(ids) - 1, vocabulary], float32."""
    import torch

    disable_adapter = getattr(model, "disable_adapter", contextlib.nullcontext)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), disable_adapter():
            logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
    finally:
        model.train(was_training)
    return torch.log_softmax(logits[0, :-1].float(), dim=-1)


def _engine_logprobs(llm: RolloutEngine, ids: list[int]) -> list[float]:
    """The engine's log-probability of each token but the first."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": ids}], sampling_params=params, use_tqdm=False)
    steps = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    return [float(step[token].logprob) for token, step in steps]
