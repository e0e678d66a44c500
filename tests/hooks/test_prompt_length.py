"""`max_prompt_length` where TRL does not follow it: ids that are cut, calls that cut, and vLLM's arguments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trlpatch import hooks
from trlpatch.errors import PromptTooLong
from trlpatch.hooks import prompt_length, repairs
from trlpatch.options import Options, activate


def test_ids_are_cut_from_the_left_and_what_is_said_of_each_token_alike():
    fields = {"token_type_ids": [[0, 0, 1], [1]], "scores": [1.0, 2.0], "names": ["a", "b"]}
    ids, images, cut = prompt_length.cut([[1, 2, 3], [4]], None, fields, limit=2)
    assert (ids, images) == ([[2, 3], [4]], None)
    assert cut == {"token_type_ids": [[0, 1], [1]], "scores": [1.0, 2.0], "names": ["a", "b"]}


def test_prompts_within_the_limit_are_left_alone():
    prompts = [[1, 2], [4]]
    assert prompt_length.cut(prompts, ["image", None], {"pixel_values": 1}, limit=2)[0] is prompts


@pytest.mark.parametrize(("images", "fields"), [(["image", None], {}), (None, {"pixel_values": 1})])
def test_a_prompt_with_images_cannot_be_cut(images, fields):
    with pytest.raises(PromptTooLong, match=r"max_prompt_length=2: .*has 3 tokens.*dataset\.filter"):
        prompt_length.cut([[1, 2, 3], [4]], images, fields, limit=2)


class Words:
    """A tokenizer that says how it was called."""

    truncation_side = "right"
    chat_template = "template"

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def __call__(self, **kwargs: Any) -> None:
        self.seen.append({**kwargs, "side": self.truncation_side})

    apply_chat_template = __call__


class Engine:
    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def generate(self, prompts: list[str], **kwargs: Any) -> None:
        self.seen.append(kwargs)

    chat = generate


@pytest.mark.parametrize("in_a_processor", [False, True])
def test_calls_of_the_tokenizer_cut_from_the_left_inside(in_a_processor):
    words = Words()
    if in_a_processor:
        words.tokenizer = SimpleNamespace(truncation_side="right")  # type: ignore[attr-defined]
    trainer = SimpleNamespace(processing_class=words, use_vllm=False)
    with prompt_length.cutting(trainer, 3):
        trainer.processing_class(text=["a"], padding=True)
        trainer.processing_class.apply_chat_template(conversation=[], tokenize=True)
        trainer.processing_class.apply_chat_template(conversation=[], tokenize=False)
        assert trainer.processing_class.chat_template == "template"
    side = "right" if in_a_processor else "left"
    limit = {"max_length": 3, "truncation": True, "side": side}
    assert words.seen == [
        {"text": ["a"], "padding": True, **limit},
        {"conversation": [], "tokenize": True, **limit},
        {"conversation": [], "tokenize": False, "side": "right"},
    ]
    assert trainer.processing_class is words
    assert words.truncation_side == "right"


@pytest.mark.parametrize("own", [False, True])
def test_an_engine_is_asked_to_cut_in_the_place_that_its_vllm_reads(monkeypatch, own):
    monkeypatch.setattr(repairs, "_sampling_params_truncate", lambda: False)
    monkeypatch.setattr(repairs.probes, "max_model_len", lambda engine: 8)
    engine = Engine()
    if own:  # a guard of the engine's own object
        engine.generate = engine.generate  # type: ignore[method-assign]
    before = dict(vars(engine))
    trainer = SimpleNamespace(processing_class=Words(), use_vllm=True, vllm_mode="colocate", llm=engine, args=None)
    with prompt_length.cutting(trainer, 3):
        assert hooks.sampling_params(trainer, dict)(n=1) == {"n": 1}
        engine.generate(["a"], use_tqdm=False)
        engine.chat(["a"])
    asked = {"tokenization_kwargs": {"truncate_prompt_tokens": 3}}
    assert engine.seen == [{"use_tqdm": False, **asked}, asked]
    assert vars(engine) == before
    assert hooks.sampling_params(trainer, dict) is dict


def test_sampling_params_carry_the_limit_where_they_have_the_field(monkeypatch):
    monkeypatch.setattr(repairs, "_sampling_params_truncate", lambda: True)
    engine = Engine()
    args = SimpleNamespace(vllm_sampling_params={"top_k": 5})
    trainer = SimpleNamespace(processing_class=Words(), use_vllm=True, llm=engine, args=args)
    with prompt_length.cutting(trainer, 3):
        assert hooks.sampling_params(trainer, dict)(n=1) == {"truncate_prompt_tokens": 3, "n": 1, "top_k": 5}
        assert "generate" not in vars(engine)


def test_a_server_is_told_of(caplog):
    trainer = SimpleNamespace(processing_class=Words(), use_vllm=True, vllm_mode="server")
    with prompt_length.cutting(trainer, 3):
        pass
    assert "max_prompt_length=3 has no effect on a vLLM server" in caplog.text


@pytest.mark.parametrize(
    ("compat", "fields", "expected"),
    [
        ("on", {"max_prompt_length": 3, "max_completion_length": 4, "vllm_max_model_length": None}, 7),
        ("on", {"max_prompt_length": 3, "max_completion_length": 4, "vllm_max_model_length": 5}, 5),
        ("on", {"max_prompt_length": None, "max_completion_length": 4, "vllm_max_model_length": None}, None),
        ("on", {"max_completion_length": 4, "vllm_max_model_length": None}, None),
        ("off", {"max_prompt_length": 3, "max_completion_length": 4, "vllm_max_model_length": None}, None),
    ],
)
def test_an_engine_that_trl_builds_is_as_long_as_prompt_and_completion(compat, fields, expected):
    activate(Options(compat=compat))
    args = SimpleNamespace(**fields)
    prompt_length.bound_model_length(args)
    assert args.vllm_max_model_length == expected
