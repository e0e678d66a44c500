"""Base weights shared with a stand-in of vLLM's model, on whatever transformers is there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.engine import RecordingEngineStub  # noqa: E402
from tests.fakes.fused import FusedModelStub, engine_over  # noqa: E402
from tests.fakes.models import base_model, lora_model  # noqa: E402
from tests.gpu.sharing_archs import ARCHITECTURES, VOCABULARY, checkpoint  # noqa: E402
from trlpatch.engine.attach import attach_engine  # noqa: E402
from trlpatch.engine.sharing import model_over_engine, overlaps, unsupported_reason, verify_overlap  # noqa: E402
from trlpatch.engine.sharing.aliasing import base_parameters  # noqa: E402
from trlpatch.engine.sharing.names import EngineNames  # noqa: E402
from trlpatch.errors import CannotShare, EngineMismatch  # noqa: E402

pytestmark = pytest.mark.torch


def engine_of(directory: Path, **settings: Any) -> tuple[Any, Any]:
    """(transformers' own model, an engine with its weights fused)."""
    from transformers import AutoModelForCausalLM

    normal = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    tied = normal.get_output_embeddings().weight is normal.get_input_embeddings().weight
    return normal, engine_over(FusedModelStub(normal, tied=tied), str(directory), **settings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if not name.startswith("phi3")])
def test_the_model_over_fused_weights_computes_the_same(name: str, dtype: str, tmp_path: Path) -> None:
    normal, engine = engine_of(checkpoint(name, tmp_path, dtype=dtype))
    assert unsupported_reason(engine) is None
    model = model_over_engine(engine)
    verify_overlap(model, engine)
    assert dict(model.named_parameters()).keys() == dict(normal.named_parameters()).keys()
    for (key, buffer), (_, other) in zip(model.named_buffers(), normal.named_buffers(), strict=True):
        assert torch.equal(buffer, other), key
        assert buffer.dtype == other.dtype, key
    ids = torch.randint(0, VOCABULARY, (2, 30))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, normal(ids).logits)
    assert model.generation_config.temperature == normal.generation_config.temperature == 0.5
    assert model.name_or_path == model.config._name_or_path == str(tmp_path)
    assert model.dtype == model.config.dtype == normal.dtype
    assert type(next(model.parameters())) is torch.nn.Parameter
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_writing_to_the_engine_is_seen_by_the_model(tmp_path: Path) -> None:
    _, engine = engine_of(checkpoint("llama", tmp_path))
    model = model_over_engine(engine)
    fused = engine.llm_engine.model_executor.driver_worker.model_runner.get_model()
    with torch.no_grad():
        fused.get_parameter("model.layers.1.mlp.gate_up_proj.base_layer.weight")[512:] = 7
    mlp = model.model.layers[1].mlp
    assert torch.all(mlp.up_proj.weight == 7)
    assert not torch.any(mlp.gate_proj.weight == 7)


def test_a_checkpoint_without_generation_config_keeps_the_models(tmp_path: Path) -> None:
    _, engine = engine_of(checkpoint("llama", tmp_path))
    (tmp_path / "generation_config.json").unlink()
    model = model_over_engine(engine)
    assert model.generation_config.eos_token_id == 2
    assert model.generation_config.temperature in (None, 1.0)


def test_gradients_reach_the_adapter_through_shared_weights(tmp_path: Path) -> None:
    _, engine = engine_of(checkpoint("gemma3", tmp_path, dtype="float32"))
    model = model_over_engine(engine)
    policy = lora_model(model)
    policy.train()
    assert model.training
    policy.gradient_checkpointing_enable()
    policy.enable_input_require_grads()
    ids = torch.randint(0, VOCABULARY, (2, 16))
    policy(input_ids=ids, labels=ids).loss.backward()
    assert {name for name, parameter in policy.named_parameters() if parameter.grad is not None} == {
        name for name, _ in policy.named_parameters() if "lora_" in name
    }


@pytest.mark.parametrize("newest", ["get_rename_mapper", "get_unstacked_mapper", None])
def test_names_go_through_vllms_renaming_without_its_fusion(newest: str | None) -> None:
    class Mapper:
        def __init__(self, fuses: bool) -> None:
            self._fuses = fuses

        def apply_list(self, names: list[str]) -> list[str]:
            assert not self._fuses
            return [name.replace("model.", "language_model.", 1) for name in names if "rotary" not in name]

    mapper = Mapper(fuses=newest is not None)
    if newest is not None:
        setattr(mapper, newest, lambda: Mapper(fuses=False))
    module = FusedModelStub(base_model())
    module.language_model = module._modules.pop("model")
    module.hf_to_vllm_mapper = mapper
    assert EngineNames(module).view("model.layers.0.self_attn.k_proj.weight", (8, 16)).shape == (8, 16)
    with pytest.raises(CannotShare, match=r"does not load 'model\.rotary'"):
        EngineNames(module).view("model.rotary", (1,))


def test_forms_that_do_not_fit_are_named() -> None:
    module = FusedModelStub(base_model())
    names = EngineNames(module)
    with pytest.raises(CannotShare, match=r"'model\.norm\.weight' is \[16\] in the engine and \[17\] in transformers"):
        names.view("model.norm.weight", (17,))
    with pytest.raises(CannotShare, match=r"\[64, 16\] in the engine and \[63, 16\] in transformers"):
        names.view("model.embed_tokens.weight", (63, 16))
    with pytest.raises(CannotShare, match=r"no parameter for 'model\.layers\.0\.self_attn\.z_proj"):
        names.view("model.layers.0.self_attn.z_proj.weight", (1,))
    fused = module.get_submodule("model.layers.0.mlp.gate_up_proj.base_layer")
    fused.output_sizes = [32, 31]
    with pytest.raises(CannotShare, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' is packed .* not as 2 runs"):
        names.view("model.layers.0.mlp.up_proj.weight", (32, 16))


def test_another_dtype_and_several_devices_are_refused(tmp_path: Path) -> None:
    _, engine = engine_of(checkpoint("llama", tmp_path))
    module = engine.llm_engine.model_executor.driver_worker.model_runner.get_model()
    norm = module.get_submodule("model.norm")
    norm.weight = torch.nn.Parameter(norm.weight.float())
    assert "torch.bfloat16, torch.float32; expected one of" in str(unsupported_reason(engine))
    norm.weight = torch.nn.Parameter(norm.weight.to("meta"))
    assert str(unsupported_reason(engine)) == "the engine's 'model.norm.weight' is not in device memory"


def test_a_checkpoint_that_transformers_cannot_read_is_refused(tmp_path: Path) -> None:
    _, engine = engine_of(checkpoint("llama", tmp_path))
    (tmp_path / "config.json").unlink()
    assert "transformers cannot read the configuration of" in str(unsupported_reason(engine))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert "transformers has no causal language model" in str(unsupported_reason(engine))


def test_settings_of_older_engines_are_understood(tmp_path: Path) -> None:
    """Up to 0.17 offloading is the cache config's; nothing that an engine does not say is a reason."""
    _, engine = engine_of(checkpoint("llama", tmp_path))
    engine.llm_engine.vllm_config.cache_config = SimpleNamespace(cpu_offload_gb=4)
    assert "host memory" in str(unsupported_reason(engine))
    assert "in another process" in str(unsupported_reason(RecordingEngineStub(tells_tags=False)))


@pytest.mark.parametrize("beside", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}], ids=str)
def test_base_parameters_are_named_as_without_peft(beside: dict[str, Any]) -> None:
    base = base_model()
    names = [path for path, _, _ in base_parameters(base)]
    assert set(names) == set(dict(base.named_parameters(remove_duplicate=False)))
    policy = lora_model(base, **beside)
    assert [path for path, _, _ in base_parameters(policy)] == names
    assert not any("lora" in path for path, _, _ in base_parameters(torch.nn.DataParallel(policy)))


def test_attaching_says_when_sharing_is_not_what_was_said(tmp_path: Path) -> None:
    normal, engine = engine_of(checkpoint("qwen2", tmp_path))
    assert not overlaps(normal, engine)
    with pytest.raises(CannotShare, match=r"'model\.embed_tokens\.weight' .* has memory of its own"):
        attach_engine(normal, engine, shared_weights=True)
    with pytest.raises(EngineMismatch, match="are the engine's own memory"):
        attach_engine(lora_model(model_over_engine(engine)), engine)
    quantized = engine_over(None, quantization="torchao")
    quantized.llm_engine.model_executor.driver_worker.model_runner.get_model = lambda: FusedModelStub(base_model())
    assert not overlaps(normal, quantized), "its weights have no addresses to compare"
    with pytest.raises(CannotShare, match="in another process"):
        attach_engine(normal, RecordingEngineStub(tells_tags=False), shared_weights=True)
    assert not hasattr(normal, "vllm_engine")
