"""GRPO on a real vLLM CPU engine, with the TRL release that can be imported."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cpu.scenarios import TOLERANCE, mean, train
from trlpatch.source.locate import find_trl

pytestmark = [pytest.mark.cpu, pytest.mark.release]


@pytest.fixture(scope="module")
def attached(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Thirty steps of LoRA on an attached engine, and four control steps without requests."""
    return train("attached", tmp_path_factory.mktemp("attached"))


def test_rollouts_use_the_attached_engine_and_no_other(attached: dict[str, Any]) -> None:
    assert attached["engines_built"] == 0
    assert attached["uses_attached"]
    assert (attached["use_vllm"], attached["mode"]) == (True, "colocate")
    assert not attached["sleep"]
    assert "trlpatch" in attached["file"]


def test_each_step_rolls_out_with_the_adapter_of_that_step(attached: dict[str, Any]) -> None:
    rollouts = attached["rollouts"]
    assert [rollout["step"] for rollout in rollouts] == list(range(30))
    assert len({rollout["adapter"] for rollout in rollouts} - {None}) == 30
    assert max(rollout["gap"] for rollout in rollouts) < TOLERANCE
    # TRL's own witness, from 0.23 on: the sampler's log-probabilities against the trainer's, before the update.
    assert len(attached["witness"]) == (30 if find_trl().release >= (0, 23) else 0)
    assert max(attached["witness"], default=0) < TOLERANCE


def test_without_the_request_the_witness_speaks(attached: dict[str, Any]) -> None:
    first, *moved = attached["control"]
    assert [rollout["adapter"] for rollout in attached["control"]] == [None] * 4
    assert first["gap"] < TOLERANCE, "lora_B is zero before the first update: the base model is the policy"
    assert min(rollout["gap"] for rollout in moved) > 100 * TOLERANCE


def test_the_policy_learns(attached: dict[str, Any]) -> None:
    rewards = attached["rewards"]
    assert len(rewards) == 30
    assert mean(rewards[:5]) < 0.6
    assert mean(rewards[-5:]) > mean(rewards[:5]) + 0.3


def test_sampling_parameters_of_the_config_reach_the_engine(attached: dict[str, Any]) -> None:
    for rollout in attached["rollouts"]:
        assert rollout["stop_token_ids"] == [attached["stop"]]
        assert rollout["max_tokens"] == 16, "what was not given stays TRL's"
    assert any(attached["stop"] in rollout["last_tokens"] for rollout in attached["rollouts"])
    assert all(rollout["stop_token_ids"] == [] for rollout in attached["control"])


def test_the_engine_that_trl_builds_takes_the_adapter_too(tmp_path: Any) -> None:
    report = train("own", tmp_path, steps=4)
    assert report["engines_built"] == 1
    built = report["built_with"][0]
    assert (built["enable_lora"], built["max_lora_rank"], built["max_loras"]) == (True, 8, 1)
    assert built["logprobs_mode"] == "processed_logprobs"
    assert len({rollout["adapter"] for rollout in report["rollouts"]} - {None}) == 4
    # vLLM turns a float32 checkpoint into bfloat16 unless told otherwise, and TRL does not tell it.
    assert max(rollout["gap"] for rollout in report["rollouts"]) < 0.1


def test_without_an_engine_losses_are_trls_to_the_last_bit(tmp_path: Any) -> None:
    patched = train("patched", tmp_path, steps=3)
    stock = train("stock", tmp_path, steps=3)
    assert (patched.pop("patched"), stock.pop("patched")) == (True, False)
    assert patched.pop("file") != stock.pop("file")
    assert patched == stock
    assert len(stock["full"]["losses"]) == 3
    assert len(set(stock["full"]["losses"])) > 1
