"""Weights in place on a stand-in for vLLM's model, whose loader loads as vLLM's does. tests/cpu has the real one."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.fused import PACKED, LoadingStub, assert_holds, idle_engine_over  # noqa: E402
from tests.fakes.models import base_model, lora_model, randomize  # noqa: E402
from trlpatch.engine import probes  # noqa: E402
from trlpatch.engine.sharing.names import EngineNames  # noqa: E402
from trlpatch.engine.state import state_of  # noqa: E402
from trlpatch.engine.weights_in_place import merge, plan  # noqa: E402
from trlpatch.engine.weights_in_place.plan import NotInPlace, plan_for, prove  # noqa: E402
from trlpatch.engine.weights_publisher import holds_policy, refresh, write_base, write_policy  # noqa: E402
from trlpatch.errors import EngineBusy, StaleAdapter  # noqa: E402
from trlpatch.policy.adapter import base_of  # noqa: E402
from trlpatch.policy.policy_weights import policy_weights  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture(params=[True, False], ids=["wrapped by LoRA", "plain"])
def rig(request: Any) -> Any:
    module = LoadingStub(base_model(), lora=request.param)
    return module, idle_engine_over(module)


def test_every_weight_is_written_and_asked_for_by_content(rig: Any) -> None:
    module, engine = rig
    model = lora_model(use_dora=True, modules_to_save=["lm_head"])
    assert not holds_policy(model, engine)
    addresses = [parameter.data_ptr() for parameter in module.parameters()]
    for seed in range(3):
        randomize(model, seed=seed)
        assert not holds_policy(model, engine)
        assert write_policy(model, engine) is None
        assert holds_policy(model, engine)
        assert_holds(module, model)
    norm = model.get_base_model().model.norm.weight.data
    norm.mul_(2)
    assert not holds_policy(model, engine), "a frozen parameter that was written without its version moving"
    norm.div_(2)
    assert holds_policy(model, engine)
    assert engine.resets == 3
    assert addresses == [parameter.data_ptr() for parameter in module.parameters()], "graphs read these"
    assert not module.loaded, "every weight was found in its place"
    assert "rows" not in str(state_of(engine).weights_writer.description)
    write_base(model, engine)
    assert_holds(module, model, adapters=False)
    refresh(model, engine)
    assert_holds(module, model)


def test_weights_that_are_not_the_checkpoints_are_proven_by_the_engines_own_loader() -> None:
    module = LoadingStub(base_model(), lora=False)
    model = base_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert write_policy(model, idle_engine_over(module)) is None
    assert module.loaded == [name for name, _ in model.named_parameters()]
    assert_holds(module, model)


def test_loaders_that_know_layers_under_lora_by_their_inner_names_only() -> None:
    """vLLM 0.23: a KeyError for a weight, and a bias is passed over without a word."""

    class Older(LoadingStub):
        def load_weights(self, weights: Any) -> None:
            for name, value in weights:
                inner = ".base_layer." in name
                if "proj" in name and not inner:
                    if name.endswith(".bias"):
                        continue
                    raise KeyError(name)
                super().load_weights([(name.replace(".base_layer.", "."), value)])

    module, model = Older(base_model()), base_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert write_policy(model, idle_engine_over(module)) is None
    assert_holds(module, model)


def test_a_loader_that_changes_what_it_loads_is_found_out() -> None:
    """GPT-NeoX's query-key-value, Mamba's A: the shape is right, and the contents are not."""

    class Rearranging(LoadingStub):
        def load_weights(self, weights: Any) -> None:
            super().load_weights(
                [(name, value.flip(0)) if "k_proj" in name else (name, value) for name, value in weights]
            )

    module = Rearranging(base_model(), lora=False)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    model = base_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    engine = idle_engine_over(module)
    for _ in range(2):
        assert "puts 'model.layers.0.self_attn.k_proj" in str(write_policy(model, engine))
    assert not state_of(engine).torn
    assert state_of(engine).policy_location == "checkpoint"
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())


def _without_norm(module: Any, model: Any) -> None:
    model.model.norm = torch.nn.Identity()


def _extra(module: Any, model: Any) -> None:
    module.register_parameter("extra", torch.nn.Parameter(torch.ones(3)))


def _quantized(module: Any, model: Any) -> None:
    module.get_submodule("model.layers.0.mlp.down_proj").quant_method = type("Fp8LinearMethod", (), {})()


def _absorbed(module: Any, model: Any) -> None:
    module.get_submodule("model.layers.1").W_UV = torch.ones(1)


def _transposed(module: Any, model: Any) -> None:
    owner = module.get_submodule("model.layers.0.self_attn.o_proj")
    owner.weight = torch.nn.Parameter(owner.weight.detach().T)  # as large: 16 x 16


def _repacked(module: Any, model: Any) -> None:
    module.get_submodule("model.layers.0.mlp.down_proj").weight = torch.nn.Parameter(torch.empty(0))


def _unequal_rows(module: Any, model: Any) -> None:
    module.get_submodule("model.layers.0.self_attn.qkv_proj").output_sizes = [8, 8]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_without_norm, "no parameter of the model goes into all of the engine's 'model.norm.weight'"),
        (_extra, "no parameter of the model goes into all of the engine's 'extra'"),
        (_quantized, "Fp8LinearMethod"),
        (_absorbed, "keeps products of its weights"),
        (_transposed, "o_proj.weight. have the strides"),
        (_repacked, "repacked"),
        (_unequal_rows, "is packed in the engine's"),
    ],
)
def test_layouts_that_are_not_plain_are_refused_with_the_reason(change: Any, says: str) -> None:
    model = base_model()
    module = LoadingStub(model, lora=False)
    change(module, model)
    with pytest.raises(NotInPlace, match=says):
        plan_for(policy_weights(model), module)


def test_two_weights_for_one_parameter_are_refused() -> None:
    module = LoadingStub(base_model(), lora=False)
    module.packed_modules_mapping = {**PACKED, "gate_up_proj": ["gate_proj", "gate_proj"]}
    with pytest.raises(NotInPlace, match="no parameter for"):
        plan_for(policy_weights(base_model()), module)


def test_tied_weights_are_written_once_and_with_an_adapter_on_one_of_them_not_at_all() -> None:
    model = base_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    module = LoadingStub(model, lora=False, tied=True)
    found = plan_for(policy_weights(model), module)
    assert found.targets.count(None) == 1
    prove(found, policy_weights(model), module, {})
    adapted = lora_model(model, target_modules=["lm_head"])
    with pytest.raises(NotInPlace, match="are one weight"):
        plan_for(policy_weights(adapted), module)


def test_an_interrupted_write_answers_nothing_until_a_whole_one(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, engine = rig
    model = lora_model()
    assert write_policy(model, engine) is None
    engine.llm_engine.add_request("0", "prompt", None)
    randomize(model, seed=3)
    writes, write = [], merge.write

    def interrupted(weight: Any, target: Any) -> None:
        writes.append(weight.path)
        if len(writes) == 3:
            raise KeyboardInterrupt
        write(weight, target)

    monkeypatch.setattr(merge, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_policy(model, engine)
    assert state_of(engine).torn
    assert not holds_policy(model, engine)
    with pytest.raises(StaleAdapter, match="half-written"):
        engine.llm_engine.add_request("1", "prompt", None)
    refresh(model, engine)
    engine.llm_engine.add_request("2", "prompt", None)
    assert_holds(module, model)


def test_a_vocabulary_that_the_engine_has_no_room_for_is_named(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, engine = rig
    model = lora_model()
    size = model.config.vocab_size
    monkeypatch.setattr(probes, "vocabulary_size", lambda llm: size)
    assert write_policy(model, engine) is None
    model.resize_token_embeddings(size + 16, mean_resizing=False)
    with pytest.raises(StaleAdapter, match=f"vocabulary of {size + 16} tokens, the engine of {size}"):
        refresh(model, engine)
    assert not state_of(engine).torn
    assert not module.loaded


def test_an_engine_with_unfinished_requests_is_left_alone(rig: Any) -> None:
    module, engine = rig
    model = lora_model()
    randomize(model)
    engine.llm_engine.unfinished = True
    with pytest.raises(EngineBusy, match="two policies; nothing was changed"):
        write_policy(model, engine)
    assert_holds(module, model, adapters=False)
    assert not state_of(engine).torn


def test_prefixes_that_cannot_be_dropped_leave_the_engine_unusable_until_they_can(rig: Any) -> None:
    module, engine = rig
    model = lora_model()
    reset, engine.reset_prefix_cache = engine.reset_prefix_cache, lambda: False
    with pytest.raises(EngineBusy, match="prefix cache"):
        write_policy(model, engine)
    assert not holds_policy(model, engine)
    with pytest.raises(StaleAdapter, match="half-written"):
        engine.llm_engine.add_request("1", "prompt", None)
    engine.reset_prefix_cache = reset
    refresh(model, engine)
    assert_holds(module, model)


def test_while_weights_are_merged_a_request_for_an_adapter_is_refused(rig: Any) -> None:
    _, engine = rig
    assert write_policy(lora_model(), engine) is None
    from types import SimpleNamespace

    request = SimpleNamespace(lora_name="other", lora_int_id=3, lora_path="/nowhere")
    with pytest.raises(StaleAdapter, match="the adapter 'other', while the engine's weights are a policy"):
        engine.llm_engine.add_request("1", "prompt", None, lora_request=request)


def test_shared_weights_are_never_written() -> None:
    engine = idle_engine_over(LoadingStub(base_model()))
    state_of(engine).shared_weights = True
    assert write_policy(lora_model(), engine) == "the engine's weights are the trainer's own"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_float32_and_rounded_once(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "CHUNK", 100)  # several chunks, the last shorter
    model = lora_model(base_model().to(dtype), target_modules=["q_proj", "down_proj"])
    randomize(model, seed=1)
    module = LoadingStub(base_model().to(dtype))
    engine = idle_engine_over(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert write_policy(model, engine) is None
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        layer = base_of(model).get_submodule(path)
        a, b = layer.lora_A.default.weight.double(), layer.lora_B.default.weight.double()
        right = (layer.base_layer.weight.double() + layer.scaling["default"] * b @ a).to(dtype)
        found = EngineNames(module).view(f"{path}.weight", right.shape)
        assert (found == right).float().mean() > 0.99, "but for ties at the last bit of float32"
    assert "round back to the base's" in state_of(engine).weights_writer.description


def test_a_plan_ends_when_the_engines_parameters_move_and_with_its_model(rig: Any) -> None:
    module, engine = rig
    model = lora_model()
    assert write_policy(model, engine) is None
    norm = module.get_submodule("model.norm")
    norm.weight = type(norm.weight)(norm.weight.detach().clone())
    randomize(model)
    assert write_policy(model, engine) is None
    assert_holds(module, model)
    gone = weakref.ref(base_of(model))
    del model
    import gc

    gc.collect()
    assert gone() is None


def test_patterns_tell_tensors_and_places_apart() -> None:
    one, other = (plan._pattern(torch.empty(40, 300), number) for number in (0, 1))
    assert not torch.equal(one, other)
    assert torch.equal(one.bfloat16().float(), one)
    assert len({tuple(row) for row in one.tolist()}) == 40
