"""vLLM's failures in the words of `from_pretrained`'s own arguments. The messages are quoted from vLLM 0.26.0."""

from __future__ import annotations

import dataclasses

import pytest

from tests.loading.test_platform_checks import CONFIG
from trlpatch.errors import EngineBuildFailed, EngineError, LoraNotSupported, NotEnoughMemory
from trlpatch.errors import NotEnoughMemory as Ours
from trlpatch.loading import engine_errors

CONFIG = dataclasses.replace(CONFIG, max_seq_length=4096)


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_errors, "why_no_sleep_mode", lambda: None)


@pytest.mark.parametrize(
    ("message", "kind", "says"),
    [
        ("CUDA out of memory. Tried to allocate 2 GiB.", NotEnoughMemory, "gpu_memory_utilization to 0.3 to 0.5"),
        (
            "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing",
            NotEnoughMemory,
            "gpu_memory_utilization=0.5 leaves too little for a KV cache of max_seq_length=4096",
        ),
        (
            "Free memory on device cuda:0 (3.1/139.8 GiB) on startup is less than desired GPU memory utilization (0.5",
            NotEnoughMemory,
            "asks for more memory than is free",
        ),
        ("XForCausalLM does not support LoRA yet.", LoraNotSupported, "Set fast_inference=False"),
        (
            "1 validation error\n  Value error, User-specified max_model_len (4096) is greater than the derived 512",
            EngineBuildFailed,
            "the derived 512\n.*max_seq_length=4096 is more than the model was made for",
        ),
        ("Sleep mode can only be used for one instance per process.", EngineBuildFailed, "enable_sleep_mode=False"),
        ("something new", EngineBuildFailed, "RuntimeError: something new\n.*pip install --upgrade vllm"),
    ],
)
def test_known_failures_say_what_to_set(message: str, kind: type[EngineError], says: str) -> None:
    made = engine_errors.translate(RuntimeError(message), CONFIG)
    assert type(made) is kind
    with pytest.raises(kind, match=says):
        raise made
    assert "can be tried again in this process" in str(made)


def test_what_vllm_says_of_a_length_is_whole() -> None:
    said = f"Value error, User-specified max_model_len (100000) is greater than the derived {'long ' * 120}and careful"
    assert f"{said}\n" in str(engine_errors.translate(RuntimeError(f"1 validation error\n  {said} \n"), CONFIG))


def test_the_cause_is_looked_at_too() -> None:
    outer = RuntimeError("Engine core initialization failed")
    outer.__cause__ = ValueError("CUDA out of memory")
    assert isinstance(engine_errors.translate(outer, CONFIG), MemoryError)


def test_our_own_errors_stay_as_they_are() -> None:
    own = Ours("too little")
    assert engine_errors.translate(own, CONFIG) is own


def test_it_says_when_a_second_try_needs_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_errors, "why_no_sleep_mode", lambda: "another engine with sleep mode is alive")
    assert "a new process is clean" in str(engine_errors.translate(RuntimeError("x"), CONFIG))
