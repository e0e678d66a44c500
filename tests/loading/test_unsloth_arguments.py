"""Arguments of Unsloth's `from_pretrained`: nothing asked for, followed, or refused in words. Needs no torch."""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from trlpatch import FastLanguageModel, FastModel, FastVisionModel, vLLMSamplingParams
from trlpatch.engine import build, sampling_params
from trlpatch.errors import ConflictingArguments, MissingPackage, UnknownArgument
from trlpatch.loading import load_config, loading
from trlpatch.loading.load_config import OF_THE_MODEL, OWN, LoadConfig, parse_arguments
from trlpatch.loading.unsloth_arguments import FOLLOWED, NEUTRAL
from trlpatch.options import Options, activate
from trlpatch.versions import vllm_missing

ROOT = Path(__file__).resolve().parents[2]

OF_UNSLOTH = {
    "model_name", "max_seq_length", "dtype", "load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning",
    "token", "device_map", "rope_scaling", "fix_tokenizer", "trust_remote_code", "use_gradient_checkpointing",
    "resize_model_vocab", "revision", "use_exact_model_name", "offload_embedding", "float32_mixed_precision",
    "fast_inference", "gpu_memory_utilization", "float8_kv_cache", "random_state", "max_lora_rank",
    "disable_log_stats", "qat_scheme", "load_in_fp8", "unsloth_tiled_mlp", "text_only", "return_logits",
    "fullgraph", "auto_model", "whisper_language", "whisper_task", "unsloth_force_compile", "target_parameters",
    "unsloth_vllm_standby", "tokenizer_name", "num_labels",
}  # fmt: skip
"""FastLanguageModel's, FastModel's and what they hand on, of August 2026."""


@pytest.fixture(autouse=True)
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_config, "check_packages", lambda config: None)
    monkeypatch.setattr(load_config, "engine_argument_names", lambda: frozenset({"seed", "max_logprobs", "tokenizer"}))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[LoadConfig]:
    """What `from_pretrained` would load, in place of loading it."""
    made: list[LoadConfig] = []
    monkeypatch.setattr(build, "random_state_kept", contextlib.nullcontext)
    monkeypatch.setattr(loading, "load", lambda config: made.append(config) or (None, None))
    return made


def ask(**changes: Any) -> LoadConfig:
    """As `from_pretrained(**changes)` parses them."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(FastLanguageModel.from_pretrained).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    given = frozenset(changes)
    named = {name: changes.pop(name, value) for name, value in defaults.items()}
    return parse_arguments(named, changes, given)


def test_every_name_of_unsloths_is_known() -> None:
    assert OWN | OF_THE_MODEL | NEUTRAL.keys() | FOLLOWED >= OF_UNSLOTH
    assert not NEUTRAL.keys() & (OWN | OF_THE_MODEL | FOLLOWED)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, neutral in NEUTRAL.items() for value in neutral.values],
)
def test_what_asks_for_nothing_changes_nothing(name: str, value: object) -> None:
    assert ask(**{name: value}) == ask()


@pytest.mark.parametrize(
    "given",
    [
        {"load_in_8bit": False, "load_in_16bit": False, "full_finetuning": False},
        {"random_state": None, "resize_model_vocab": None, "tokenizer_name": None, "torch_dtype": None},
        {"device_map": "sequential"},
        {"device_map": None},
        {"auto_model": None},
        {"auto_model": type("AutoModelForCausalLM", (), {})},
    ],
)
def test_so_do_the_defaults_of_what_is_followed(given: dict[str, Any]) -> None:
    assert ask(**given) == ask()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"offload_embedding": True}, "offload_embedding=True is not supported: trainers move"),
        ({"rope_scaling": {"factor": 2.0}}, "write it into its config.json"),
        ({"qat_scheme": "int4"}, "not trained for quantization here; leave it out"),
        ({"unsloth_tiled_mlp": True}, "not computed in tiles"),
        ({"fix_tokenizer": 1}, "expected True or False"),
        ({"offload_embedding": 0}, "offload_embedding=0"),
        ({"num_labels": 2}, "only causal language models"),
        ({"target_parameters": ["x"]}, "give it to FastLanguageModel.get_peft_model"),
        ({"device_map_planner_kwargs": {"x": 1}}, "give device_map= itself"),
        ({"auto_model": type("AutoModelForImageTextToText", (), {})}, "auto_model=AutoModelForImageTextToText: only"),
        ({"random_state": True}, "random_state=True: expected a whole number"),
        ({"random_state": 1, "seed": 2}, "random_state=1 and seed=2 both seed the engine"),
        ({"torch_dtype": "float16", "dtype": "bfloat16"}, "torch_dtype='float16' and dtype='bfloat16' are two names"),
        ({"unsloth_vllm_standby": True, "enable_sleep_mode": False}, "two names of one setting"),
        ({"unsloth_vllm_standby": "yes"}, "enable_sleep_mode='yes'"),
        ({"resize_model_vocab": 400}, "the engine has the checkpoint's vocabulary.* fast_inference=False"),
        ({"resize_model_vocab": 0, "fast_inference": False}, "resize_model_vocab=0: expected"),
        ({"full_finetuning": "yes"}, "full_finetuning='yes': expected True or False"),
        ({"load_in_8bit": True}, r"load_in_8bit=True and load_in_4bit=True \(the default\).* set load_in_4bit=False"),
        ({"load_in_8bit": True, "load_in_4bit": False, "load_in_fp8": True}, "set load_in_fp8=False"),
        ({"load_in_8bit": True, "load_in_4bit": False, "quantization_config": {"a": 1}}, "set load_in_8bit=False"),
        ({"load_in_16bit": True, "load_in_4bit": True}, "load_in_16bit=True and load_in_4bit=True"),
        ({"load_in_16bit": True, "load_in_8bit": True}, "set load_in_8bit=False"),
        ({"full_finetuning": True, "load_in_4bit": True}, "every weight is trained.*set load_in_4bit=False"),
        ({"full_finetuning": True, "load_in_8bit": True}, "set load_in_8bit=False"),
        ({"full_finetuning": True, "load_in_fp8": True}, "set load_in_fp8=False"),
        ({"full_finetuning": True, "quantization_config": {"a": 1}}, "leave quantization_config out"),
        ({"full_finetuning": True, "share_weights": True}, "share_weights=True, but full_finetuning=True"),
    ],
)
def test_what_cannot_be_followed_says_why_and_what_to_do(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConflictingArguments, match=says):
        ask(**given)


def test_compat_goes_on_without_what_changes_no_result(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConflictingArguments, match=r'PatchFastRL\(compat="on"\), called before, loads without it'):
        ask(offload_embedding=True)
    activate(Options(compat="on"))
    try:
        assert ask(offload_embedding=True) == ask()
        with pytest.raises(ConflictingArguments, match="offload_embedding='yes' is not supported"):
            ask(offload_embedding="yes")
        with pytest.raises(ConflictingArguments, match="not computed in tiles"):
            ask(unsloth_tiled_mlp=True)
    finally:
        activate(None)
    assert 'Loaded without it, as compat="on" asks' in caplog.text


@pytest.mark.parametrize("name", ["full_finetuning", "load_in_16bit"])
def test_the_four_bit_default_gives_way(name: str) -> None:
    config = ask(**{name: True})
    assert config.load_in_4bit is False
    assert getattr(config, name) is True
    assert ask(**{name: False}).load_in_4bit is True


def test_full_finetuning_has_weights_of_its_own() -> None:
    assert "shared ones cannot be trained" in (ask(full_finetuning=True).why_separate or "")
    assert ask(load_in_16bit=True).why_separate is None
    assert "8 bits" in (ask(load_in_8bit=True, load_in_4bit=False).why_separate or "")


def test_other_names_of_one_setting() -> None:
    assert ask(torch_dtype="bfloat16").dtype == "bfloat16"
    assert ask(torch_dtype="bfloat16", dtype="torch.bfloat16").dtype == "bfloat16"
    assert ask(unsloth_vllm_standby=True).enable_sleep_mode is True
    assert ask(unsloth_vllm_standby=False).enable_sleep_mode is False
    assert ask(random_state=3407).random_state == 3407
    assert ask(random_state=3407, seed=3407).engine == {"seed": 3407}
    assert ask(max_logprobs=20).engine == {"max_logprobs": 20}, "vLLM's names are still vLLM's"


def test_a_device_map_is_followed_where_it_says_something() -> None:
    assert ask(device_map="sequential", fast_inference=False).model == {"device_map": "sequential"}
    assert ask(device_map={"": 1}).model == {"device_map": {"": 1}}


def test_a_default_is_told_from_what_was_given(asked: list[LoadConfig]) -> None:
    FastLanguageModel.from_pretrained("model", full_finetuning=True)
    with pytest.raises(ConflictingArguments, match="set load_in_4bit=False"):
        FastLanguageModel.from_pretrained("model", 2048, None, True, full_finetuning=True)
    with pytest.raises(UnknownArgument, match="zzzzzz="):
        FastLanguageModel.from_pretrained("model", zzzzzz=1)
    (config,) = asked
    assert (config.full_finetuning, config.load_in_4bit, config.images) == (True, False, False)


def test_fast_model_has_the_same_calls(asked: list[LoadConfig]) -> None:
    for calls in (FastModel, FastVisionModel):
        assert inspect.signature(calls.from_pretrained) == inspect.signature(FastLanguageModel.from_pretrained)
        assert calls.get_peft_model is FastLanguageModel.get_peft_model
        calls.from_pretrained("model", load_in_4bit=False)
    assert [config.images for config in asked] == [True, True]


@pytest.mark.parametrize("name", ["AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForCausalLM"])
def test_the_class_that_a_model_with_images_has_may_be_named(asked: list[LoadConfig], name: str) -> None:
    FastVisionModel.from_pretrained("model", load_in_4bit=False, auto_model=type(name, (), {}))
    assert len(asked) == 1


def test_the_documentation_lists_every_name() -> None:
    text = (ROOT / "docs" / "coming-from-unsloth.md").read_text()
    listed = set(re.findall(r"`(\w+)(?:=[^`]*)?`", text))
    assert listed >= OF_UNSLOTH | NEUTRAL.keys() | FOLLOWED


def test_sampling_params_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "vllm":
                raise ModuleNotFoundError("No module named 'vllm'", name="vllm")

    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    monkeypatch.setattr(sampling_params, "_remembering_class", sampling_params._remembering_class.__wrapped__)
    with pytest.raises(
        MissingPackage, match=re.escape(vllm_missing("vLLMSamplingParams(...) makes a vllm.SamplingParams"))
    ):
        vLLMSamplingParams(min_p=0.1)
