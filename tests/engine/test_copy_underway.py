"""A hand-over that starts before anybody has looked: right when nothing has moved, written over when something has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("vllm")

from tests.engine.test_buffer_copy import RANK, assert_holds, engine_with, publish  # noqa: E402
from tests.fakes.models import lora_model, randomize  # noqa: E402
from trlpatch import attach_engine, hooks  # noqa: E402
from trlpatch.engine import guards, live_request, publisher  # noqa: E402
from trlpatch.engine.adapter_sync import buffer_copy, registry  # noqa: E402
from trlpatch.engine.state import state_of  # noqa: E402
from trlpatch.hooks import adapter_sync  # noqa: E402
from trlpatch.policy import base_weights  # noqa: E402
from trlpatch.policy.adapter import lora_view  # noqa: E402

pytestmark = pytest.mark.cpu


def owner(model: Any, engine: Any) -> Any:
    found = type("Owner", (), {})()
    found.model, found.llm, found.mode = model, engine, "colocate"
    return found


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of every copy that was started."""
    started: list[int] = []
    original = buffer_copy.ForeachCopy.start

    def start(self: Any, *arguments: Any) -> Any:
        started.append(len(started))
        return original(self, *arguments)

    monkeypatch.setattr(buffer_copy.ForeachCopy, "start", start)
    return started


def trained(**changes: Any) -> tuple[Any, Any]:
    engine, model = engine_with(), lora_model(**changes)
    randomize(model)
    attach_engine(model, engine)
    return engine, model


def test_a_check_copies_once_and_keeps_the_request(copies: list[int]) -> None:
    engine, model = trained()
    trainer = owner(model, engine)
    assert hooks.hand_over(trainer)
    request = hooks.lora_request(trainer, engine)
    for check in (lambda: hooks.lora_request(trainer, engine), lambda: live_request.require_request(model, engine)):
        copies.clear()
        assert check() is request
        assert len(copies) == 1
    randomize(model, seed=5)
    copies.clear()
    other = hooks.lora_request(trainer, engine)
    assert other.lora_name != request.lora_name
    assert len(copies) == 1
    assert_holds(engine, model)
    copies.clear()
    assert hooks.hand_over(trainer)
    assert len(copies) == 1
    assert hooks.lora_request(trainer, engine) is other


def test_a_check_waits_for_the_engine_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model = trained()
    trainer, drained = owner(model, engine), []
    assert hooks.hand_over(trainer)
    monkeypatch.setattr(state_of(engine).backend, "drain", lambda: drained.append(1))
    hooks.lora_request(trainer, engine)
    hooks.hand_over(trainer)
    assert len(drained) == 2
    publish(model, engine)
    assert len(drained) == 3


def test_the_copy_starts_before_the_model_is_looked_at(copies: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model = trained()
    trainer, started = owner(model, engine), []
    hooks.hand_over(trainer)
    for module in (adapter_sync, live_request):
        monkeypatch.setattr(module, "lora_view", lambda model: (started.append(len(copies)), lora_view(model))[1])
    for call in (
        lambda: hooks.hand_over(trainer),
        lambda: hooks.lora_request(trainer, engine),
        lambda: live_request.require_request(model, engine),
    ):
        copies.clear()
        started.clear()
        call()
        assert started == [1]


@pytest.mark.parametrize("change", ["data", "parameter", "scaling", "adapter", "model", "evicted", "buffers", "slot"])
def test_what_has_moved_is_handed_over_all_the_same(change: str) -> None:
    engine, model = trained()
    trainer = owner(model, engine)
    hooks.hand_over(trainer)
    before = hooks.lora_request(trainer, engine)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    weight = layer.lora_A["default"].weight
    manager = engine.manager
    if change == "data":
        weight.data = weight.data * 2
    elif change == "parameter":
        layer.lora_A["default"].weight = torch.nn.Parameter(weight.data * 2)
    elif change == "scaling":
        layer.scaling["default"] = 9.0
    elif change == "adapter":
        model.add_adapter("other", model.peft_config["default"])
        model.set_adapter("other")
        randomize(model, seed=8)
    elif change == "model":
        trainer.model = model = attach_engine(lora_model(r=RANK), engine)
        randomize(model, seed=9)
    elif change == "evicted":
        manager.remove_adapter(registry.LIVE_ID)
    elif change == "buffers":
        module = manager.modules["model.layers.0.self_attn.qkv_proj"]
        module.lora_a_stacked = tuple(torch.full_like(buffer, 3.0) for buffer in module.lora_a_stacked)
    else:
        manager.lora_index_to_id = [5]
    after = hooks.lora_request(trainer, engine)
    assert_holds(engine, model)
    if change in ("evicted", "buffers", "slot"):
        assert after is not None
    else:
        assert after.lora_name != before.lora_name


def test_what_moves_while_the_copy_is_underway_is_handed_over(copies: list[int]) -> None:
    engine, model = trained()
    first = publish(model, engine)
    underway = publisher.start(engine)
    assert underway is not None
    q_proj = model.get_base_model().model.layers[0].self_attn.q_proj
    q_proj.lora_A["default"].weight.data = q_proj.lora_A["default"].weight.data * 2
    view = lora_view(model)
    assert view is not None
    second = publisher.publish(view.snapshot(underway), view.base, engine)
    assert second.lora_name != first.lora_name
    assert_holds(engine, model)


def test_a_copy_is_finished_once() -> None:
    """Asked again, the same snapshot stands for a later moment, and what was trained since has to be copied."""
    engine, model = trained()
    publish(model, engine)
    view = lora_view(model)
    assert view is not None
    snapshot = view.snapshot(publisher.start(engine))
    first = publisher.publish(snapshot, view.base, engine)
    randomize(model, seed=3)
    second = publisher.publish(snapshot, view.base, engine)
    assert second.lora_name != first.lora_name
    assert_holds(engine, model)


def test_a_copy_that_nobody_finished_ends_the_name() -> None:
    engine, model = trained()
    first = publish(model, engine)
    randomize(model, seed=4)
    assert publisher.start(engine) is not None
    second = publish(model, engine)
    assert second.lora_name != first.lora_name
    randomize(model, seed=4)
    assert publish(model, engine) is second


def test_nothing_is_started_where_nothing_can_be_done_ahead() -> None:
    engine, model = trained()
    assert publisher.start(engine) is None
    publish(model, engine)
    assert publisher.start(engine) is not None
    engine.llm_engine.has_unfinished_requests = lambda: True
    assert publisher.start(engine) is None
    engine.llm_engine.has_unfinished_requests = lambda: False
    guards.slept(state_of(engine), 2)
    assert publisher.start(engine) is None
    publish(model, engine)
    del model, engine.llm_engine.has_unfinished_requests
    fallen = engine_with(fully_sharded_loras=True)
    publish(lora_model(), fallen)
    assert publisher.start(fallen) is None


def test_the_base_is_looked_at_by_the_copy_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums are made once per answer of the copy, and again when the answer is another one."""
    model = lora_model()
    view = lora_view(model)
    assert view is not None
    summed: list[int] = []
    original = base_weights.ContentSums.numbers
    monkeypatch.setattr(base_weights.ContentSums, "numbers", lambda self: (summed.append(1), original(self))[1])
    glance: list[object] = [("copy", 1)]
    asked: list[object] = []
    underway: Any = SimpleNamespace(base_glance=lambda spots: (asked.append(spots), glance[0])[1])
    marks = [base_weights.base_mark(view.snapshot(underway)) for _ in range(3)]
    assert marks[0] == marks[1] == marks[2]
    assert len(summed) == 1
    spots = base_weights.spots_under(view.weights("default"))
    assert spots is not None
    assert all(one is spots for one in asked)
    with torch.no_grad():
        base = view.layers[2][1].get_base_layer().weight
        base.data.view(-1)[(base.numel() - 1) // 2] += 1
    glance[0] = ("copy", 2)
    assert base_weights.base_mark(view.snapshot(underway)) != marks[0]
    assert len(summed) == 2
    glance[0] = None
    base_weights.base_mark(view.snapshot(underway))
    base_weights.base_mark(view)
    assert len(summed) == 4
