from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from tests.engine.models import base_model, lora_model  # noqa: E402
from tests.engine.stub import RecordingEngineStub  # noqa: E402
from trlpatch.engine.expressible import rank_of, why_not_lora, why_not_on_engine  # noqa: E402
from trlpatch.engine.state import state_of  # noqa: E402
from trlpatch.policy.adapter import lora_view  # noqa: E402

pytestmark = pytest.mark.cpu


def reason(model: Any) -> str | None:
    view = lora_view(model)
    assert view is not None
    return why_not_lora(view)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"init_lora_weights": "gaussian"},
        {"lora_dropout": 0.1},
    ],
)
def test_plain_lora_can_be_sent(changes: dict[str, Any]) -> None:
    assert reason(lora_model(**changes)) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias=True"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"init_lora_weights": "pissa"}, "rewrites the base weights"),
        ({"init_lora_weights": "olora"}, "rewrites the base weights"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication"),
        ({"target_modules": [], "target_parameters": ["mlp.gate_proj.weight"]}, "target_parameters"),
    ],
)
def test_what_vllm_cannot_express_is_named(changes: dict[str, Any], says: str) -> None:
    found = reason(lora_model(**changes))
    assert found is not None
    assert says in found


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "IA3Config is not a LoRA adapter"),
        (peft.LoHaConfig(target_modules=["q_proj"]), "LoHaConfig is not a LoRA adapter"),
        (peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "learns a prompt"),
    ],
)
def test_other_adapters_are_named(config: Any, says: str) -> None:
    found = reason(peft.get_peft_model(base_model(), config))
    assert found is not None
    assert says in found


def test_a_second_adapter_matters_only_while_it_is_active() -> None:
    model = lora_model()
    model.add_adapter("ref", model.peft_config["default"])
    assert reason(model) is None
    model.base_model.set_adapter(["default", "ref"])
    assert reason(model) == "2 adapters are active (default, ref); a request carries one"


def test_sharded_and_absent_parameters_are_named() -> None:
    model = lora_model()
    view = lora_view(model)
    assert view is not None
    _, a, b, _ = view.pairs("default")[0]
    a.ds_id = 1
    assert reason(model) == "its parameters are sharded by DeepSpeed ZeRO-3"
    del a.ds_id
    b.data = torch.empty(0)
    assert "hold no data" in str(reason(model))


def test_an_adapter_that_is_disabled_in_some_layers_only() -> None:
    model = lora_model()
    view = lora_view(model)
    assert view is not None
    view.layers[0][1].enable_adapters(False)
    assert "disabled in some layers only" in str(reason(model))


@pytest.mark.parametrize(
    ("engine", "holds", "says"),
    [
        (RecordingEngineStub(), "checkpoint", None),
        (RecordingEngineStub(lora_rank=None), "checkpoint", "built without enable_lora=True"),
        (RecordingEngineStub(lora_rank=8), "checkpoint", "its rank 12 is above the engine's max_lora_rank=8"),
        (RecordingEngineStub(), "policy", "replaced by a full-weight sync"),
    ],
)
def test_what_one_engine_cannot_take(engine: RecordingEngineStub, holds: Any, says: str | None) -> None:
    view = lora_view(lora_model(rank_pattern={"o_proj": 12}))
    assert view is not None
    assert rank_of(view) == 12
    state_of(engine).holds = holds
    found = why_not_on_engine(view, engine)
    assert found is says is None or (says is not None and says in str(found))
