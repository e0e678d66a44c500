from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
vllm = pytest.importorskip("vllm")

import trlpatch  # noqa: E402
from trlpatch import hooks  # noqa: E402
from trlpatch.errors import ProtectedSamplingParam, UnusableSamplingParam  # noqa: E402
from trlpatch.options import Options, activate  # noqa: E402

pytestmark = pytest.mark.cpu


@dataclass
class GRPOConfig:
    temperature: float = 1.0
    vllm_sampling_params: Any = None

    def __post_init__(self) -> None:
        hooks.normalize_sampling(self)


class OnlineDPOConfig(GRPOConfig):
    pass


def test_parameters_remember_what_was_given() -> None:
    params = trlpatch.vLLMSamplingParams(temperature=1.0, stop=["x"], seed=3)
    assert isinstance(params, vllm.SamplingParams)
    for twin in (params, pickle.loads(pickle.dumps(params)), copy.deepcopy(params), copy.copy(params), params.clone()):
        assert twin._set_kwargs == {"temperature": 1.0, "stop": ["x"], "seed": 3}
        assert twin == params
    changed = params.clone()
    changed.max_tokens = 99
    assert changed.clone().max_tokens == 99
    with pytest.raises(TypeError, match="temprature"):
        trlpatch.vLLMSamplingParams(temprature=1.0)


@pytest.mark.parametrize(
    ("given", "values"),
    [
        (None, None),
        ({}, {}),
        ({"min_p": 0.1}, {"min_p": 0.1}),
        ('{"min_p": 0.1}', {"min_p": 0.1}),
        (lambda: trlpatch.vLLMSamplingParams(temperature=1.0, stop=["x"]), {"temperature": 1.0, "stop": ["x"]}),
        ({"stop_token_ids": {3}}, {"stop_token_ids": [3]}),
        (
            lambda: trlpatch.vLLMSamplingParams(
                structured_outputs=vllm.sampling_params.StructuredOutputsParams(regex="a+")
            ),
            {"structured_outputs": {"regex": "a+"}},
        ),
    ],
)
def test_configs_hold_plain_values(given: Any, values: Any) -> None:
    config = GRPOConfig(vllm_sampling_params=given() if callable(given) else given)
    assert config.vllm_sampling_params == values
    hooks.normalize_sampling(config)
    assert config.vllm_sampling_params == values
    assert json.loads(json.dumps(config.vllm_sampling_params)) == values


def test_a_plain_sampling_params_is_read_against_the_defaults(caplog: pytest.LogCaptureFixture) -> None:
    config = GRPOConfig(vllm_sampling_params=vllm.SamplingParams(temperature=0.5, min_p=0.1, stop="x"))
    assert config.vllm_sampling_params == {"temperature": 0.5, "min_p": 0.1, "stop": ["x"]}
    assert "does not say which values you gave" in caplog.text
    with pytest.raises(ProtectedSamplingParam, match="'n'"):
        GRPOConfig(vllm_sampling_params=vllm.SamplingParams(n=2))


@pytest.mark.parametrize(
    "name", ["n", "logprobs", "prompt_logprobs", "detokenize", "truncate_prompt_tokens", "output_kind"]
)
def test_structural_values_belong_to_trl(name: str) -> None:
    with pytest.raises(ProtectedSamplingParam, match=f"sets '{name}', which belongs to TRL"):
        GRPOConfig(vllm_sampling_params={name: 1})
    args = SimpleNamespace(vllm_sampling_params={name: 1})
    with pytest.raises(ProtectedSamplingParam):
        hooks.sampling_params(args, dict)


@pytest.mark.parametrize("seed", [0, 3407])
def test_one_seed_for_all_completions_is_refused(seed: int) -> None:
    for given in ({"seed": seed}, trlpatch.vLLMSamplingParams(seed=seed), vllm.SamplingParams(seed=seed)):
        with pytest.raises(ProtectedSamplingParam, match=rf"sets seed={seed}: .* nothing would be learned"):
            GRPOConfig(vllm_sampling_params=given)
    args = SimpleNamespace(vllm_sampling_params={"seed": seed})
    with pytest.raises(ProtectedSamplingParam, match="nothing would be learned"):
        hooks.sampling_params(args, dict)


def test_compat_leaves_a_seed_out_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    activate(Options(compat="on"))
    config = GRPOConfig(vllm_sampling_params=trlpatch.vLLMSamplingParams(seed=3407, min_p=0.1))
    assert config.vllm_sampling_params == {"min_p": 0.1}
    later = SimpleNamespace(vllm_sampling_params=trlpatch.vLLMSamplingParams(seed=1, top_k=3))
    assert hooks.sampling_params(later, dict)() == {"top_k": 3}
    assert caplog.text.count('sets seed=3407, which compat="on" leaves out: vLLM would seed every request') == 1
    assert "sets seed=1, which" in caplog.text


def test_max_tokens_belongs_to_trainers_that_pad_by_it() -> None:
    assert GRPOConfig(vllm_sampling_params={"max_tokens": 5}).vllm_sampling_params == {"max_tokens": 5}
    with pytest.raises(ProtectedSamplingParam, match="max_tokens"):
        OnlineDPOConfig(vllm_sampling_params={"max_tokens": 5})


@pytest.mark.parametrize("given", [3, ["min_p"], "min_p", "[1]", {"logits_processors": [print]}, {"seed": object()}])
def test_what_is_not_a_set_of_json_values(given: Any) -> None:
    with pytest.raises(UnusableSamplingParam, match=r"GRPOConfig\.vllm_sampling_params"):
        GRPOConfig(vllm_sampling_params=given)


def test_given_values_win_and_the_rest_stays_trls() -> None:
    args = GRPOConfig(vllm_sampling_params=trlpatch.vLLMSamplingParams(top_k=5, stop=["x"], seed=None))
    trainer = SimpleNamespace(args=args)
    for owner in (args, trainer):
        made = hooks.sampling_params(owner, vllm.SamplingParams)(n=2, top_k=50, seed=7, max_tokens=9)
        assert (made.n, made.top_k, made.seed, made.max_tokens, made.stop) == (2, 5, None, 9, ["x"])


def test_without_given_values_it_is_trls_own_class() -> None:
    for owner in (GRPOConfig(), SimpleNamespace(args=GRPOConfig()), SimpleNamespace(args=SimpleNamespace()), object()):
        assert hooks.sampling_params(owner, vllm.SamplingParams) is vllm.SamplingParams


def test_structured_outputs_are_rebuilt() -> None:
    args = GRPOConfig(vllm_sampling_params={"structured_outputs": {"regex": "a+"}})
    made = hooks.sampling_params(args, vllm.SamplingParams)()
    assert made.structured_outputs == vllm.sampling_params.StructuredOutputsParams(regex="a+")


def below_0_24(**given: Any) -> Any:
    args = SimpleNamespace(generation_kwargs=given.pop("generation_kwargs", None), vllm_sampling_params=given or None)
    words = SimpleNamespace(eos_token_id=2, eos_token="</s>")
    return type("GRPOTrainer", (), {"args": args, "processing_class": words})()


@pytest.mark.parametrize(
    "given", [{"stop": ["</s>", "x"]}, {"stop": "x"}, {"stop_token_ids": [5]}, {"stop_token_ids": [2, 5]}]
)
def test_below_0_24_a_stop_that_trl_does_not_see_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ProtectedSamplingParam, match="would train on the padding"):
        hooks.sampling_params(below_0_24(**given), dict)
    own = type("RLOOTrainer", (type(below_0_24(**given)),), {"_generate_single_turn": None})()
    assert hooks.sampling_params(own, dict)(n=1) == {"n": 1, **given}, "0.24 masks by length"
    other = type("OnlineDPOTrainer", (), {"args": below_0_24(**given).args})()
    assert hooks.sampling_params(other, dict)() == given, "OnlineDPO puts EOS behind the stop itself"


@pytest.mark.parametrize(
    "given",
    [{"stop_token_ids": [2], "stop": []}, {"stop": ["</s>"]}, {"stop": "</s>", "include_stop_str_in_output": True}],
)
def test_below_0_24_eos_may_be_named_as_a_stop(given: dict[str, Any]) -> None:
    assert hooks.sampling_params(below_0_24(**given), dict)() == given


def spelled(vocabulary: dict[str, int]) -> Any:
    """A tokenizer with EOS "</s>" (2) that encodes a text as the longest pieces it knows, else as unknown (0)."""

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        ids = []
        while text:
            piece = max((one for one in vocabulary if text.startswith(one)), key=len, default=text[0])
            ids.append(vocabulary.get(piece, 0))
            text = text[len(piece) :]
        return ids

    return SimpleNamespace(eos_token="</s>", eos_token_id=2, encode=encode)


@pytest.mark.parametrize("stop", ["</s>", ["</s>"], ["\n</s>"], ["<|end|>"], ["</s>", "<|end|>"]])
@pytest.mark.parametrize("in_a_processor", [False, True])
def test_below_0_24_a_stop_string_that_ends_in_an_eos_is_eos(stop: Any, in_a_processor: bool) -> None:
    trainer = below_0_24(stop=stop, include_stop_str_in_output=True)
    words = spelled({"</s>": 2, "<|end|>": 7, "x": 5})
    trainer.processing_class = SimpleNamespace(tokenizer=words) if in_a_processor else words
    trainer.model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[2, 7]))
    assert hooks.sampling_params(trainer, dict)()["stop"] == stop


@pytest.mark.parametrize("stop", ["x", "</s>x", ["</s>", "x"], "<|end|>"])
def test_below_0_24_a_stop_string_that_ends_otherwise_is_refused(stop: Any) -> None:
    trainer = below_0_24(stop=stop)
    trainer.processing_class = spelled({"</s>": 2, "<|end|>": 7, "x": 5})
    trainer.model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=2))
    with pytest.raises(ProtectedSamplingParam, match="would train on the padding"):
        hooks.sampling_params(trainer, dict)


def test_below_0_24_a_stop_among_trls_own_arguments_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert hooks.sampling_params(below_0_24(generation_kwargs={"stop_token_ids": [2]}), dict) is dict
    assert "padding" not in caplog.text
    assert hooks.sampling_params(below_0_24(generation_kwargs={"stop": ["x"]}), dict) is dict
    assert "generation_kwargs sets stop=['x']" in caplog.text
