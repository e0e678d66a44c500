"""When the hooks write weights in place, hand an adapter over, or let TRL push; and what sleep makes of it."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.engine import RecordingAdapterSync, RecordingEngineStub  # noqa: E402
from tests.fakes.fused import LoadingStub, assert_holds  # noqa: E402
from tests.fakes.models import base_model, lora_model, randomize  # noqa: E402
from tests.fakes.owners import Since026, Since110, WithoutSleepCode, WithoutSync  # noqa: E402
from trlpatch import hooks  # noqa: E402
from trlpatch.engine.attach import attach_engine, detach_engine  # noqa: E402
from trlpatch.engine.describe import describe  # noqa: E402
from trlpatch.engine.state import state_of  # noqa: E402
from trlpatch.engine.weights_in_place import merge  # noqa: E402
from trlpatch.errors import AdapterNotExpressible, EngineMismatch, SharedWeights  # noqa: E402
from trlpatch.options import Options  # noqa: E402
from trlpatch.options import activate as set_options  # noqa: E402

pytestmark = pytest.mark.torch


class WritableEngineStub(RecordingEngineStub):
    """With a model inside; a level-2 sleep destroys its weights."""

    def __init__(self, model: Any, **settings: Any) -> None:
        super().__init__(**settings)
        self.module = LoadingStub(model)
        self.llm_engine.model_executor.driver_worker.model_runner = SimpleNamespace(get_model=lambda: self.module)
        self.llm_engine.add_request = lambda *_, **__: None
        self.llm_engine.sleep, self.llm_engine.wake_up = self.sleep, self.wake_up

    def sleep(self, level: int = 1) -> None:
        super().sleep(level)
        self.weights = "the module's"
        if level == 2:
            with torch.no_grad():
                for parameter in self.module.parameters():
                    parameter.fill_(float("nan"))


def train(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def full() -> Any:
    return base_model()


def dora() -> Any:
    return lora_model(use_dora=True, modules_to_save=["lm_head"])


def above() -> Any:
    return lora_model(r=32)


@pytest.mark.parametrize("epoch", [Since026, Since110, WithoutSleepCode, WithoutSync])
@pytest.mark.parametrize("build", [full, dora, above])
@pytest.mark.parametrize("lora_rank", [16, None])
def test_every_rollout_has_the_weights_of_its_step(epoch: Any, build: Any, lora_rank: int | None) -> None:
    """Without LoRA in the engine TRL's level 2 is used: it discards what was written."""
    model = build()
    engine = WritableEngineStub(base_model(), sleep=True, lora_rank=lora_rank)
    owner = epoch(model, engine)
    generate = engine.generate

    def checked(*args: Any, lora_request: Any = None, **kwargs: Any) -> Any:
        assert lora_request is None
        assert_holds(engine.module, model)
        return generate(*args, **kwargs)

    engine.generate = checked  # type: ignore[method-assign]
    for step in range(3):
        owner.state.global_step = step
        owner.batch()
        owner.batch()
        train(model, step)
    assert sum("generate" in call for call in engine.calls) == 6
    assert "load_weights" not in engine.calls


@pytest.mark.parametrize(
    ("build", "says", "level"), [(full, "full fine-tuning", "INFO"), (dora, "DoRA|modules_to_save", "WARNING")]
)
def test_the_way_and_its_reason_are_said_once(build: Any, says: str, level: str, caplog: Any) -> None:
    owner = Since110(build(), WritableEngineStub(base_model()), sleep=False)
    with caplog.at_level(logging.INFO, logger="trlpatch"):
        assert hooks.hand_over(owner)
        assert hooks.hand_over(owner)
    said = [record for record in caplog.records if "written into the engine in place" in record.message]
    assert [record.levelname for record in said] == [level]
    assert any(word in said[0].message for word in says.split("|"))
    said_now = describe(owner.llm, state_of(owner.llm))
    assert "weights written in place (torch, write 2)" in said_now or "(torch, write 2), where" in said_now
    assert "adapter none (the policy is in the weights)" in said_now


def test_a_plain_adapter_is_a_request_unless_merging_is_asked_for() -> None:
    engine = WritableEngineStub(base_model())
    state_of(engine).adapter_sync = RecordingAdapterSync()
    model = lora_model()
    owner = Since110(model, engine, sleep=False)
    assert hooks.hand_over(owner)
    assert hooks.lora_request(owner, engine) is not None
    set_options(Options(adapter="merge"))
    randomize(model)
    assert hooks.hand_over(owner)
    assert hooks.lora_request(owner, engine) is None
    assert_holds(engine.module, model)


@pytest.mark.parametrize("build", [lora_model, dora, full])
def test_off_lets_trl_push(build: Any) -> None:
    set_options(Options(adapter="off"))
    engine = WritableEngineStub(base_model())
    Since110(build(), engine, sleep=False).batch()
    assert "load_weights" in engine.calls
    assert state_of(engine).policy_location == "policy"


@pytest.mark.parametrize("build", [lora_model, dora, full])
def test_no_push_starts_where_vllm_has_no_place_for_it(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA layers without `load_weights`, as those of vLLM 0.23: its loader raises in the middle of the push."""
    set_options(Options(adapter="off"))
    engine = WritableEngineStub(base_model())
    wrapper = engine.module.get_submodule("model.layers.0.self_attn.qkv_proj")
    monkeypatch.setattr(wrapper, "can_replace_layer", lambda: True, raising=False)
    with pytest.raises(EngineMismatch, match=r"0\.self_attn\.qkv_proj' is a LoRA layer .* without enable"):
        hooks.hand_over(Since110(build(), engine, sleep=False))
    assert "load_weights" not in engine.calls
    monkeypatch.setattr(wrapper, "load_weights", lambda weights: None, raising=False)  # vLLM 0.28's
    assert not hooks.hand_over(Since110(build(), engine, sleep=False))


def test_request_forbids_it() -> None:
    set_options(Options(adapter="request"))
    with pytest.raises(AdapterNotExpressible, match='adapter="request"'):
        hooks.hand_over(Since110(dora(), WritableEngineStub(base_model()), sleep=False))


def test_merge_is_an_error_where_weights_cannot_be_written() -> None:
    set_options(Options(adapter="merge"))
    with pytest.raises(AdapterNotExpressible, match="cannot be written in place: the engine's worker runs in another"):
        hooks.hand_over(Since110(lora_model(), RecordingEngineStub(), sleep=False))
    engine = WritableEngineStub(base_model())
    state_of(engine).shared_weights = True
    with pytest.raises(SharedWeights, match='adapter="merge"; weights cannot be written in place: the engine'):
        hooks.hand_over(Since110(lora_model(), engine, sleep=False))


def test_a_policy_that_moved_without_a_sync_is_written_before_the_rollout() -> None:
    set_options(Options(adapter="merge"))
    model, engine = lora_model(), WritableEngineStub(base_model())
    owner = Since110(model, engine, sleep=False)
    owner.batch()
    resets = engine.calls.count("reset_prefix_cache")
    owner.generate()
    assert engine.calls.count("reset_prefix_cache") == resets, "nothing moved: cached prefixes stay good"
    randomize(model)
    owner.generate()
    assert_holds(engine.module, model)
    with model.disable_adapter():
        owner.generate()
        assert_holds(engine.module, model, adapters=False)
    owner.generate()
    assert_holds(engine.module, model)
    assert engine.calls.count("reset_prefix_cache") == resets + 3


@pytest.mark.parametrize("build", [full, dora])
def test_an_interrupt_in_the_first_write_is_made_up_for_before_the_rollout(build: Any, monkeypatch: Any) -> None:
    """TRL has noted the step as synchronised, or has not: it need not sync again."""
    model, engine = build(), WritableEngineStub(base_model())
    train(model, 0)
    owner = Since110(model, engine, sleep=False)
    copy_all, write, writes = merge.copy_all, merge.write, []

    def interrupted(*arguments: Any) -> None:
        writes.append(arguments)
        if len(writes) == 5:
            raise KeyboardInterrupt
        write(*arguments)

    def half(pairs: list[Any]) -> None:
        copy_all(pairs[: len(pairs) // 2])
        if build is full and not writes:
            writes.append(pairs)
            raise KeyboardInterrupt
        copy_all(pairs[len(pairs) // 2 :])

    monkeypatch.setattr(merge, "write", interrupted)
    monkeypatch.setattr(merge, "copy_all", half)
    with pytest.raises(KeyboardInterrupt):
        owner.sync_weights()
    assert state_of(engine).torn
    owner.generate()
    assert_holds(engine.module, model)
    assert not state_of(engine).torn


def test_detaching_gives_the_engine_its_base_weights_back() -> None:
    set_options(Options(adapter="merge"))
    model, engine = lora_model(), WritableEngineStub(base_model())
    attach_engine(model, engine, check=False)
    randomize(model)
    owner = Since110(model, engine, sleep=False)
    owner.batch()
    assert_holds(engine.module, model)
    detach_engine(model)
    assert_holds(engine.module, model, adapters=False)
