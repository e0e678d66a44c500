"""What llama.cpp computes otherwise is found in the settings, before a tensor is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trlpatch.errors import CannotExport
from trlpatch.export.gguf.checks import ACCEPTED, Finding, findings
from trlpatch.export.gguf.export import _judged

QWEN = {"architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "max_position_embeddings": 512, "vocab_size": 4}
TOKENIZER: dict[str, Any] = {
    "model": {"vocab": {"a": 0, "b": 1}},
    "added_tokens": [{"content": "<eos>", "id": 2}, {"content": "<end>", "id": 3}],
}
SHAPES = {"model.embed_tokens.weight": (4, 8)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "config.json", QWEN)
    write(tmp_path, "tokenizer.json", TOKENIZER)
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<eos>", "chat_template": "{{ messages }}"})
    write(tmp_path, "generation_config.json", {"eos_token_id": 2})
    return tmp_path


def write(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def found(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Finding]:
    write(folder, "config.json", {**QWEN, **config})
    return {one.name: one for one in findings(folder, shapes)}


def test_an_ordinary_model_has_none(folder: Path) -> None:
    assert found(folder, {}) == {}


WINDOW = {"sliding_window": 16, "use_sliding_window": True, "layer_types": ["sliding_attention"]}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (WINDOW, "sliding_window"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 16}, "sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"architectures": ["LlamaForCausalLM"], "hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": False}, "norm_topk_prob"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "norm_topk_prob"),  # the default of its config class
        ({"architectures": ["OlmoeForCausalLM"], "norm_topk_prob": True}, "norm_topk_prob"),
    ],
)
def test_what_is_computed_otherwise(folder: Path, config: dict[str, Any], name: str) -> None:
    (one,) = found(folder, config).values()
    assert (one.name, one.wrong) == (name, True)


@pytest.mark.parametrize(
    "config",
    [
        {**WINDOW, "use_sliding_window": False},
        {**WINDOW, "layer_types": ["full_attention"]},
        {"architectures": ["MistralForCausalLM"], "sliding_window": None},
        {"architectures": ["MistralForCausalLM"], "sliding_window": 512},  # as long as the longest input
        {"architectures": ["Gemma2ForCausalLM"], "sliding_window": 16, "hidden_activation": "gelu_pytorch_tanh"},
        {"architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True},
        {"architectures": ["NobodyKnowsForCausalLM"], "hidden_act": "relu"},
    ],
)
def test_what_is_computed_alike(folder: Path, config: dict[str, Any]) -> None:
    if config.get("architectures") == ["Gemma2ForCausalLM"]:
        config = {**config, "hidden_act": None}
    assert found(folder, config) == {}


def test_a_tokenizer_longer_than_the_embedding(folder: Path) -> None:
    one = found(folder, {}, {"model.embed_tokens.weight": (3, 8)})["tokenizer_length"]
    assert one.wrong
    assert "4 tokens and the embedding 3 rows" in one.text


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert found(folder, {})["tokenizer"].wrong


def test_ends_that_a_gguf_does_not_carry(folder: Path) -> None:
    write(folder, "generation_config.json", {"eos_token_id": [2, 3]})
    one = found(folder, {})["eos_token_id"]
    assert not one.wrong
    assert "3 ('<end>')" in one.text
    write(folder, "generation_config.json", {"eos_token_id": 3})
    assert "3 ('<end>')" in found(folder, {})["eos_token_id"].text


def test_no_chat_template(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"eos_token": {"content": "<eos>"}})
    assert not found(folder, {})["chat_template"].wrong
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert found(folder, {}) == {}


def test_text_models_inside_others_are_looked_at(folder: Path) -> None:
    assert "hidden_act" in found(folder, {"text_config": {"hidden_act": "relu"}})


WRONG, LATE = Finding("hidden_act", "it computes gelu", wrong=True), Finding("tokenizer", "there is none", wrong=True)


def test_what_is_wrong_is_refused_unless_it_is_accepted_by_name() -> None:
    with pytest.raises(CannotExport, match=r"(?s)exporting it as GGUF.*- it computes gelu\n.*accept=\['hidden_act'\]"):
        _judged([WRONG], (), "it")
    assert _judged([WRONG], ["hidden_act"], "it") == _judged([WRONG], "hidden_act", "it") == ["it computes gelu"]
    with pytest.raises(CannotExport, match="there is none") as caught:
        _judged([WRONG, LATE], ["hidden_act"], "it")
    assert "accept" not in str(caught.value)


def test_an_unknown_name_in_accept_is_an_error() -> None:
    with pytest.raises(CannotExport, match=f"expected names among {', '.join(ACCEPTED)}, found 'window'"):
        _judged([], ["sliding_window", "window"], "it")
