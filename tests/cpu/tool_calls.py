"""Train with tools on an attached engine, and score every turn anew with the request that it was sampled with.

    python -m tests.cpu.tool_calls OUT.json

In a process of its own; the TRL release is the one that can be imported.
"""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cpu.small_grpo import small_grpo
from tests.cpu.training import count_engines
from tests.words import byte_tokenizer
from trlpatch.engine.state import state_of
from trlpatch.source.locate import find_trl

CALL = r'<tool_call>\n\{"name": "multiply", "arguments": \{"a": [0-9], "b": [0-9]\}\}\n</tool_call>'
"""Every turn is a call: a model that knows nothing would never make one."""

_called: list[tuple[int, int]] = []


def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The product of the two integers.
    """
    _called.append((a, b))
    return a * b


def main(out: Path) -> None:
    from datasets import Dataset

    import trlpatch

    trlpatch.PatchFastRL("grpo")
    words = talking_tokenizer()
    sizes = {"vocab_size": len(words), "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    checkpoint = tiny.checkpoint(out.parent / "model", max_position_embeddings=1024, **sizes)
    words.save_pretrained(checkpoint)
    engine = tiny.engine(checkpoint, max_model_len=1024)
    built = count_engines()
    policy = trlpatch.attach_engine(tiny.policy(checkpoint), engine)
    questions = [[{"role": "user", "content": f"What is {a} times {a + 1}?"}] for a in range(8)]
    trainer = small_grpo(
        policy,
        out.parent,
        config={
            "max_completion_length": 200,
            "max_tool_calling_iterations": 2,
            "vllm_guided_decoding_regex": CALL,
            "vllm_structured_outputs_regex": CALL,
            # Its ratio would compare the log-probabilities of a masked distribution with those of the whole one.
            "vllm_importance_sampling_correction": False,
        },
        tools=[multiply],
        train_dataset=Dataset.from_dict({"prompt": questions}),
        processing_class=words,
    )
    turns = Turns(trainer, engine, words)
    trainer.train()
    out.write_text(json.dumps({"turns": turns.found, "called": _called, "engines_built": len(built)}, indent=1))


def talking_tokenizer() -> Any:
    """A tokenizer with the chat template of Qwen3, which every TRL release knows how to parse."""
    from trl.chat_template_utils import qwen3_chat_template

    words = byte_tokenizer([qwen3_chat_template, CALL] * 20, vocabulary=1024)
    words.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    words.chat_template = qwen3_chat_template
    if find_trl().release < (1, 8):
        # These parse with `response_schema`, which transformers 5.23 does not read any more.
        words.parse_response = lambda ids, **_: parsed(words.decode(ids))
    return words


def parsed(text: str) -> dict[str, Any]:
    """What the answer of a model says, as a message."""
    call = re.search(CALL.replace("[0-9]", "([0-9])"), text)
    if call is None:
        return {"role": "assistant", "content": text}
    function = {"name": "multiply", "arguments": {"a": int(call[1]), "b": int(call[2])}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


class Turns:
    """Watches an engine's rollouts and scores each again, without the mask of the regular expression."""

    def __init__(self, trainer: Any, engine: Any, words: Any) -> None:
        self.found: list[dict[str, Any]] = []
        self._trainer = trainer
        self._words = words
        self._state = state_of(engine)
        self._generate, self._chat = engine.generate, engine.chat
        engine.generate = lambda *args, **named: self._noted(self._generate, *args, **named)
        engine.chat = lambda *args, **named: self._noted(self._chat, *args, **named)

    def _noted(self, roll_out: Any, *arguments: Any, **named: Any) -> Any:
        outputs = roll_out(*arguments, **named)
        request = named.get("lora_request")
        texts = [output.outputs[0].text for output in outputs]
        prompts = [self._words.decode(output.prompt_token_ids) for output in outputs]
        self.found.append(
            {
                "step": self._trainer.state.global_step,
                "adapter": None if request is None else request.lora_name,
                "gap": self._gap(outputs, request),
                "control": self._gap(outputs, None),
                "texts": texts,
                "answered": sum("<tool_response>" in prompt for prompt in prompts),
            }
        )
        return outputs

    def _gap(self, outputs: list[Any], request: Any) -> float:
        guard, self._state.bare_request = self._state.bare_request, None  # it would give the control the adapter
        try:
            return rescored_gap(self._generate, self._trainer.model, outputs, request)
        finally:
            self._state.bare_request = guard


def rescored_gap(generate: Callable[..., Any], model: Any, outputs: list[Any], request: Any) -> float:
    """Largest difference of a token's log-probability between the engine with `request` and the training model.

    The engine scores the tokens anew, as a prompt, without the mask that they were sampled under.
    """
    import torch
    from vllm import SamplingParams

    whole = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    scored = generate([{"prompt_token_ids": ids} for ids in whole], params, lora_request=request, use_tqdm=False)
    gaps = []
    for output, again in zip(outputs, scored, strict=True):
        start = len(output.prompt_token_ids)
        tokens = output.outputs[0].token_ids
        theirs = torch.tensor(
            [step[token].logprob for step, token in zip(again.prompt_logprobs[start:], tokens, strict=True)]
        )
        ours = tiny.trainer_logprobs(model, output.prompt_token_ids, tokens)
        gaps.append(float((theirs - ours).abs().max()))
    return max(gaps)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
