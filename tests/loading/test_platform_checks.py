"""Machines that nobody has at hand: DGX Spark, and Blackwell with an older vLLM."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from trlpatch.errors import ConflictingArguments, EngineWithoutSleep
from trlpatch.loading import platform_checks
from trlpatch.loading.checkpoint import require_length
from trlpatch.loading.load_config import LoadConfig

CONFIG = LoadConfig(
    model_name="m",
    max_seq_length=256,
    dtype=None,
    load_in_4bit=False,
    fast_inference=True,
    gpu_memory_utilization=0.5,
    max_lora_rank=64,
    float8_kv_cache=False,
    disable_log_stats=True,
    token=None,
    use_gradient_checkpointing=True,
    load_in_fp8=False,
    revision=None,
    trust_remote_code=False,
    enable_sleep_mode=None,
    share_weights=None,
    lora_layers="auto",
    engine={"enforce_eager": True},
    model={},
)


def vllm_is(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: SimpleNamespace(version=version))


def test_dgx_spark_generates_natively_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="trlpatch"):
        settled = platform_checks._native_on_gb10(CONFIG, ["NVIDIA GB10"])
    assert (settled.fast_inference, dict(settled.engine), settled.without_effect) == (False, {}, ("enforce_eager",))
    assert "DGX Spark (GB10) found" in caplog.text
    assert "TRLPATCH_VLLM_ON_GB10=1" in caplog.text


def test_dgx_spark_can_be_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRLPATCH_VLLM_ON_GB10", "1")
    assert platform_checks._native_on_gb10(CONFIG, ["NVIDIA GB10"]) is CONFIG


def test_other_gpus_are_left_alone() -> None:
    assert platform_checks._native_on_gb10(CONFIG, ["NVIDIA H200", "NVIDIA GB200"]) is CONFIG


@pytest.mark.parametrize("change", [{"share_weights": True}, {"load_in_fp8": True}])
def test_what_needs_an_engine_is_refused_on_dgx_spark(change: dict[str, Any]) -> None:
    with pytest.raises(ConflictingArguments, match="TRLPATCH_VLLM_ON_GB10=1"):
        platform_checks._native_on_gb10(dataclasses.replace(CONFIG, **change), ["NVIDIA GB10"])


@pytest.mark.parametrize(
    ("majors", "version", "given", "expected"),
    [
        ([10], "0.14.1", None, "1"),
        ([9, 10], "0.11.2", None, "1"),
        ([10], "0.15.0", None, None),
        ([9], "0.14.1", None, None),
        ([12], "0.14.1", None, None),
        ([10], "0.14.1", "0", "0"),
        ([10], "dev", None, None),
    ],
)
def test_pdl_is_off_on_blackwell_with_an_older_vllm(
    monkeypatch: pytest.MonkeyPatch, majors: list[int], version: str, given: str | None, expected: str | None
) -> None:
    vllm_is(monkeypatch, version)
    monkeypatch.setenv("TRITON_DISABLE_PDL", given or "")
    if given is None:
        monkeypatch.delenv("TRITON_DISABLE_PDL")
    platform_checks.disable_pdl(majors)
    assert os.environ.get("TRITON_DISABLE_PDL") == expected


@pytest.mark.parametrize(("version", "launches"), [("0.14.1", False), ("0.26.0", True)])
def test_vllm_is_told_about_pdl(monkeypatch: pytest.MonkeyPatch, version: str, launches: bool) -> None:
    vllm_is(monkeypatch, version)
    monkeypatch.setenv("TRITON_DISABLE_PDL", "1")
    names = ["vllm", "vllm.lora", "vllm.lora.ops", "vllm.lora.ops.triton_ops", "vllm.lora.ops.triton_ops.utils"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    utilities: Any = sys.modules[names[-1]]
    utilities.supports_pdl = lambda device=None: True
    platform_checks.without_pdl()
    assert utilities.supports_pdl("cuda") is launches


@pytest.mark.parametrize(
    ("asked", "switch", "reason", "expected"),
    [
        (None, "1", None, True),
        (None, "0", None, False),
        (False, "1", "no CUDA", False),
        (True, "0", None, True),
        (None, "1", "no CUDA", False),
    ],
)
def test_sleep_mode_is_what_was_asked_for_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, asked: bool | None, switch: str, reason: str | None, expected: bool
) -> None:
    monkeypatch.setenv("TRLPATCH_SLEEP", switch)
    monkeypatch.setattr(platform_checks, "why_no_sleep_mode", lambda: reason)
    assert platform_checks.sleep_mode(dataclasses.replace(CONFIG, enable_sleep_mode=asked)) is expected


def test_sleep_mode_that_cannot_be_had_is_an_error_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform_checks, "why_no_sleep_mode", lambda: "expandable_segments")
    with pytest.raises(EngineWithoutSleep, match="enable_sleep_mode=True: expandable_segments"):
        platform_checks.sleep_mode(dataclasses.replace(CONFIG, enable_sleep_mode=True))


@pytest.mark.parametrize(
    "scaling", [None, {}, {"rope_type": "default", "rope_theta": 1e4}, {"full": {"rope_type": "default"}}]
)
def test_more_tokens_than_the_model_has_positions_for(scaling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", raising=False)
    text = SimpleNamespace(max_position_embeddings=128, rope_parameters=scaling)
    made = SimpleNamespace(get_text_config=lambda: text, max_position_embeddings=10**6)
    with pytest.raises(
        ConflictingArguments, match=r"max_seq_length=256, and m was made for 128 .*max_seq_length=128 or"
    ):
        require_length(CONFIG, made)
    for changes in (
        {"max_seq_length": 128},
        {"fast_inference": False},
        {"engine": {"hf_overrides": {"rope_scaling": {}}}},
    ):
        require_length(dataclasses.replace(CONFIG, **changes), made)
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    require_length(CONFIG, made)


@pytest.mark.parametrize(
    "text",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"full": {"rope_type": "default"}, "sliding": {"rope_type": "llama3"}}},
        {"rope_scaling": {"rope_type": "longrope"}},
        {"rope_scaling": {"factor": 2.0}},
        {"model_max_length": 512},
        {"max_position_embeddings": None},
    ],
)
def test_a_length_that_vllm_may_allow_is_left_to_it(text: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", raising=False)
    found = SimpleNamespace(**{"max_position_embeddings": 128, **text})
    require_length(CONFIG, SimpleNamespace(get_text_config=lambda: found))
