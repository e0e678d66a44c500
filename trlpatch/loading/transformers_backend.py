"""Generation with transformers: the methods of a model with an engine, on a model without one."""

from __future__ import annotations

import os
import types
from collections.abc import Mapping
from typing import Any

from trlpatch.engine.attach import save_lora
from trlpatch.errors import EngineError, VllmStyleArguments
from trlpatch.policy.adapter import base_of

_HOW = (
    "inputs = tokenizer(texts, return_tensors='pt', padding=True).to(model.device); "
    "tokenizer.batch_decode(model.fast_generate(**inputs, max_new_tokens=256))"
)
_INSTEAD = {
    "sampling_params": "transformers' own arguments: max_new_tokens=, temperature=, top_p=, do_sample=True",
    "lora_request": "nothing, since the model generates with the adapter it has (`with model.disable_adapter():` for "
    "the base model)",
    "use_tqdm": "nothing",
    "max_tokens": "max_new_tokens=",
    "prompts": "input_ids= and attention_mask=",
}


def without_engine(model: Any) -> Any:
    """Give a model `fast_generate`, `load_lora` and `save_lora` that work with transformers and PEFT alone."""
    base = base_of(model)
    base.fast_generate = types.MethodType(_fast_generate, base)
    base.load_lora = types.MethodType(_load_lora, base)
    base.save_lora = types.MethodType(save_lora, base)
    return model


def explain_vllm_arguments(inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise VllmStyleArguments for what only vLLM's `generate` understands: text, token lists, its keywords."""
    given = [f"{name}= (instead: {_INSTEAD[name]})" for name in _INSTEAD if name in kwargs]
    for prompt in inputs[:1]:
        items = [prompt] if isinstance(prompt, (str, Mapping)) and not hasattr(prompt, "input_ids") else prompt
        if isinstance(items, (list, tuple)) and items and isinstance(items[0], (str, Mapping, list, int)):
            given.insert(0, f"{_kind(items[0])} as prompts")
    if len(inputs) > 1 and type(inputs[1]).__name__.endswith("SamplingParams"):
        given.append(f"SamplingParams (instead: {_INSTEAD['sampling_params']})")
    if given:
        raise VllmStyleArguments(
            f"model.fast_generate: this model was loaded with fast_inference=False and generates with transformers, "
            f"which does not take {', '.join(given)}. Call it as transformers' generate: {_HOW}. Or load the model "
            "with fast_inference=True"
        )


def _kind(item: object) -> str:
    return {str: "text", int: "a list of token ids", list: "lists of token ids"}.get(type(item), "prompt dictionaries")


def _fast_generate(self: Any, *inputs: Any, **kwargs: Any) -> Any:
    """Transformers' `generate`, in evaluation mode, with the adapter if there is one."""
    explain_vllm_arguments(inputs, kwargs)
    was_training = self.training
    self.eval()
    try:
        return self.generate(*inputs, **kwargs)
    finally:
        self.train(was_training)


def _load_lora(self: Any, name: str | os.PathLike[str] | None = None, load_tensors: bool | None = None) -> Any:
    """There is no engine to send a request to."""
    raise EngineError(
        f"model.load_lora({name!r}): this model was loaded with fast_inference=False, and a LoRARequest is for a vLLM "
        "engine. For an adapter from a directory: model.load_adapter(directory, adapter_name='other') of PEFT; the "
        "adapter in training needs no request"
    )
