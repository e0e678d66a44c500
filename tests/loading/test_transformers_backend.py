"""`fast_generate` without an engine explains what only vLLM takes."""

from __future__ import annotations

from typing import Any

import pytest

from trlpatch.errors import VllmStyleArguments
from trlpatch.loading.transformers_backend import explain_vllm_arguments


class SamplingParams:
    pass


@pytest.mark.parametrize(
    ("inputs", "kwargs", "says"),
    [
        (("a text",), {}, "text as prompts"),
        ((["a", "b"],), {}, "text as prompts"),
        (([{"prompt_token_ids": [1]}],), {}, "prompt dictionaries as prompts"),
        (([[1, 2]],), {}, "lists of token ids as prompts"),
        (([1, 2],), {}, "a list of token ids as prompts"),
        (([1, 2], SamplingParams()), {}, "SamplingParams"),
        ((), {"sampling_params": None}, r"sampling_params= \(instead: transformers' own arguments: max_new_tokens="),
        ((), {"lora_request": None}, r"lora_request= \(instead: nothing, since .*disable_adapter"),
        ((), {"max_tokens": 3}, r"max_tokens= \(instead: max_new_tokens="),
    ],
)
def test_the_way_of_vllm_is_explained(inputs: tuple[Any, ...], kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says) as raised:
        explain_vllm_arguments(inputs, kwargs)
    assert isinstance(raised.value, VllmStyleArguments)
    assert "tokenizer(texts, return_tensors='pt', padding=True)" in str(raised.value)
    assert "fast_inference=True" in str(raised.value)


@pytest.mark.parametrize("inputs", [(), (object(),)])
def test_the_way_of_transformers_passes(inputs: tuple[Any, ...]) -> None:
    explain_vllm_arguments(inputs, {"max_new_tokens": 3, "do_sample": True})
