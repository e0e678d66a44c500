"""The promises of FastLanguageModel on a CUDA device: `tox -e gpu`. Measured in tests/gpu/acceptance.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gpu.common import DRIFT, TOLERANCE, random_model, run_child

pytestmark = pytest.mark.gpu

SAME = 0.01
"""Mean nats between two scores of one sequence by the same weights: vLLM's LoRA kernels add in no fixed order."""

SETUPS = {
    "shared, rank below the engine's": ("8", "shared", {}),
    "separate, rank equal to the engine's": ("16", "separate", {}),
    "shared, the other model runner": ("16", "shared", {"VLLM_USE_V2_MODEL_RUNNER": "other"}),
}


@pytest.fixture(scope="module", params=SETUPS, ids=list(SETUPS))
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    rank, weights, environ = SETUPS[request.param]
    if environ:
        environ = {"VLLM_USE_V2_MODEL_RUNNER": "0" if _runner_v2_is_default() else "1"}
    model = random_model("0.5b")
    result = run_child(Path(__file__).with_name("acceptance.py"), [str(model), rank, weights], timeout=240, **environ)
    assert "error" not in result, result
    print(result["about"])
    assert result["about"]["shared"] == (weights == "shared")
    return {**result, "weights": weights}


def _runner_v2_is_default() -> bool:
    """For Qwen2, the model that is run: vLLM 0.25.1 and newer."""
    from importlib.metadata import version

    from packaging.version import Version

    return Version(version("vllm")) >= Version("0.25")


def test_a_the_adapter_changes_what_the_engine_computes_and_zero_is_the_base(found: dict[str, Any]) -> None:
    assert found["adapter"]["moved"] > DRIFT
    assert found["adapter"]["zeroed"] < SAME


def test_b_an_update_in_place_equals_a_fresh_load_from_disk(found: dict[str, Any]) -> None:
    assert found["about"]["handover"].startswith("in place")
    assert max(found["disk"]["differences"]) < SAME
    assert max(found["disk"]["gaps"]) < TOLERANCE


def test_c_training_tensors_are_never_written(found: dict[str, Any]) -> None:
    changed = found["tensors"]["changed"]
    assert changed["torch.float32"] == changed["torch.bfloat16"] == []


def test_d_twenty_sleeps_leave_memory_and_log_probabilities_as_they_were(found: dict[str, Any]) -> None:
    cycles = found["cycles"]
    assert max(cycles["memory"][2:]) - min(cycles["memory"][2:]) < 0.1
    assert max(cycles["differences"]) < SAME
    assert max(cycles["gaps"]) < TOLERANCE
    assert min(cycles["freed"]) > 5.0, "15 % of the device, less a model of 0.7 GiB"


def test_e_engine_and_trainer_agree_on_sampled_tokens(found: dict[str, Any]) -> None:
    assert found["adapter"]["gap"] < TOLERANCE
    assert found["adapter"]["gap_again"] < TOLERANCE
    assert found["adapter"]["gap_base"] > DRIFT, "the measure tells a rollout without the adapter"


def test_f_base_parameters_lie_in_the_engine_when_shared(found: dict[str, Any]) -> None:
    outside = found["storage"]["outside"]
    assert found["storage"]["parameters"] > 200
    assert len(outside) == (0 if found["weights"] == "shared" else found["storage"]["parameters"])


def test_g_a_cached_prompt_of_an_older_adapter_is_not_reused(found: dict[str, Any]) -> None:
    prefix = found["prefix"]
    assert max(prefix["cached"][1::2]) >= prefix["prompt"] // 2, "the cache is on: the same adapter finds its prompt"
    assert max(prefix["cached"][0::2]) == 0
    assert max(prefix["gaps"]) < 3 * TOLERANCE, "single tokens"


def test_h_an_update_in_place_is_faster_than_registering_anew(found: dict[str, Any]) -> None:
    assert found["timings"]["in_place_ms"] * 2 < found["timings"]["anew_ms"]
