"""Compare logits: a short prompt through the engine and through the trainer's model, both without an adapter.

Nothing of it stays: every prompt ends within one block of the KV cache, and vLLM's prefix cache keeps whole blocks;
the one token that each is completed with is the likeliest, for which no random number is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trlpatch.engine import probes
from trlpatch.engine.protocols import RolloutEngine
from trlpatch.errors import EngineMismatch
from trlpatch.policy.adapter import base_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

PROMPT_TOKENS = 32
_SHORTEST = 8
"""Tokens of a prompt, for engines whose blocks are shorter."""

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
    default prompts are 32 tokens or a few more, spread over the vocabulary. The engine must be awake and idle.

    Raises:
        EngineMismatch: they are above 0.02 (both float32) or 0.1 (one of them bfloat16 or float16).
    """
    prompts = [list(prompt_ids)] if prompt_ids is not None else check_prompts(model, llm)
    return compare_logprobs(model, llm, prompts, [model_logprobs(model, ids) for ids in prompts])


def compare_logprobs(model: Any, llm: RolloutEngine, prompts: list[list[int]], logprobs: list[Tensor]) -> float:
    """As `compare_logits`, for log-probabilities of the model that are known.

    Raises:
        EngineMismatch: as there.
    """
    largest = 0.0
    # Engines on other devices stand as one: each is compared. In a loop: the closure of a generator would hold the
    # model, and outlives the frames that a load drops when it fails (`build.forget_frames`).
    for one in getattr(llm, "replicas", None) or [llm]:
        largest = max(largest, _compared(model, one, prompts, logprobs))
    return largest


def _compared(model: Any, llm: RolloutEngine, prompts: list[list[int]], logprobs: list[Tensor]) -> float:
    import torch

    theirs = _engine_logprobs(llm, prompts)
    errors, spreads = [], []
    for ids, own, engine in zip(prompts, logprobs, theirs, strict=True):
        picked = own.gather(1, torch.tensor(ids[1:], device=own.device)[:, None]).squeeze(1)
        errors.append((picked - torch.tensor(engine, device=picked.device, dtype=picked.dtype)).abs())
        spreads.append(own.std(dim=1))
    found = float(torch.cat(errors).mean() / torch.cat(spreads).mean())
    dtypes = sorted({str(getattr(probes.model_config(llm), "dtype", None)), str(model.dtype)})
    limit = max(TOLERANCE.get(dtype, HALF_TOLERANCE) for dtype in dtypes)
    if not found <= limit:  # not a number is no agreement
        raise EngineMismatch(
            f"comparing the engine's log-probabilities with {type(model).__name__}'s on {sum(map(len, prompts))} "
            f"tokens: they differ by {found:.3g} standard deviations of the log-probabilities, expected at most "
            f"{limit} for {' and '.join(dtypes)}; engine and trainer do not compute the same function"
            f"{_untied(model)}: check that both come from one checkpoint and revision"
        )
    return found


def _untied(model: Any) -> str:
    """What is said of a head that the config ties and transformers does not.

    transformers 5 loads such a checkpoint as two tensors, with a warning; vLLM 0.28 samples from the embeddings.
    """
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if not tied or head is None or head.weight is words.weight:
        return ""
    return (
        " (the model's config has tie_word_embeddings=True, and its head is not its embeddings, which an engine that "
        "goes by the config computes with; set it in the checkpoint's config.json to what was trained)"
    )


def check_prompts(model: PreTrainedModel, llm: RolloutEngine) -> list[list[int]]:
    """Different tokens from all over the vocabulary, the same on every call; none that stands for an image."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    places = _placeholders(model.config.to_dict())
    block = probes.kv_block_size(llm) or PROMPT_TOKENS
    longest = probes.max_model_len(llm) or PROMPT_TOKENS + 1
    length = min(PROMPT_TOKENS, max(block - 1, _SHORTEST), longest - 1)
    count = -(-PROMPT_TOKENS // length)
    spread = ((index * 2_654_435_761 + 12_345) % vocabulary for index in range(4 * count * length))
    ids = [one for one in spread if one not in places][: count * length]
    return [ids[start : start + length] for start in range(0, len(ids), length)]


def _placeholders(config: dict[str, Any]) -> set[int]:
    """Tokens that a configuration has under a name of their own: image_token_id, audio_token_index, ..."""
    found: set[int] = set()
    for name, value in config.items():
        if isinstance(value, dict):
            found |= _placeholders(value)
        elif isinstance(value, int) and name.endswith(("_token_id", "_token_index")):
            found.add(value)
    return found


def model_logprobs(model: Any, ids: list[int]) -> Tensor:
    """Log-probabilities of the base model after each token but the last: [len(ids) - 1, vocabulary], float32."""
    import torch

    base = base_of(model)
    training = [module for module in base.modules() if module.training]
    base.eval()
    try:
        with torch.no_grad(), _without_adapters(base):
            logits = base(input_ids=torch.tensor([ids], device=base.device), use_cache=False).logits
    finally:
        for module in training:  # a frozen part may be in another mode than the whole
            module.training = True
    return torch.log_softmax(logits[0, :-1].float(), dim=-1)


@contextmanager
def _without_adapters(base: Module) -> Iterator[None]:
    """PEFT's own `disable_adapter()` leaves an adapter trainable that was loaded frozen, and enabled that was not."""
    layers: list[Any] = [module for module in base.modules() if hasattr(module, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def _engine_logprobs(llm: RolloutEngine, prompts: list[list[int]]) -> list[list[float]]:
    """The engine's log-probability of each token but the first of its prompt."""
    import torch
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):  # an engine of this process draws from torch's own generators
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling_params=params, use_tqdm=False)
    found = []
    for ids, output in zip(prompts, outputs, strict=True):
        steps = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        found.append([float(step[token].logprob) for token, step in steps])
    return found
