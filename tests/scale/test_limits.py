"""Closed forms and simulator where the answer is known: one engine, endless ones, a free sync, a bound of nought."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from typing import get_args

import pytest

from trlpatch.scale import Calibration, Fixed, LogNormal, Prediction, Setting, predict, simulate
from trlpatch.scale.costs import Costs
from trlpatch.scale.setting import Mode

CALIBRATION = Calibration.load()
TAIL = LogNormal(400, 1.0, 4096)
FREE_SYNC = replace(
    CALIBRATION,
    inputs=CALIBRATION.inputs
    | {
        name: replace(CALIBRATION.inputs[name], value=value)
        for name, value in {
            "remote_call_s": 1e-12, "adapter_apply_s": 1e-12, "object_store_put_bandwidth": 1e30,
            "object_store_get_bandwidth": 1e30, "network_bandwidth": 1e30,
        }.items()
    },
)  # fmt: skip


def both(setting: Setting, calibration: Calibration = CALIBRATION) -> tuple[Prediction, Prediction]:
    return predict(setting, calibration), simulate(setting, calibration, steps=6)


@pytest.mark.parametrize("mode", ["colocated", "sync", "prefetch"])
@pytest.mark.parametrize("engines", [1, 2, 8])
def test_with_fixed_lengths_the_closed_form_of_a_barrier_is_the_simulation(mode: Mode, engines: int) -> None:
    setting = Setting(mode=mode, trainer_gpus=engines, rollout_gpus=engines, completions=128, lengths=Fixed(300))
    expected, found = both(setting)
    for name in ("step_s", "generation_s", "training_s", "sync_s", "tokens_per_s", "engines_busy", "trainer_busy"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9), name


def test_one_engine_is_the_sum_and_two_in_turn_are_the_longer() -> None:
    setting = Setting(lengths=Fixed(512))
    one = predict(setting)
    assert one.step_s == pytest.approx(one.generation_s + one.training_s + one.sync_s)
    two = predict(setting.with_(mode="prefetch"))
    assert two.step_s == pytest.approx(max(one.generation_s, one.training_s) + one.sync_s)


def test_endless_engines_leave_the_longest_completion() -> None:
    setting = Setting(rollout_gpus=4096, completions=64, lengths=TAIL, prompt_tokens=0)
    costs = Costs(setting, CALIBRATION)
    alone = costs.engine.step(1, 0)
    shortest = TAIL.longest_of(64) * alone
    found = simulate(setting, steps=40)
    assert predict(setting).generation_s == pytest.approx(shortest, rel=0.03)
    assert found.generation_s == pytest.approx(shortest, rel=0.1)
    assert found.generation_s > Costs(setting, CALIBRATION).engine.base * 64


def test_endless_engines_make_prefetch_and_async_the_trainer() -> None:
    for mode in ("prefetch", "async"):
        setting = Setting(mode=mode, rollout_gpus=512, completions=64, lengths=Fixed(256))
        expected, found = both(setting, FREE_SYNC)
        assert expected.step_s == pytest.approx(expected.training_s, rel=1e-6)
        assert found.step_s == pytest.approx(found.training_s, rel=1e-6)


def test_a_sync_that_costs_nothing_leaves_nothing_of_it() -> None:
    setting = Setting(lengths=Fixed(64))
    assert predict(setting, FREE_SYNC).sync_s < 1e-9
    dear, free = predict(setting), predict(setting, FREE_SYNC)
    assert dear.step_s - free.step_s == pytest.approx(dear.sync_s)


@pytest.mark.parametrize("lengths", [Fixed(200), TAIL], ids=["fixed", "tail"])
@pytest.mark.parametrize("engines", [1, 3, 8])
def test_a_staleness_bound_of_nought_is_the_synchronous_step(lengths: Fixed | LogNormal, engines: int) -> None:
    # Packed, and with the engines' log-probabilities, as the asynchronous trainer works.
    setting = Setting(completions=64, rollout_gpus=engines, lengths=lengths, padded=False, old_logps="reused")
    barrier = simulate(setting, steps=8)
    bound = simulate(setting.with_(mode="async", max_staleness=0), steps=8, warmup=0)
    assert bound.dropped == bound.staleness == 0
    for name in ("step_s", "training_s", "tokens_per_s"):
        assert getattr(bound, name) == pytest.approx(getattr(barrier, name), rel=1e-9), name
    closed = predict(setting.with_(mode="async", max_staleness=0))
    assert closed.step_s == pytest.approx(predict(setting).step_s)


def test_one_busy_engine_gives_asynchronously_what_it_can() -> None:
    # So many in flight that the slots are always full: tokens per second are those of a full engine.
    setting = Setting(
        mode="async", completions=512, lengths=Fixed(400), prompt_tokens=0, max_num_seqs=64, trainer_gpus=64
    )
    engine = Costs(setting, CALIBRATION).engine
    full = engine.throughput(64, 200)
    expected, found = both(setting)
    assert expected.tokens_per_s == pytest.approx(full, rel=0.01)
    assert found.tokens_per_s == pytest.approx(full, rel=0.03)


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("engines", [1, 4, 64])
@pytest.mark.parametrize("completions", [64, 512])
def test_the_closed_form_is_near_the_simulation_with_a_long_tail(mode: Mode, engines: int, completions: int) -> None:
    setting = Setting(mode=mode, trainer_gpus=4, rollout_gpus=engines, completions=completions, lengths=TAIL)
    if mode == "colocated":
        setting = setting.with_(trainer_gpus=engines)
    runs = [simulate(setting, steps=8, seed=seed) for seed in range(2)]
    assert predict(setting).step_s == pytest.approx(fmean(run.step_s for run in runs), rel=0.16)


def test_more_completions_than_slots_follow_each_other() -> None:
    setting = Setting(completions=1024, max_num_seqs=64, lengths=TAIL, prompt_tokens=0)
    assert predict(setting).generation_s == pytest.approx(simulate(setting, steps=8).generation_s, rel=0.1)


def test_what_is_older_than_the_bound_is_never_trained_on() -> None:
    # Steps so short that the long tail cannot be done within them.
    setting = Setting(
        mode="async", completions=64, rollout_gpus=8, trainer_gpus=16, lengths=LogNormal(200, 1.5, 8192),
        max_staleness=1,
    )  # fmt: skip
    found = simulate(setting, steps=30)
    assert 0 <= found.staleness <= 1
    assert found.dropped > 0.02
    assert predict(setting).dropped == pytest.approx(found.dropped, abs=0.15)
