"""The measure of a wrong rollout, and the reward that a random model can learn."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from typing import Any


def odd_tokens(*args: Any, completions: Any = None, completion_ids: Any = None, **_: Any) -> list[float]:
    """Reward odd token ids; where only texts are given, their odd characters serve as well."""
    if completion_ids is not None:
        return [sum(token % 2 for token in ids) / max(len(ids), 1) for ids in completion_ids]
    texts = completions if completions is not None else args[-1]
    return [sum(ord(character) % 2 for character in str(text)) / max(len(str(text)), 1) for text in texts]


def gap(model: Any, outputs: Any) -> float:
    """Mean difference, in nats, between the engine's and the model's log-probabilities of sampled tokens.

    `outputs` are vLLM's, sampled with `logprobs=0`.
    """
    import torch

    prompts = [len(output.prompt_token_ids) for output in outputs]
    rows = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs]
    width = max(map(len, rows))
    # Padding on the right needs no mask: no token sees what comes after it.
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda"):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    finally:
        model.train(was_training)
    trainer = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None]).squeeze(2).tolist()
    differences = []
    for output, start, row, logprobs in zip(outputs, prompts, rows, trainer, strict=True):
        completion = output.outputs[0]
        steps = zip(completion.logprobs, completion.token_ids, strict=True)
        engine = [step[token].logprob for step, token in steps]
        differences += [abs(a - b) for a, b in zip(engine, logprobs[start - 1 : len(row) - 1], strict=True)]
    return float(mean(differences))


def watch_rollouts(trainer: Any, engine: Any, gaps: list[float]) -> Callable[[], Any]:
    """Append the gap of every rollout; returns a function that stops watching."""
    generate = type(engine).generate

    def watched(prompts: Any, sampling_params: Any, **kwargs: Any) -> Any:
        # OnlineDPO and RLOO do not ask for log-probabilities; asking changes nothing that is sampled.
        sampling_params.logprobs = 0
        # OnlineDPO below 0.23 samples from the 50 likeliest tokens, whatever its config says: the engine's
        # log-probabilities would be those of the truncated distribution.
        sampling_params.top_k = -1
        outputs = generate(engine, prompts, sampling_params, **kwargs)
        gaps.append(gap(trainer.model, outputs))
        return outputs

    engine.generate = watched
    return lambda: engine.__dict__.pop("generate", None)
