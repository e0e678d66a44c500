"""When an engine's buffers can be updated in place, and what happens where they cannot.

The layers here keep vLLM's interface (`set_lora`, `reset_lora`, stacked buffers); tests/cpu has the real ones.
"""

from __future__ import annotations

import gc
import logging
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("vllm")

from tests.fakes.engine import RecordingEngineStub  # noqa: E402
from tests.fakes.models import lora_model, randomize  # noqa: E402
from trlpatch.engine import guards, publisher  # noqa: E402
from trlpatch.engine.adapter_sync import registry  # noqa: E402
from trlpatch.engine.state import state_of  # noqa: E402
from trlpatch.errors import AdapterNotExpressible  # noqa: E402
from trlpatch.policy.adapter import lora_view  # noqa: E402

pytestmark = pytest.mark.cpu

RANK = 16


class Layer:
    """A linear layer: one slice, or several packed ones."""

    tp_size = 1

    def __init__(self, width: int, *outs: int, slots: int = 1) -> None:
        self.lora_a_stacked = tuple(torch.full((slots, 1, RANK, width), 7.0).bfloat16() for _ in outs)
        self.lora_b_stacked = tuple(torch.full((slots, 1, out, RANK), 7.0).bfloat16() for out in outs)

    def reset_lora(self, index: int) -> None:
        for buffer in (*self.lora_a_stacked, *self.lora_b_stacked):
            buffer[index] = 0

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        self.reset_lora(index)
        if not isinstance(lora_a, list):
            lora_a, lora_b = [lora_a], [lora_b]
        for stacked, parts in ((self.lora_a_stacked, lora_a), (self.lora_b_stacked, lora_b)):
            for buffer, part in zip(stacked, parts, strict=True):
                if part is not None:
                    self.copy(buffer[index, 0], part)

    def copy(self, target: Any, part: Any) -> None:
        target[: part.shape[0], : part.shape[1]].copy_(part)


class Experts(Layer):
    w13_lora_a_stacked = ()


class Sharded(Layer):
    tp_size = 2


class Scaling(Layer):
    """Keeps something else than it is given."""

    def copy(self, target: Any, part: Any) -> None:
        super().copy(target, part * 2)


class OneTensor(Layer):
    """As LogitsProcessorWithLoRA keeps its buffers."""

    def __init__(self, width: int, *outs: int) -> None:
        super().__init__(width, *outs)
        self.lora_a_stacked = self.lora_a_stacked[0]

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        pass


class TwoGroups(Layer):
    """Two slices that one adapter fills (vLLM's `expand_packed_lora`)."""

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        pass


class Transposed(Layer):
    """Square buffers, so that only the contents tell."""

    def copy(self, target: Any, part: Any) -> None:
        super().copy(target, part.t())


class Double(Layer):
    """In another dtype than the adapter."""

    def __init__(self, width: int, *outs: int) -> None:
        super().__init__(width, *outs)
        self.lora_a_stacked = tuple(buffer.double() for buffer in self.lora_a_stacked)


class Manager:
    """LRUCacheLoRAModelManager: a registry of two adapters and one slot, and q, k and v packed."""

    capacity = 2

    def __init__(self, layers: dict[str, Layer]) -> None:
        self.modules = layers
        self.packed_modules = {
            name: [name.replace("qkv_proj", f"{part}_proj") for part in "qkv"] for name in layers if "qkv" in name
        }
        self.model = SimpleNamespace()
        self.registered: dict[int, Any] = {}
        self.lora_index_to_id: list[int | None] = [None]
        self._last_mapping: object = "the last batch"
        self.sets = 0

    def __len__(self) -> int:
        return len(self.registered)

    def get_adapter(self, lora_id: int) -> Any:
        return self.registered.get(lora_id)

    def remove_adapter(self, lora_id: int) -> None:
        self.registered.pop(lora_id, None)
        self.lora_index_to_id = [None if found == lora_id else found for found in self.lora_index_to_id]

    def remove_oldest_adapter(self) -> None:
        self.remove_adapter(next(iter(self.registered)))

    def add_adapter(self, lora: Any) -> None:
        for name, members in self.packed_modules.items():
            found = [lora.loras.pop(member, None) for member in members]
            if any(found):
                parts = [[getattr(one, side, None) for one in found] for side in ("lora_a", "lora_b")]
                lora.loras[name] = SimpleNamespace(lora_a=parts[0], lora_b=parts[1])
        self.registered[lora.id] = lora

    def activate_adapter(self, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            return
        self.lora_index_to_id[0] = lora_id
        for name, layer in self.modules.items():
            entry = self.registered[lora_id].get_lora(name)
            if entry is None:
                layer.reset_lora(0)
            else:
                self.sets += 1
                layer.set_lora(0, entry.lora_a, entry.lora_b)


def engine_with(output: type[Layer] = Layer, *, outs: int = 1, **config: Any) -> RecordingEngineStub:
    """An engine for tests.fakes.models, whose o_proj layers are of one class."""
    layers: dict[str, Layer] = {}
    for index in (0, 1):
        layers[f"model.layers.{index}.self_attn.qkv_proj"] = Layer(16, 16, 8, 8)
        layers[f"model.layers.{index}.self_attn.o_proj"] = output(16, *[16] * outs)
    manager = Manager(layers)
    settings = {"max_lora_rank": RANK, "lora_dtype": torch.bfloat16, "fully_sharded_loras": False, **config}
    lora_config = SimpleNamespace(bias_enabled=False, default_mm_loras=None, **settings)
    worker = SimpleNamespace(
        _adapter_manager=manager,
        lora_config=lora_config,
        list_adapters=lambda: set(manager.registered),
    )
    stub = RecordingEngineStub()
    stub.llm_engine.model_executor.driver_worker = SimpleNamespace(model_runner=SimpleNamespace(lora_manager=worker))
    stub.manager = manager  # type: ignore[attr-defined]
    return stub


def publish(model: Any, engine: Any) -> Any:
    view = lora_view(model)
    assert view is not None
    return publisher.publish(view, view.base, engine)


def expected(model: Any, path: str) -> tuple[Any, Any]:
    """What the engine's slot has to hold of a layer: [RANK, in] and [out, RANK]."""
    layer = model.get_base_model().get_submodule(path)
    adapter = layer.active_adapters[0]
    if adapter not in layer.lora_A:
        return torch.zeros(RANK, layer.in_features), torch.zeros(layer.out_features, RANK)
    a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    b = (b.float() * layer.scaling[adapter]).bfloat16().float()
    missing = RANK - a.shape[0]
    return torch.nn.functional.pad(a.bfloat16().float(), (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))


def assert_holds(engine: Any, model: Any) -> None:
    """Every slot of every layer, whether it is adapted or not."""
    base = model.get_base_model()
    for name, module in engine.manager.modules.items():
        for number, path in enumerate(engine.manager.packed_modules.get(name, [name])):
            layer = base.get_submodule(path)
            a, b = torch.zeros(RANK, 16), torch.zeros(layer.out_features, RANK)
            if hasattr(layer, "lora_A"):
                a, b = expected(model, path)
            assert torch.equal(module.lora_a_stacked[number][0, 0].float(), a), path
            assert torch.equal(module.lora_b_stacked[number][0, 0].float(), b), path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"q_proj": 2, "o_proj": 16}, "alpha_pattern": {"v_proj": 40, "layers.1": 5}},
        {"target_modules": ["q_proj", "v_proj"]},
        {"r": RANK},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_buffers_hold_the_adapter_after_every_update(changes: dict[str, Any], dtype: Any) -> None:
    engine, model = engine_with(), lora_model(**changes).to(dtype)
    requests = []
    for seed in range(3):
        randomize(model, seed=seed)
        requests.append(publish(model, engine))
        assert_holds(engine, model)
        # Should vLLM itself put the adapter into its slot again, the slot gets the newest version.
        engine.manager.lora_index_to_id = [None]
        engine.manager.activate_adapter(registry.LIVE_ID)
        assert_holds(engine, model)
    sync = state_of(engine).adapter_sync
    assert sync is not None
    assert sync.description == "in place"
    assert {request.lora_int_id for request in requests} == {registry.LIVE_ID}
    assert len({request.lora_name for request in requests}) == len({request.lora_path for request in requests}) == 3
    assert [sync.holds(request) for request in requests] == [False, False, True]


def test_the_request_stays_while_the_adapter_does() -> None:
    """Cached prefixes are found by its name."""
    engine, model = engine_with(), lora_model()
    randomize(model)
    first = publish(model, engine)
    for module in engine.manager.modules.values():
        module.lora_b_stacked[0].fill_(3.0)
    assert publish(model, engine) is first
    assert_holds(engine, model)
    with torch.no_grad():
        model.get_base_model().model.layers[1].self_attn.q_proj.lora_A["default"].weight.data[3, 5] += 1e-6
    second = publish(model, engine)
    assert second.lora_name != first.lora_name
    model.get_base_model().model.layers[0].self_attn.q_proj.scaling["default"] = 9.0
    third = publish(model, engine)
    assert third.lora_name != second.lora_name
    assert_holds(engine, model)
    state_of(engine).adapter_sync.invalidate()  # type: ignore[union-attr]
    assert publish(model, engine).lora_name != third.lora_name
    assert publish(lora_model(), engine).lora_name != publish(model, engine).lora_name


def test_a_copy_that_was_interrupted_gets_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model = engine_with(), lora_model()
    first = publish(model, engine)
    randomize(model)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            publish(model, engine)
    assert publish(model, engine).lora_name != first.lora_name
    assert_holds(engine, model)


def test_an_update_registers_nothing() -> None:
    engine, model = engine_with(), lora_model()
    publish(model, engine)
    sets = engine.manager.sets
    for seed in range(3):
        randomize(model, seed=seed)
        publish(model, engine)
    assert engine.manager.sets == sets


def test_fewer_modules_and_lower_ranks_leave_zeroes() -> None:
    from peft import LoraConfig

    engine, model = engine_with(), lora_model(r=RANK)
    model.add_adapter("small", LoraConfig(r=2, lora_alpha=4, target_modules=["v_proj"]))
    randomize(model)
    for adapter in ("default", "small", "default", "small"):
        model.set_adapter(adapter)
        publish(model, engine)
        assert_holds(engine, model)


def test_another_model_of_the_same_structure_is_written_over_it() -> None:
    engine = engine_with()
    for seed in range(2):
        model = lora_model(lora_alpha=3 + seed)
        randomize(model, seed=seed)
        publish(model, engine)
        assert_holds(engine, model)


@pytest.mark.parametrize("change", ["evicted", "replaced", "other slot's adapter", "discarded", "new buffers"])
def test_what_vllm_did_meanwhile_is_noticed(change: str) -> None:
    engine, model = engine_with(), lora_model()
    randomize(model)
    request = publish(model, engine)
    manager, state = engine.manager, state_of(engine)
    assert state.adapter_sync is not None
    assert manager._last_mapping is None
    manager._last_mapping = "the last batch"
    module = manager.modules["model.layers.0.self_attn.qkv_proj"]
    if change == "evicted":
        manager.remove_adapter(registry.LIVE_ID)
        assert not state.adapter_sync.holds(request)
    elif change == "replaced":
        manager.registered[registry.LIVE_ID] = object()
        assert not state.adapter_sync.holds(request)
    elif change == "other slot's adapter":
        manager.lora_index_to_id = [5]
        for layer in manager.modules.values():
            for buffer in (*layer.lora_a_stacked, *layer.lora_b_stacked):
                buffer.fill_(3.0)
    elif change == "discarded":
        for layer in manager.modules.values():
            for buffer in (*layer.lora_a_stacked, *layer.lora_b_stacked):
                buffer.fill_(float("nan"))
        guards.slept(state, 2)
        assert not state.adapter_sync.holds(request)
    else:
        module.lora_a_stacked = tuple(torch.full_like(buffer, 3.0) for buffer in module.lora_a_stacked)
    publish(model, engine)
    assert_holds(engine, model)
    assert manager.lora_index_to_id == [registry.LIVE_ID]
    assert manager._last_mapping is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"output": Experts}, "MoE layers"),
        ({"output": Sharded}, "tensor parallelism"),
        ({"fully_sharded_loras": True}, "fully sharded LoRA"),
        ({"output": Scaling}, "vLLM changes the adapter's tensors"),
        ({"output": Transposed}, "vLLM changes the adapter's tensors"),
        ({"output": OneTensor}, "OneTensor has other lora_a_stacked than one buffer per slice"),
        ({"output": TwoGroups, "outs": 2}, "TwoGroups has other lora_a_stacked than one buffer per slice"),
        ({"output": Double}, "a LoRA buffer of shape [1, 1, 16, 16]"),
    ],
)
def test_anything_unusual_is_registered_anew_each_time(
    settings: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine, model = engine_with(**settings), lora_model()
    with caplog.at_level(logging.INFO, logger="trlpatch"):
        requests = [publish(model, engine) for _ in range(3)]
    sync = state_of(engine).adapter_sync
    assert sync is not None
    assert sync.description.startswith(f"registered anew each time ({says}")
    assert [says in record.message for record in caplog.records if record.name == "trlpatch"] == [True]
    assert len({request.lora_int_id for request in requests}) == 3
    assert set(engine.manager.registered) == {requests[-1].lora_int_id}
    assert [sync.holds(request) for request in requests] == [False, False, True]


def test_copies_inside_vllm_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that copies what it is given would be updated in vain once the slot has to be filled again."""
    original = registry.lora_model

    def copying(*arguments: Any) -> Any:
        lora = original(*arguments)
        for entry in lora.loras.values():
            entry.lora_b = entry.lora_b.clone()
        return lora

    monkeypatch.setattr(registry, "lora_model", copying)
    engine, model = engine_with(), lora_model()
    publish(model, engine)
    assert "vLLM keeps copies of the adapter's tensors" in state_of(engine).adapter_sync.description  # type: ignore[union-attr]


def test_releases_that_ask_for_embedding_modules_get_them() -> None:
    """0.11.2 asserts them for every lora_B."""
    from vllm.lora.lora_model import LoRAModel

    class Old:
        @classmethod
        def from_lora_tensors(
            cls,
            lora_model_id: int,
            tensors: Any,
            peft_helper: Any,
            device: str = "cuda",
            dtype: Any = None,
            embedding_modules: Any = None,
            embedding_padding_modules: Any = None,
            weights_mapper: Any = None,
        ) -> Any:
            assert embedding_modules is not None
            assert embedding_padding_modules is not None
            assert device is None
            return LoRAModel.from_lora_tensors(lora_model_id, tensors, peft_helper, device=None, dtype=dtype)

    engine, model = engine_with(), lora_model()
    engine.llm_engine.model_executor.driver_worker.model_runner.lora_manager._lora_model_cls = Old
    publish(model, engine)
    assert_holds(engine, model)


def test_a_refused_adapter_leaves_the_standing_one() -> None:
    engine, model = engine_with(), lora_model()
    randomize(model)
    request = publish(model, engine)
    with pytest.raises(AdapterNotExpressible, match=r"no LoRA layer for model\.layers\.0\.mlp\.up_proj"):
        publish(lora_model(target_modules=["q_proj", "up_proj"]), engine)
    sync = state_of(engine).adapter_sync
    assert sync is not None
    assert sync.holds(request)
    assert_holds(engine, model)


def test_large_layers_are_scaled_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    from trlpatch.engine.adapter_sync import staging

    monkeypatch.setattr(staging, "_CHUNK", 1)
    engine, model = engine_with(), lora_model()
    for seed in range(2):
        randomize(model, seed=seed)
        publish(model, engine)
        assert_holds(engine, model)


def test_weights_in_inference_mode() -> None:
    """vLLM may have made its buffers in inference mode, and a trainer may roll out in it."""
    model = lora_model()
    randomize(model)
    with torch.inference_mode():
        engine = engine_with()
        publish(model, engine)
    randomize(model, seed=1)
    publish(model, engine)
    assert_holds(engine, model)
    with torch.inference_mode():
        randomize(model, seed=2)
        publish(model, engine)
        assert_holds(engine, model)
    model(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()


def test_an_engine_keeps_no_tensor_of_a_model_that_is_gone() -> None:
    engine, model = engine_with(), lora_model()
    publish(model, engine)
    gone = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert not any(parameter() is not None for parameter in gone)
    model = lora_model()
    publish(model, engine)
    assert_holds(engine, model)


def test_a_model_keeps_no_tensor_of_an_engine_that_is_gone() -> None:
    engine, model = engine_with(), lora_model()
    publish(model, engine)
    targets = state_of(engine).adapter_sync._current.targets  # type: ignore[union-attr]
    gone = [weakref.ref(tensor) for target in targets for tensor in (target.staging, target.slot)]
    del targets
    del engine
    gc.collect()
    assert not any(tensor() is not None for tensor in gone)
    engine = engine_with()
    publish(model, engine)
    assert_holds(engine, model)
