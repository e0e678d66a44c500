"""Sleep and sync in the orders of every TRL release, on a stub that keeps vLLM's rules.

Sleep needs CUDA: tests/gpu/matrix.py runs the same cases on a real engine.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.engine import RecordingAdapterSync, RecordingEngineStub
from tests.fakes.models import base_model, lora_model, randomize
from tests.fakes.owners import (
    EPOCHS,
    Since023,
    Since025,
    Since028,
    Since029,
    Since110,
    WithoutSleepCode,
    WithoutSync,
)
from trlpatch import hooks
from trlpatch.engine.attach import attach_engine
from trlpatch.engine.state import state_of
from trlpatch.errors import StaleAdapter
from trlpatch.options import Options
from trlpatch.options import activate as set_options

pytestmark = pytest.mark.torch

tags = pytest.mark.parametrize("tells_tags", [True, False], ids=["executor here", "executor elsewhere"])
epochs = pytest.mark.parametrize("epoch", EPOCHS)


def build(*, tells_tags: bool = True, **settings: Any) -> RecordingEngineStub:
    engine = RecordingEngineStub(sleep=True, tells_tags=tells_tags, **settings)
    state_of(engine).adapter_sync = RecordingAdapterSync()
    return engine


@epochs
@tags
def test_lora_rollouts_carry_the_current_adapter(epoch: Any, tells_tags: bool) -> None:
    engine = build(tells_tags=tells_tags)
    model = attach_engine(lora_model(), engine)
    owner = epoch(model, engine)
    for step in range(3):
        owner.state.global_step = step
        randomize(model, seed=step)
        owner.batch()
        owner.batch()  # a second eval batch, or a micro-step of gradient accumulation
    sent = state_of(engine).adapter_sync.published  # type: ignore[union-attr]
    used = [request.lora_name for request in engine.requests]
    assert len(used) == 6
    for step in range(3):
        randomize(model, seed=step)
        version = int(used[2 * step][1:]) - 1
        expected = model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight
        assert (
            sent[version].tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] == expected
        ).all()
    assert "load_weights" not in engine.calls
    assert "sleep(2)" not in engine.calls
    assert engine.calls.count("sleep(1)") >= 6
    assert engine.weights == "checkpoint", "the base weights of an attached engine survive"


@epochs
@tags
def test_full_fine_tuning_rolls_out_from_the_pushed_weights(epoch: Any, tells_tags: bool) -> None:
    engine = build(tells_tags=tells_tags, lora_rank=None)
    owner = epoch(base_model(), engine)
    for step in range(3):
        owner.state.global_step = step
        owner.batch()
        owner.batch()
    rollouts = [call for call in engine.calls if call.startswith("generate")]
    assert rollouts == ["generate(base, policy)"] * 6


def test_trl_sleeps_at_its_own_level_only_where_nothing_is_lost() -> None:
    def levels(epoch: Any, model: Any, engine: Any) -> set[str]:
        epoch(model, engine).batch()
        return {call for call in engine.calls if call.startswith("sleep")}

    engine = build(lora_rank=None)
    assert levels(Since110, base_model(), engine) == {"sleep(2)"}
    assert levels(Since023, base_model(), build(lora_rank=None)) == {"sleep(1)"}
    assert levels(Since110, lora_model(), build()) == {"sleep(1)"}, "LoRA buffers live in the weights' pool"
    engine = build(lora_rank=None)
    assert levels(Since110, attach_engine(base_model(), engine), engine) == {"sleep(1)"}
    engine = build()
    assert levels(WithoutSleepCode, attach_engine(lora_model(), engine), engine) == {"sleep(1)"}


def test_each_epoch_without_the_hooks_is_what_the_stub_catches() -> None:
    """The stub must refuse what stock TRL does: 0.25's second eval batch and 0.28's sync into unmapped memory."""
    engine = build(lora_rank=None)
    engine.sleep(level=2)
    with pytest.raises(AssertionError, match="unmapped memory"):
        engine.load_weights()
    engine.wake_up(tags=["weights"])
    engine.wake_up(tags=["kv_cache"])
    with pytest.raises(AssertionError, match="level-2 sleep discarded"):
        engine.generate()


@pytest.mark.parametrize(
    ("engine", "shared", "options", "says"),
    [
        (RecordingEngineStub(sleep=False), False, Options(), "built without enable_sleep_mode=True"),
        (RecordingEngineStub(sleep=True, tells_tags=False), True, Options(), "its weights are the trainer's own, and"),
        (RecordingEngineStub(sleep=True), False, Options(sleep="off"), ""),
    ],
    ids=["no sleep mode", "shared weights out of reach", "off"],
)
def test_an_engine_that_stays_awake_says_why(
    engine: Any, shared: bool, options: Options, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    set_options(options)
    model = attach_engine(lora_model(), engine)
    state_of(engine).shared_weights = shared
    state_of(engine).adapter_sync = RecordingAdapterSync()
    with caplog.at_level(logging.INFO, logger="trlpatch"):
        owner = Since110(model, engine)
        owner.batch()
        owner.batch()
    assert [call for call in engine.calls if "sleep" in call or "wake" in call] == []
    assert len(engine.requests) == 2
    assert says in caplog.text


@pytest.mark.parametrize("epoch", [epoch for epoch in EPOCHS if epoch is not WithoutSync])
@pytest.mark.parametrize(("shared", "wish"), [(True, "auto"), (True, "on"), (False, "kv")])
def test_weights_that_stay_are_never_unmapped_and_never_pushed(epoch: Any, shared: bool, wish: Any) -> None:
    set_options(Options(sleep=wish))
    engine = build()
    model = attach_engine(lora_model(), engine)
    state_of(engine).shared_weights = shared
    owner = epoch(model, engine)
    for step in range(3):
        owner.state.global_step = step
        randomize(model, seed=step)
        owner.batch()
        owner.batch()
    assert len(engine.requests) == 6
    assert engine.calls.count("discard(kv_cache)") >= 6
    assert {"sleep(1)", "sleep(2)", "wake(weights)", "wake(all)", "load_weights"}.isdisjoint(engine.calls)
    assert not state_of(engine).weights_lost


def test_reasons_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = RecordingEngineStub(sleep=False)
    with caplog.at_level(logging.INFO, logger="trlpatch"):
        for _ in range(3):
            hooks.sleep(object(), engine, level=2)
    assert caplog.text.count("stays awake") == 1


def test_an_engine_that_the_user_put_to_sleep_is_woken() -> None:
    engine = build()
    model = attach_engine(lora_model(), engine)
    owner = WithoutSleepCode(model, engine)
    engine.sleep(level=1)
    owner.batch()
    assert engine.calls[:2] == ["sleep(1)", "wake(weights)"]


def test_a_half_woken_engine_goes_back_to_sleep() -> None:
    engine = build()
    owner = Since029(attach_engine(lora_model(), engine), engine)
    hooks.wake_up(owner, engine, tags=["kv_cache"])
    engine.unmapped.add("kv_cache")
    hooks.sleep(owner, engine, level=2)
    assert engine.unmapped == {"weights", "kv_cache"}
    hooks.sleep(owner, engine, level=2)
    assert engine.calls[-1] == "sleep(1)"


def test_lost_weights_without_a_sync_are_refused() -> None:
    engine = build(lora_rank=None)
    owner = WithoutSync(base_model(), engine)
    engine.sleep(level=1)
    state_of(engine).weights_lost = True
    with pytest.raises(StaleAdapter, match="has no weight sync"):
        hooks.lora_request(owner, engine)


def test_a_sync_that_pushes_nothing_is_refused() -> None:
    engine = build(lora_rank=None)
    owner = Since028(base_model(), engine)
    owner.sync_weights = lambda: None  # type: ignore[method-assign]
    with pytest.raises(StaleAdapter, match="its sync pushed nothing"):
        hooks.wake_up(owner, engine, tags=["kv_cache"])


def test_server_mode_and_missing_engines_are_left_alone() -> None:
    engine = build()
    owner = Since025(lora_model(), engine, sleep=False, mode="server")
    for call in (
        lambda: hooks.sleep(owner, engine, level=2),
        lambda: hooks.wake_up(owner, engine),
        lambda: hooks.sleep(owner, None),
        lambda: hooks.wake_up(owner, None),
        lambda: hooks.reload_weights(owner, None),
    ):
        call()
    assert hooks.lora_request(owner, engine) is None
    assert hooks.lora_request(owner, None, "given") == "given"
    assert not hooks.hand_over(owner)
    assert engine.calls == []
