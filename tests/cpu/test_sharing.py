"""Base weights shared with real vLLM models, as they are loaded before (and, on a CPU, not repacked for) computing."""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
vllm = pytest.importorskip("vllm")

import trlpatch  # noqa: E402
from tests.fakes.fused import EngineStub  # noqa: E402
from tests.gpu.sharing_archs import ARCHITECTURES, VOCABULARY, allowed, checkpoint, exercise  # noqa: E402
from trlpatch.engine.attach import detach_engine  # noqa: E402
from trlpatch.engine.sharing import (  # noqa: E402
    compare_logits,
    model_over_engine,
    overlaps,
    unsupported_reason,
    verify_overlap,
)
from trlpatch.engine.sharing.names import EngineNames, held_parameters  # noqa: E402
from trlpatch.engine.state import state_of  # noqa: E402
from trlpatch.errors import CannotShare, EngineMismatch, SharedWeights  # noqa: E402

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module", autouse=True)
def vllm_as_on_cuda() -> Iterator[None]:
    """Keep linear weights as they are loaded, as vLLM does on CUDA, and look models up in this process."""
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils
    from vllm.model_executor.models import registry

    with pytest.MonkeyPatch.context() as patch:
        # Without these kernels vLLM's CPU backend falls back to torch.nn.functional.linear on the weight itself.
        patch.setattr(_custom_ops, "_supports_onednn", False)
        patch.setattr(utils, "check_cpu_sgl_kernel", lambda *_: False)
        patch.setattr(registry, "_run_in_subprocess", lambda function: function())
        yield


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, vllm_as_on_cuda: None) -> Any:
    """The one running engine of this process: Qwen2 with biases, tied embeddings, a padded vocabulary and LoRA."""
    made = checkpoint("qwen2-tied", tmp_path_factory.mktemp("qwen2"), dtype="float32")
    return tiny.engine(made, skip_tokenizer_init=True)


@pytest.fixture(scope="module")
def load(engine: Any) -> Callable[..., Any]:
    """Load a checkpoint into vLLM's model class, with LoRA layers; an `llm` that has that much of an engine."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    def loaded(directory: Path, *, dtype: str = "float32", lora: bool = True, **changes: Any) -> Any:
        lora_settings = {"enable_lora": True, "max_lora_rank": 16} if lora else {}
        arguments = EngineArgs(
            model=str(directory), dtype=dtype, enforce_eager=True, max_model_len=256, skip_tokenizer_init=True,
            **lora_settings, **changes,
        )  # fmt: skip
        config = arguments.create_engine_config()
        loader = get_model_loader(config.load_config)
        with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
            module = initialize_model(vllm_config=config, model_config=config.model_config)
            loader.load_weights(module, config.model_config)
        if lora:
            manager = LRUCacheWorkerLoRAManager(config, torch.device("cpu"), module.embedding_modules)
            module = manager.create_lora_manager(module, config)
        runner = SimpleNamespace(get_model=lambda: module)
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        return EngineStub(SimpleNamespace(vllm_config=config, model_executor=executor))

    return loaded


def module_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.model_runner.get_model()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_is_the_checkpoints_and_lies_in_vllms_memory(name: str, load: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    llm = load(checkpoint(name, tmp_path, dtype="float32"))
    names, saved = EngineNames(module_of(llm)), load_file(tmp_path / "model.safetensors")
    storages = {held.parameter.untyped_storage().data_ptr() for _, held in held_parameters(module_of(llm))}
    wrapped = [path for path, _ in module_of(llm).named_modules() if "base_layer" in path]
    assert wrapped, "vLLM's LoRA layers are in place"
    for key, tensor in saved.items():
        view = names.view(key, tensor.shape)
        assert type(view) is torch.Tensor
        assert torch.equal(view, tensor), key
        assert view.untyped_storage().data_ptr() in storages, key

    random_state = torch.get_rng_state()
    model = model_over_engine(llm)
    assert torch.equal(torch.get_rng_state(), random_state)
    verify_overlap(model, llm)
    normal = AutoModelForCausalLM.from_pretrained(tmp_path)
    same_parameters_and_buffers(model, normal)
    ids = torch.randint(0, VOCABULARY, (2, 30))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, normal(ids).logits)
    assert not model.training
    assert (model.name_or_path, model.dtype, str(model.device)) == (str(tmp_path), torch.float32, "cpu")
    assert model.config.to_dict() == normal.config.to_dict()
    assert model.config._attn_implementation == normal.config._attn_implementation
    assert model.generation_config.to_dict() == normal.generation_config.to_dict()


def same_parameters_and_buffers(one: Any, other: Any) -> None:
    parameters, others = dict(one.named_parameters()), dict(other.named_parameters())
    assert parameters.keys() == others.keys(), "tied where the other is tied"
    for name, parameter in parameters.items():
        assert torch.equal(parameter, others[name]), name
        assert not parameter.requires_grad
    buffers, others = dict(one.named_buffers()), dict(other.named_buffers())
    assert buffers.keys() == others.keys()
    for name, buffer in buffers.items():
        assert torch.equal(buffer, others[name]), name
        assert buffer.dtype == others[name].dtype, name


@pytest.mark.parametrize(("name", "dtype"), [("gemma3", "bfloat16"), ("phi3", "bfloat16"), ("qwen2", "float16")])
def test_half_precision_and_an_engine_without_lora(name: str, dtype: str, load: Any, tmp_path: Path) -> None:
    """Gemma's embedding scale is a buffer in the model's dtype; rotary frequencies stay float32."""
    from transformers import AutoModelForCausalLM

    llm = load(checkpoint(name, tmp_path, dtype=dtype), dtype=dtype, lora=False)
    model, normal = model_over_engine(llm), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    same_parameters_and_buffers(model, normal)
    ids = torch.randint(0, VOCABULARY, (2, 30))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, normal(ids).logits)
    assert model.dtype == model.config.dtype == getattr(torch, dtype)


def test_long_rope_is_rebuilt_when_the_prompt_grows(load: Any, tmp_path: Path) -> None:
    """Phi-3's and Phi-4-mini's long-context variants switch their frequencies, which no parameter holds."""
    from transformers import AutoModelForCausalLM

    rope = {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [4.0] * 32}
    changes = {"rope_scaling": rope, "original_max_position_embeddings": 64, "max_position_embeddings": 512}
    llm = load(checkpoint("phi3", tmp_path, dtype="float32", **changes), lora=False)
    model, normal = model_over_engine(llm), AutoModelForCausalLM.from_pretrained(tmp_path)
    for length in (20, 100, 20):
        ids = torch.randint(0, VOCABULARY, (1, length))
        with torch.no_grad():
            assert torch.equal(model(ids).logits, normal(ids).logits)


def test_the_engines_overrides_and_a_given_config_are_honoured(load: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig

    llm = load(checkpoint("llama", tmp_path, dtype="float32"), hf_overrides={"rms_norm_eps": 0.5}, lora=False)
    assert model_over_engine(llm).config.rms_norm_eps == 0.5
    config = AutoConfig.from_pretrained(tmp_path)
    config._attn_implementation = "eager"
    config._name_or_path = "some/name"
    model = model_over_engine(llm, config=config)
    assert (model.config._attn_implementation, model.name_or_path) == ("eager", "some/name")
    assert model.config.rms_norm_eps == 0.5
    assert model.config is not config


def test_the_model_saves_like_any_other(load: Any, tmp_path: Path) -> None:
    """Fused weights are one storage under several parameters, which safetensors refuses unless they are disjoint."""
    from transformers import AutoModelForCausalLM

    model = model_over_engine(load(checkpoint("llama-tied", tmp_path / "a", dtype="float32")))
    model.save_pretrained(tmp_path / "b")
    same_parameters_and_buffers(model, AutoModelForCausalLM.from_pretrained(tmp_path / "b"))


# What cannot be shared.


@pytest.fixture(scope="module")
def llama(load: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(checkpoint("llama", tmp_path_factory.mktemp("llama"), dtype="float32"))


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("vllm_config.parallel_config.tensor_parallel_size", 2, "tensor_parallel_size=2"),
        ("vllm_config.parallel_config.pipeline_parallel_size", 2, "pipeline_parallel_size=2"),
        ("vllm_config.model_config.quantization", "fp8", r"quantized \(fp8\)"),
        ("vllm_config.model_config.multimodal_config", object(), "multimodal"),
        ("vllm_config.offload_config.uva.cpu_offload_gb", 1.0, "host memory"),
        ("model_executor.driver_worker", None, "VLLM_ENABLE_V1_MULTIPROCESSING=0"),
        ("model_executor.sleeping_tags", {"weights"}, r"sleeps \(weights\)"),
    ],
)
def test_settings_that_forbid_sharing(
    llama: Any, monkeypatch: pytest.MonkeyPatch, path: str, value: Any, says: str
) -> None:
    *holders, last = path.split(".")
    holder = llama.llm_engine
    for name in holders:
        holder = getattr(holder, name)
    assert unsupported_reason(llama) is None
    monkeypatch.setattr(holder, last, value, raising=False)
    with pytest.raises(CannotShare, match=says):
        model_over_engine(llama)
    assert unsupported_reason(llama)


def test_weights_that_vllm_has_repacked_are_refused(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a running CPU engine does with every linear layer."""
    from vllm import _custom_ops
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    llm = load(checkpoint("qwen3", tmp_path, dtype="float32"))
    monkeypatch.setattr(_custom_ops, "_supports_onednn", True)
    process_weights_after_loading(module_of(llm), llm.llm_engine.vllm_config.model_config, torch.device("cpu"))
    assert "vLLM has repacked it for its own kernels" in str(unsupported_reason(llm))


def test_experts_are_refused(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from vllm.distributed import parallel_state

    monkeypatch.setattr(parallel_state, "_EP", parallel_state.get_tp_group())  # made for models with experts only

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    assert "has experts (Qwen3Moe" in str(unsupported_reason(load(tmp_path, lora=False)))


def test_layers_that_transformers_transposes_are_refused(load: Any, tmp_path: Path) -> None:
    """GPT-2's square projection has the right shape and the wrong orientation."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=128, n_layer=2, n_head=2)).save_pretrained(tmp_path)
    assert "belongs to a Conv1D" in str(unsupported_reason(load(tmp_path, lora=False)))


def test_names_that_the_engine_lacks_are_refused(llama: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig

    checkpoint("qwen2", tmp_path)  # its biases have no place in Llama
    reason = unsupported_reason(llama, config=AutoConfig.from_pretrained(tmp_path))
    assert reason == (
        "the engine's LlamaForCausalLM has no parameter for 'model.layers.0.self_attn.q_proj.bias' "
        "(looked for 'model.layers.0.self_attn.q_proj.bias')"
    )


def test_other_shapes_and_inference_tensors_are_refused(llama: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig

    checkpoint("llama", tmp_path, hidden_size=128, head_dim=64)
    assert str(unsupported_reason(llama, config=AutoConfig.from_pretrained(tmp_path))) == (
        f"'model.embed_tokens.weight' is [{VOCABULARY}, 256] in the engine and [{VOCABULARY}, 128] in transformers"
    )
    norm = module_of(llama).model.norm
    kept = norm.weight
    with torch.inference_mode():
        norm.weight = torch.nn.Parameter(kept.clone(), requires_grad=False)
    try:
        assert "'model.norm.weight' was made in inference mode" in str(unsupported_reason(llama))
    finally:
        norm.weight = kept


# With a running engine.


def test_a_running_engine_trains_and_rolls_out_on_one_copy(engine: Any) -> None:
    model = model_over_engine(engine)
    assert compare_logits(model, engine) < 1e-3
    assert trlpatch.attach_engine(model, engine, shared_weights=True) is model
    assert state_of(engine).shared_weights
    found = exercise("qwen2-tied", model, engine)
    assert found["losses"][-1] < found["losses"][0]
    assert found["after"] < 1e-3, "compare_logits leaves the adapter out"
    assert found["adapter"] < 1e-3
    assert found["control"] > 0.3
    assert found["base_unchanged"]
    assert found["allowed"] == []
    assert found["no_op_passes"]
    detach_engine(model)


def test_a_model_that_shares_nothing_or_less_than_all_is_refused(engine: Any) -> None:
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(engine.llm_engine.vllm_config.model_config.model)
    assert not overlaps(own, engine)
    with pytest.raises(CannotShare, match=r"'model\.embed_tokens\.weight' .* has memory of its own"):
        trlpatch.attach_engine(own, engine, shared_weights=True)
    assert not hasattr(own, "vllm_engine")
    model = model_over_engine(engine)
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.clone(), requires_grad=False)
    with pytest.raises(CannotShare, match=r"'model\.norm\.weight'"):
        verify_overlap(model, engine)
    with pytest.raises(EngineMismatch, match="shared_weights=True"):
        trlpatch.attach_engine(model, engine)
    own.half()  # nothing was protected by the refused attempt


def test_detaching_lifts_the_protection_and_keeps_the_weights(engine: Any) -> None:
    model = trlpatch.attach_engine(model_over_engine(engine), engine, shared_weights=True)
    with pytest.raises(SharedWeights):
        model.half()
    assert detach_engine(model) is engine
    assert not state_of(engine).shared_weights
    verify_overlap(model, engine)
    model.half()
    assert not overlaps(model, engine)
    assert compare_logits(model_over_engine(engine), engine) < 1e-3, "the engine kept its own"


def test_other_weights_are_noticed_by_their_logits(engine: Any) -> None:
    """For a separate model this is the only check there is: one swapped norm must not pass."""
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(engine.llm_engine.vllm_config.model_config.model)
    assert compare_logits(own, engine) < 1e-3
    assert compare_logits(own, engine, prompt_ids=[5, 6, 7, 8]) < 1e-3
    with torch.no_grad():
        own.model.layers[1].input_layernorm.weight.copy_(own.model.layers[2].input_layernorm.weight)
    with pytest.raises(EngineMismatch, match="do not compute the same function"):
        compare_logits(own, engine)


def test_the_engine_is_freed_with_the_model(load: Any, tmp_path: Path) -> None:
    """Protection must keep nothing alive: the hook it installs is torch's, for the whole process."""
    import weakref

    from trlpatch.engine.sharing import protect

    llm = load(checkpoint("llama", tmp_path, dtype="float32"))
    model = model_over_engine(llm)
    protect(model)
    assert allowed(tiny_policy(model)) == []
    gone = weakref.ref(model)
    del model, llm
    gc.collect()
    assert gone() is None


def tiny_policy(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(**tiny.lora_settings()))
