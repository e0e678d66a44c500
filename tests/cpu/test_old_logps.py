"""Training without the extra pass for old log-probabilities is training with it, to the last bit, on a real vLLM."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cpu.old_logps_runs import GRPO, KEPT, STEPS
from tests.cpu.scenarios import report_of
from trlpatch.source.locate import find_trl

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.release,
    pytest.mark.skipif(find_trl().release < (0, 22), reason="no such pass on-policy, and RLOO does not use vLLM"),
    pytest.mark.skipif(find_trl().release[:2] == (1, 15), reason="Triton's interpreter takes too long for these runs"),
]

REASONS = {
    "iterations": "num_iterations=2",
    "steps_per_generation": "steps_per_generation=4",
    "lora_dropout": "lora_dropout.default (Dropout, p=0.1)",
    "attention_dropout": "self_attn.attention_dropout=0.1",
    "subclass": "OwnTrainer overrides _compute_loss",
    "rloo_beta": "beta=0.05",
}
REUSED = [*GRPO, "off_policy_mask", "vespo", "env_mask", "rloo"]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every run with TRL's pass, and with reuse asked for."""
    directory = tmp_path_factory.mktemp("old_logps")
    return {
        old_logps: report_of(
            "tests.cpu.old_logps_runs", [], ["--old-logps", old_logps], directory / f"{old_logps}.json"
        )
        for old_logps in ("stock", "reuse")
    }


def both(reports: dict[str, dict[str, Any]], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if name not in reports["stock"]:
        pytest.skip("this release has no such setting")
    return reports["stock"][name], reports["reuse"][name]


@pytest.mark.parametrize("name", [*REUSED, *KEPT])
def test_losses_gradients_and_weights_are_equal_to_the_bit(reports: dict[str, dict[str, Any]], name: str) -> None:
    stock, reuse = both(reports, name)
    assert len(stock["gradients"]) == STEPS
    assert len(set(stock["gradients"])) == STEPS
    assert reuse["losses"] == stock["losses"]
    assert reuse["gradients"] == stock["gradients"]
    assert reuse["weights"] == stock["weights"]


@pytest.mark.parametrize("name", [*REUSED, *KEPT])
def test_logs_are_equal_but_for_the_order_of_sums_in_two_means(reports: dict[str, dict[str, Any]], name: str) -> None:
    stock, reuse = both(reports, name)
    summed = {f"sampling/{what}/mean" for what in ("sampling_logp_difference", "importance_sampling_ratio")}
    for here, there in zip(stock["logs"], reuse["logs"], strict=True):
        expected = {key: pytest.approx(here[key], rel=1e-6) if key in summed else here[key] for key in here}
        assert there == expected


@pytest.mark.parametrize("name", REUSED)
def test_the_pass_is_left_out_after_it_was_checked(reports: dict[str, dict[str, Any]], name: str) -> None:
    stock, reuse = both(reports, name)
    own = min(stock["passes"])
    reference = own // 2 if name == "kl" else 0  # as long as the pass, and never left out
    assert own - reference > 0
    assert stock["passes"] == [own] * STEPS
    assert reuse["passes"] == [own + own - reference] * 3 + [reference] * (STEPS - 3)
    assert "passes left out; the training forward equalled the pass in steps 0, 1, 2" in reuse["status"]


@pytest.mark.parametrize("name", KEPT)
def test_the_pass_runs_where_its_result_may_be_another(reports: dict[str, dict[str, Any]], name: str) -> None:
    stock, reuse = both(reports, name)
    assert sum(stock["passes"]) > 0
    assert reuse["passes"] == stock["passes"]
    assert "the pass runs, " in reuse["status"]
    assert REASONS[name] in reuse["status"]


def test_the_ratio_is_not_one(reports: dict[str, dict[str, Any]]) -> None:
    """The engine samples at another temperature, so a ratio that is wrong would show."""
    logs, _ = both(reports, "token_truncate")
    for entry in logs["logs"]:
        assert entry["sampling/importance_sampling_ratio/min"] < 0.9
        assert entry["sampling/importance_sampling_ratio/max"] > 1.1
