"""What docs/sampling.md says of GRPO's gradients, on a real engine: what is warned of, and what is advised."""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")

import trlpatch
from tests.cpu import training
from tests.cpu.small_grpo import small_grpo

pytestmark = pytest.mark.cpu

MIN_P = {"vllm_sampling_params": {"min_p": 0.1}, "max_completion_length": 64}
OFF = {"vllm_importance_sampling_correction": False}
LEARNS = 0.1  # what learns has about 0.4, what does not 3e-5 and 3e-3


@pytest.fixture(scope="module", params=["processed_logprobs", "raw_logprobs"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    path = tiny.checkpoint(tmp_path_factory.mktemp("model"))
    trlpatch.PatchFastRL("grpo")
    return request.param, tiny.engine(path, logprobs_mode=request.param), path


def gradients(bench: tuple[str, Any, Path], tmp_path: Path, **config: Any) -> list[float]:
    """Train for two steps; return `grad_norm` of each."""
    import torch

    _, engine, path = bench
    torch.manual_seed(0)
    model = trlpatch.attach_engine(tiny.policy(path), engine)
    trainer = small_grpo(model, tmp_path, config={"max_steps": 2, "logging_steps": 1, **config})
    trainer.train()
    return training.logged(trainer, "grad_norm")


def test_min_p_beside_the_correction(
    bench: tuple[str, Any, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    processed = bench[0] == "processed_logprobs"
    found = gradients(bench, tmp_path, **MIN_P)
    assert (max(found) < LEARNS) == processed
    assert (min(found) > LEARNS) != processed
    assert caplog.text.count("vllm_importance_sampling_correction=False") == int(processed), "the warning is the fact"


def test_min_p_without_the_correction(
    bench: tuple[str, Any, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert min(gradients(bench, tmp_path, **MIN_P, **OFF)) > LEARNS
    assert "importance sampling" not in caplog.text


def test_one_seed_among_trls_own_arguments(
    bench: tuple[str, Any, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert gradients(bench, tmp_path, generation_kwargs={"seed": 3407}) == [0.0, 0.0]
    assert "generation_kwargs sets seed=3407" in caplog.text
