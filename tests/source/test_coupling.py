from __future__ import annotations

from trlpatch.source.coupling import components, stock_targets


def test_what_shares_an_engine_is_one_transaction():
    assert components(["grpo", "rloo", "vllm_generation", "online_dpo", "online_dpo_config", "rloo_config"]) == [
        frozenset({"grpo", "rloo", "vllm_generation", "rloo_config"}),
        frozenset({"online_dpo", "online_dpo_config"}),
    ]


def test_a_failed_target_keeps_those_that_share_its_engine_stock():
    present = ["grpo", "rloo", "vllm_generation", "online_dpo"]
    assert stock_targets({"rloo_config"}, present) == {"grpo", "rloo", "rloo_config", "vllm_generation"}
    assert stock_targets({"online_dpo"}, present) == {"online_dpo"}
    assert stock_targets(set(), present) == frozenset()
