from __future__ import annotations

import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.engine.models import base_model, lora_model, randomize  # noqa: E402
from tests.engine.stub import RecordingEngineStub, RecordingHandover  # noqa: E402
from tests.hooks.owners import Since110, WithoutSync  # noqa: E402
from trlpatch import hooks  # noqa: E402
from trlpatch.engine.adapter_sync import registry  # noqa: E402
from trlpatch.engine.attach import attach_engine  # noqa: E402
from trlpatch.engine.state import state_of  # noqa: E402
from trlpatch.errors import AdapterNotExpressible, SharedWeights, StaleAdapter  # noqa: E402
from trlpatch.hooks.adapter_sync import resync  # noqa: E402
from trlpatch.hooks.settings import set_options  # noqa: E402
from trlpatch.options import Options  # noqa: E402

pytestmark = pytest.mark.cpu


def build(**settings: Any) -> RecordingEngineStub:
    engine = RecordingEngineStub(**settings)
    state_of(engine).handover = RecordingHandover()
    return engine


def published(engine: Any) -> int:
    return len(state_of(engine).handover.published)  # type: ignore[union-attr]


@pytest.mark.parametrize("names_separate", [True, False])
def test_a_hand_over_always_publishes_and_no_cached_prefix_survives_it(
    names_separate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clearing the cache walks all its blocks: done only where a new name is not enough."""
    monkeypatch.setattr(registry, "names_separate_prefixes", lambda: names_separate)
    engine = build()
    owner = Since110(lora_model(), engine, sleep=False)
    assert hooks.hand_over(owner)
    assert hooks.hand_over(owner)
    assert published(engine) == 2
    assert engine.calls == [] if names_separate else ["reset_prefix_cache"] * 2


def test_a_prefix_cache_that_cannot_be_cleared_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "names_separate_prefixes", lambda: False)
    engine = build()
    engine.reset_prefix_cache = lambda: False  # type: ignore[method-assign,assignment]  # requests are unfinished
    with pytest.raises(StaleAdapter, match="cached prefixes"):
        hooks.hand_over(Since110(lora_model(), engine, sleep=False))
    assert state_of(engine).published is None


def test_a_forgotten_sync_is_made_up_for() -> None:
    engine = build()
    model = lora_model()
    owner = Since110(model, engine, sleep=False)
    first = hooks.lora_request(owner, engine)
    assert hooks.lora_request(owner, engine) is first
    randomize(model)
    assert hooks.lora_request(owner, engine).lora_name == "v2"
    state_of(engine).handover.evicted = True  # type: ignore[union-attr]
    assert hooks.lora_request(owner, engine).lora_name == "v3"


def test_the_request_of_the_call_wins() -> None:
    engine = build()
    assert hooks.lora_request(Since110(lora_model(), engine, sleep=False), engine, "mine") == "mine"


def test_a_disabled_adapter_is_not_sent() -> None:
    engine = build()
    model = lora_model()
    owner = Since110(model, engine, sleep=False)
    with model.disable_adapter():
        assert hooks.lora_request(owner, engine) is None
    assert hooks.lora_request(owner, engine) is not None


class Wrapper(torch.nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module


def test_wrapped_models_are_handed_over() -> None:
    engine = build()
    owner = Since110(Wrapper(torch.compile(lora_model())), engine, sleep=False)
    assert hooks.hand_over(owner)


@pytest.mark.parametrize(
    ("model", "engine", "adapter", "says", "level"),
    [
        (lambda: base_model(), {}, "auto", "full fine-tuning", "INFO"),
        (lambda: lora_model(), {}, "off", 'adapter="off"', "INFO"),
        (lambda: lora_model(use_dora=True), {}, "auto", "DoRA", "WARNING"),
        (lambda: lora_model(r=32), {}, "auto", "its rank 32 is above the engine's max_lora_rank=16", "WARNING"),
        (lambda: lora_model(), {"lora_rank": None}, "auto", "built without enable_lora=True", "WARNING"),
    ],
    ids=["full", "off", "dora", "rank", "engine without LoRA"],
)
def test_trls_own_sync_runs_and_the_reason_is_said_once(
    model: Any, engine: Any, adapter: Any, says: str, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    set_options(Options(adapter=adapter))
    stub = build(**engine)
    owner = Since110(model(), stub, sleep=False)
    with caplog.at_level(logging.INFO, logger="trlpatch"):
        for step in range(3):
            owner.state.global_step = step
            owner.batch()
    assert [call for call in stub.calls if "generate" in call] == ["generate(base, policy)"] * 3
    assert published(stub) == 0
    assert [record.levelname for record in caplog.records if says in record.message] == [level]


def test_request_forbids_the_full_sync() -> None:
    set_options(Options(adapter="request"))
    for model in (lora_model(use_dora=True), base_model()):
        with pytest.raises(AdapterNotExpressible, match='adapter="request"'):
            hooks.hand_over(Since110(model, build(), sleep=False))
    assert hooks.hand_over(Since110(lora_model(), build(), sleep=False))
    assert not hooks.hand_over(Since110(lora_model(), build(), sleep=False, mode="server"))


@pytest.mark.parametrize(
    ("model", "adapter", "says"),
    [
        (lambda: base_model(), "auto", "full fine-tuning"),
        (lambda: lora_model(use_dora=True), "auto", "DoRA"),
        (lambda: lora_model(r=32), "auto", "its rank 32"),
        (lambda: lora_model(), "off", 'adapter="off"'),
        (lambda: merged(lora_model()), "auto", "it is merged into the base weights"),
    ],
    ids=["full", "dora", "rank", "off", "merged"],
)
def test_nothing_is_pushed_into_weights_that_the_trainer_shares(model: Any, adapter: Any, says: str) -> None:
    set_options(Options(adapter=adapter))
    engine = build()
    state_of(engine).shared_weights = True
    owner = Since110(model(), engine, sleep=False)
    with pytest.raises(SharedWeights, match=re.escape(says)):
        owner.batch()
    with pytest.raises(SharedWeights, match="because"):
        resync(owner, engine, state_of(engine), "because")
    assert engine.calls == []


def test_shared_weights_roll_out_with_the_adapter() -> None:
    engine = build()
    state_of(engine).shared_weights = True
    Since110(lora_model(), engine, sleep=False).batch()
    assert [request.lora_name for request in engine.requests] == ["v1"]


def merged(model: Any) -> Any:
    model.merge_adapter()
    return model


def test_after_a_full_sync_requests_would_count_the_adapter_twice() -> None:
    engine = build()
    set_options(Options(adapter="off"))
    owner = Since110(lora_model(), engine, sleep=False)
    owner.batch()
    set_options(Options())
    owner.batch()
    assert not hooks.hand_over(owner)
    assert engine.requests == [None, None]


def test_an_adapter_that_becomes_inexpressible_is_merged_before_the_next_rollout() -> None:
    engine = build()
    model = lora_model()
    owner = Since110(model, engine, sleep=False)
    owner.batch()
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    owner.batch()
    assert [call for call in engine.calls if "generate" in call] == [
        "generate(v1, checkpoint)",
        "generate(base, policy)",
    ]


def test_without_a_sync_such_an_adapter_is_an_error() -> None:
    engine = build()
    owner = WithoutSync(lora_model(use_dora=True), engine)
    with pytest.raises(StaleAdapter, match="DoRA"):
        hooks.lora_request(owner, engine)


def test_modules_that_the_engine_lacks_fall_back_to_the_full_sync(caplog: pytest.LogCaptureFixture) -> None:
    engine = build()

    def refuse(_: Any) -> Any:
        raise AdapterNotExpressible("the engine's model has no LoRA layer for model.layers.0.mlp.gate")

    state_of(engine).handover.publish = refuse  # type: ignore[union-attr,method-assign]
    owner = Since110(lora_model(), engine, sleep=False)
    owner.batch()
    owner.batch()
    assert engine.requests == [None, None]
    assert caplog.text.count("no LoRA layer for model.layers.0.mlp.gate") == 1


def test_the_request_for_user_code() -> None:
    import trlpatch

    engine = build()
    model = lora_model()
    with pytest.raises(AdapterNotExpressible, match="no engine is attached"):
        trlpatch.lora_request(model)
    attach_engine(model, engine)
    assert trlpatch.lora_request(model).lora_name == "v1"
    randomize(model)
    assert trlpatch.lora_request(model).lora_name == "v2"
    with model.disable_adapter():
        assert trlpatch.lora_request(model) is None
    state_of(engine).weights_lost = True
    with pytest.raises(StaleAdapter, match="only the trainer can push them"):
        trlpatch.lora_request(model)


def test_the_owner_may_be_a_trainer_above_a_generation() -> None:
    engine = build()
    generation = Since110(lora_model(), engine, sleep=False)
    trainer = SimpleNamespace(model=generation.model, vllm_generation=generation, args=None)
    assert hooks.lora_request(trainer, engine).lora_name == "v1"
