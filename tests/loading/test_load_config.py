"""What `from_pretrained` refuses before it imports anything. Needs no torch."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from trlpatch import FastLanguageModel
from trlpatch.engine import build
from trlpatch.errors import ConflictingArguments, Fp8NeedsEngine, MissingPackage, UnknownArgument
from trlpatch.loading import load_config
from trlpatch.loading.load_config import OWN, parse_arguments
from trlpatch.versions import vllm_missing

ENGINE = frozenset({"enforce_eager", "max_num_seqs", "quantization", "revision", "kv_cache_memory_bytes"})


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that seem to be installed; a test takes some away."""
    there = {"torch", "transformers", "peft", "vllm", "bitsandbytes", "ray"}
    real = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        if name in ("torch", "transformers", "peft", "vllm", "bitsandbytes", "ray"):
            return importlib.machinery.ModuleSpec(name, None) if name in there else None
        return real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(load_config, "engine_argument_names", lambda: ENGINE)
    return there


def ask(given: Collection[str] | None = None, **changes: Any) -> load_config.LoadConfig:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(FastLanguageModel.from_pretrained).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    named = {name: changes.pop(name, value) for name, value in defaults.items()}
    return parse_arguments(named, changes, given)


def test_the_signature_is_the_documented_one() -> None:
    parameters = inspect.signature(FastLanguageModel.from_pretrained).parameters
    assert {name: p.default for name, p in parameters.items() if name != "kwargs"} == {
        "model_name": "unsloth/Llama-3.2-1B-Instruct",
        "max_seq_length": 2048,
        "dtype": None,
        "load_in_4bit": True,
        "fast_inference": True,
        "gpu_memory_utilization": 0.5,
        "max_lora_rank": 64,
        "disable_log_stats": True,
        "token": None,
        "use_gradient_checkpointing": "unsloth",
        "float8_kv_cache": False,
        "load_in_fp8": False,
        "load_in_8bit": False,
        "load_in_16bit": False,
        "full_finetuning": False,
        "patch_trl": True,
    }
    by_position = [name for name, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert by_position[:4] == ["model_name", "max_seq_length", "dtype", "load_in_4bit"], "as in Unsloth"
    assert by_position[4:] == [
        "fast_inference",
        "gpu_memory_utilization",
        "max_lora_rank",
        "disable_log_stats",
        "token",
        "use_gradient_checkpointing",
    ]
    through_kwargs = {"revision", "trust_remote_code", "enable_sleep_mode", "share_weights", "lora_layers"}
    assert {*parameters} - {"kwargs"} | through_kwargs | {"num_engines"} == OWN


def test_arguments_go_to_whom_they_concern() -> None:
    config = ask(
        load_in_4bit=False,
        revision="v1",
        trust_remote_code=True,
        share_weights=True,
        enforce_eager=True,
        attn_implementation="sdpa",
        cache_dir="/models",
        local_files_only=True,
    )
    assert dict(config.engine) == {"enforce_eager": True}
    assert dict(config.model) == {"attn_implementation": "sdpa", "cache_dir": "/models", "local_files_only": True}
    assert config.of_tokenizer == {
        "revision": "v1",
        "token": None,
        "trust_remote_code": True,
        "cache_dir": "/models",
        "local_files_only": True,
    }
    assert config.use_gradient_checkpointing is True
    assert config.why_separate is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_seqs": 3}, r"max_seqs= is not an argument .* did you mean max_num_seqs="),
        ({"max_lora_rnk": 3}, r"did you mean max_lora_rank="),
        ({"attn_implementatio": 3}, r"did you mean attn_implementation="),
        ({"zzzzzzzz": 3}, r"zzzzzzzz= is not an argument .*from_pretrained$"),
        ({"lora_rank": 3}, r"use max_lora_rank= instead of lora_rank="),
        ({"max_model_len": 3}, r"use max_seq_length= instead of max_model_len="),
        ({"offload_embeding": 3}, r"did you mean offload_embedding="),
    ],
)
def test_an_unknown_name_is_an_error_that_names_the_nearest(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UnknownArgument, match=says):
        ask(load_in_4bit=False, **given)
    assert issubclass(UnknownArgument, TypeError)


def test_engines_elsewhere_have_their_devices_to_themselves() -> None:
    config = ask(("load_in_4bit", "num_engines"), load_in_4bit=False, num_engines=2)
    assert (config.num_engines, config.gpu_memory_utilization) == (2, 0.9)
    assert config.why_separate == "the engines are on devices of their own"
    assert ask(("gpu_memory_utilization",), load_in_4bit=False, num_engines=2).gpu_memory_utilization == 0.5
    assert ask(load_in_4bit=False).num_engines is None


def test_engines_elsewhere_need_ray(installed: set[str]) -> None:
    installed.remove("ray")
    with pytest.raises(MissingPackage, match=r"Ray is not installed. Run: pip install .*\[ray\]"):
        ask(load_in_4bit=False, num_engines=2)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"model_name": None}, "model_name=None"),
        ({"model_name": ""}, "model_name=''"),
        ({"max_seq_length": 0}, "max_seq_length=0"),
        ({"max_lora_rank": True}, "max_lora_rank=True"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization=0"),
        ({"gpu_memory_utilization": 90}, "gpu_memory_utilization=90: expected a number above 0 and up to 1"),
        ({"load_in_fp8": "block"}, "load_in_fp8='block': expected True or False"),
        ({"share_weights": "yes"}, "share_weights='yes'"),
        ({"use_gradient_checkpointing": "trl"}, "use_gradient_checkpointing='trl'"),
        ({"load_in_fp8": True, "load_in_4bit": True}, "set load_in_4bit=False"),
        ({"quantization": "fp8"}, "quantization='fp8' and load_in_4bit=True .* set load_in_4bit=False"),
        ({"quantization_config": {}, "load_in_4bit": True}, "set load_in_4bit=False"),
        ({"share_weights": True}, "share_weights=True, but 4-bit weights"),
        ({"share_weights": True, "full_finetuning": True, "load_in_4bit": False}, "shared ones cannot be trained"),
        ({"share_weights": True, "load_in_4bit": False, "fast_inference": False}, "builds no engine"),
        ({"num_engines": 0}, "num_engines=0: expected a whole number of at least 1"),
        ({"num_engines": 2, "fast_inference": False}, "the engines are vLLM's"),
        ({"num_engines": 2, "share_weights": True, "load_in_4bit": False}, "engines are on devices of their own"),
    ],
)
def test_values_that_cannot_be_followed(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConflictingArguments, match=says):
        ask(**given)
    assert issubclass(ConflictingArguments, ValueError)


def test_fp8_needs_the_engine() -> None:
    with pytest.raises(NotImplementedError, match="set fast_inference=True, or load_in_fp8=False") as raised:
        ask(load_in_fp8=True, load_in_4bit=False, fast_inference=False)
    assert isinstance(raised.value, Fp8NeedsEngine)


@pytest.mark.parametrize(
    ("absent", "given", "says"),
    [
        (
            "vllm",
            {"load_in_4bit": False},
            re.escape(vllm_missing("trlpatch: fast_inference=True builds a vLLM engine")),
        ),
        ("bitsandbytes", {}, r'pip install .*\[4bit\]", or set load_in_4bit=False'),
        ("peft", {}, "pip install peft"),
    ],
)
def test_a_missing_package_is_named_with_the_command(
    installed: set[str], absent: str, given: dict[str, Any], says: str
) -> None:
    installed.discard(absent)
    with pytest.raises(ImportError, match=says) as raised:
        ask(**given)
    assert isinstance(raised.value, MissingPackage)


def test_without_an_engine_no_vllm_is_needed(installed: set[str]) -> None:
    installed.discard("vllm")
    installed.discard("bitsandbytes")
    config = ask(load_in_4bit=False, fast_inference=False, enforce_eager=True)
    assert dict(config.engine) == {}
    assert config.without_effect == ("enforce_eager",)


def test_engine_arguments_are_read_from_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "vllm"
    (package / "engine").mkdir(parents=True)
    (package / "engine" / "arg_utils.py").write_text(
        "raise ImportError\nclass Other:\n    x: int = 1\nclass EngineArgs:\n    model: str = ''\n    seed: int = 0\n"
        "    def f(self):\n        y: int = 1\n"
    )
    spec = importlib.machinery.ModuleSpec("vllm", None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: spec)
    assert build.engine_argument_names.__wrapped__() == {"model", "seed"}


def test_refusing_imports_nothing_heavy() -> None:
    code = (
        "import sys, trlpatch\n"
        "try: trlpatch.FastLanguageModel.from_pretrained('x', zzz=1)\n"
        "except TypeError: pass\n"
        "print(*({'torch', 'vllm', 'transformers', 'peft', 'rich', 'libcst'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split() == []
