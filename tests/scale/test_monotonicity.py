"""Directions that hold in every setting, looked for with hypothesis; fixed seeds give the same run."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from trlpatch.scale import Fixed, LogNormal, Setting, predict, simulate
from trlpatch.scale.lengths import Lengths

SEARCH = settings(deadline=None, derandomize=True, max_examples=60)
SLACK = 1 + 1e-9

lengths = st.one_of(
    st.builds(Fixed, st.integers(1, 2000)),
    st.builds(LogNormal, st.floats(20, 1000), st.floats(0.1, 1.5), st.integers(64, 8192)),
)
chosen = st.builds(
    Setting,
    mode=st.sampled_from(["sync", "prefetch", "async"]),
    trainer_gpus=st.integers(1, 64),
    rollout_gpus=st.integers(1, 256),
    completions=st.sampled_from([16, 64, 512, 4096]),
    prompt_tokens=st.integers(0, 2000),
    lengths=lengths,
    max_staleness=st.integers(1, 8),
    checkpointing=st.booleans(),
    max_num_seqs=st.sampled_from([4, 64, 256]),
    gpus_per_host=st.just(4096),  # a sync to more hosts takes longer, which is no fault
)


def step(setting: Setting) -> float:
    return predict(setting).step_s


@SEARCH
@given(chosen, st.integers(2, 8))
def test_more_rollout_gpus_are_never_slower(setting: Setting, times: int) -> None:
    assert step(setting.with_(rollout_gpus=setting.rollout_gpus * times)) <= step(setting) * SLACK


@SEARCH
@given(chosen, st.integers(1, 8))
def test_longer_completions_are_never_faster(setting: Setting, more: int) -> None:
    longer: Lengths
    if isinstance(setting.lengths, Fixed):
        longer = Fixed(setting.lengths.tokens + more)
    else:
        assert isinstance(setting.lengths, LogNormal)
        longer = LogNormal(setting.lengths.median * (1 + more), setting.lengths.sigma, setting.lengths.limit)
    assert step(setting.with_(lengths=longer)) * SLACK >= step(setting)


@SEARCH
@given(chosen)
def test_overlapping_is_never_slower_than_waiting(setting: Setting) -> None:
    waiting = step(setting.with_(mode="sync"))
    assert step(setting.with_(mode="prefetch")) <= waiting * SLACK


@SEARCH
@given(chosen, st.integers(1, 8))
def test_more_staleness_is_never_slower(setting: Setting, more: int) -> None:
    setting = setting.with_(mode="async")
    assert step(setting.with_(max_staleness=setting.max_staleness + more)) <= step(setting) * 1.001


@SEARCH
@given(chosen)
def test_a_colocated_gpu_gains_by_company_of_its_own_kind(setting: Setting) -> None:
    # Without what ranks tell each other: the reduction of the gradients.
    alone = setting.with_(mode="colocated", trainer_gpus=1)
    four = setting.with_(mode="colocated", trainer_gpus=4)
    assert step(four) <= step(alone) + 0.01


@SEARCH
@given(chosen)
def test_an_adapter_travels_faster_than_all_weights_the_same_way(setting: Setting) -> None:
    assert predict(setting).sync_s < predict(setting.with_(sync="full-objects")).sync_s


@SEARCH
@given(chosen)
def test_shares_are_shares_and_rates_are_of_the_step(setting: Setting) -> None:
    found = predict(setting)
    assert 0 < found.engines_busy <= 1
    assert 0 < found.trainer_busy <= 1
    assert 0 <= found.dropped < 1
    assert found.steps_per_s * found.step_s == 1 or abs(found.steps_per_s * found.step_s - 1) < 1e-12


small = st.builds(
    Setting,
    mode=st.sampled_from(["sync", "prefetch", "async"]),
    trainer_gpus=st.integers(1, 8),
    rollout_gpus=st.integers(1, 16),
    completions=st.sampled_from([16, 64]),
    lengths=lengths,
    max_staleness=st.integers(0, 4),
    max_num_seqs=st.sampled_from([4, 64]),
)


@settings(SEARCH, max_examples=25)
@given(small, st.integers(0, 2**32))
def test_a_seed_gives_the_same_run_and_steps_hold_together(setting: Setting, seed: int) -> None:
    found = simulate(setting, steps=4, seed=seed)
    assert simulate(setting, steps=4, seed=seed) == found
    assert found.step_s * SLACK >= found.training_s + (found.sync_s if setting.mode != "prefetch" else 0)
    assert found.engines_busy <= SLACK
    assert found.trainer_busy <= SLACK
    assert found.staleness <= max(1, setting.max_staleness)


@settings(SEARCH, max_examples=25)
@given(small, st.integers(2, 4), st.integers(0, 2**32))
def test_simulated_engines_twice_as_many_never_slow_down_a_barrier(setting: Setting, times: int, seed: int) -> None:
    # Of fixed lengths: with others, dealing them out to more engines can bring long ones together.
    setting = setting.with_(mode="sync", lengths=Fixed(round(setting.lengths.mean) or 1))
    few = simulate(setting, steps=2, seed=seed)
    many = simulate(setting.with_(rollout_gpus=setting.rollout_gpus * times), steps=2, seed=seed)
    assert many.generation_s <= few.generation_s * SLACK
