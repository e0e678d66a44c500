"""`attach_engine` on a real vLLM CPU engine: only a model of the same weights, and no trace of the comparison."""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
vllm = pytest.importorskip("vllm")

import trlpatch  # noqa: E402
from trlpatch.engine.state import state_of  # noqa: E402
from trlpatch.errors import EngineBusy, EngineMismatch  # noqa: E402

pytestmark = pytest.mark.cpu

BLOCK = 16
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Any:
    return tiny.engine(checkpoint, block_size=BLOCK, enable_prefix_caching=True)


def loaded(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint)


def adapter_merged(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    earlier = get_peft_model(model, LoraConfig(r=8, target_modules=MLP, task_type="CAUSAL_LM"))
    tiny.move(earlier, seed=7)
    return earlier.merge_and_unload()


def made_anew(model: Any) -> Any:
    torch.nn.init.normal_(model.get_input_embeddings().weight[300:], std=0.05)
    return model


def head_of_its_own(model: Any) -> Any:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.03 * torch.randn_like(model.lm_head.weight))
    return model


def one_norm(model: Any) -> Any:
    model.model.layers[1].input_layernorm.weight.mul_(1.05)
    return model


CHANGES: dict[str, Callable[[Any], Any]] = {
    "an earlier adapter merged": adapter_merged,
    "rows made anew": made_anew,
    "a head of its own": head_of_its_own,
    "one norm": one_norm,
}


def test_a_detached_engine_is_for_its_own_model_only(checkpoint: Path, engine: Any) -> None:
    model = trlpatch.attach_engine(loaded(checkpoint), engine)
    assert trlpatch.detach_engine(model) is engine
    assert not hasattr(model, "vllm_engine")
    (alone,) = engine.generate(["the cat"], vllm.SamplingParams(max_tokens=2), use_tqdm=False)
    assert alone.lora_request is None
    with torch.no_grad():
        other = adapter_merged(loaded(checkpoint))
    with pytest.raises(EngineMismatch):
        trlpatch.attach_engine(other, engine)
    again = trlpatch.attach_engine(loaded(checkpoint), engine)
    assert trlpatch.detach_engine(again) is engine


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("adapted", [False, True], ids=["before PEFT", "after PEFT"])
def test_another_model_is_refused(change: str, adapted: bool, checkpoint: Path, engine: Any) -> None:
    from peft import LoraConfig, get_peft_model

    with torch.enable_grad(), torch.no_grad():
        model = CHANGES[change](loaded(checkpoint))
    if adapted:
        model = get_peft_model(model, LoraConfig(**tiny.lora_settings()))
        tiny.move(model, seed=1)
    with pytest.raises(EngineMismatch, match=r"standard deviations .* check=False"):
        trlpatch.attach_engine(model, engine)
    assert not hasattr(model, "vllm_engine")
    assert trlpatch.attach_engine(model, engine, check=False).vllm_engine is engine


def test_another_checkpoint_and_another_vocabulary_are_refused(checkpoint: Path, engine: Any, tmp_path: Path) -> None:
    other = tiny.policy(tiny.checkpoint(tmp_path, seed=1, tie_word_embeddings=True))
    with pytest.raises(EngineMismatch, match="check that both come from one checkpoint"):
        trlpatch.attach_engine(other, engine)
    resized = loaded(checkpoint)
    resized.resize_token_embeddings(resized.config.vocab_size + 2)
    with pytest.raises(EngineMismatch, match="build the engine of that directory"):
        trlpatch.attach_engine(resized, engine)


def test_rounding_on_purpose_is_a_warning(checkpoint: Path, engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad():
        model = one_norm(loaded(checkpoint))
    model.is_quantized = True
    trlpatch.attach_engine(model, engine)
    assert "quantization shows (the trainer's model): comparing" in caplog.text


def test_the_comparison_leaves_no_trace(checkpoint: Path, engine: Any) -> None:
    policy = tiny.policy(checkpoint)
    tiny.move(policy, seed=1)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("lora_A" in name)
    policy.train()
    policy.get_base_model().model.norm.eval()
    blocks = engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool

    def traces() -> dict[str, Any]:
        return {
            "random numbers": torch.get_rng_state().tolist(),
            "prefix cache": len(blocks.cached_block_hash_to_block),
            "free blocks": blocks.get_num_free_blocks(),
            "adapters": engine.llm_engine.list_loras(),
            "sleep": state_of(engine).backend.asleep(),
            "modes": [module.training for module in policy.modules()],
            "trained": [parameter.requires_grad for parameter in policy.parameters()],
            "disabled": [getattr(module, "_disable_adapters", None) for module in policy.modules()],
        }

    engine.generate(
        [{"prompt_token_ids": list(range(5, 5 + 3 * BLOCK))}],
        vllm.SamplingParams(max_tokens=1, temperature=0),
        use_tqdm=False,
    )
    before = traces()
    assert before["prefix cache"] == 3
    trlpatch.attach_engine(policy, engine)
    assert traces() == before


def test_an_adapter_that_rewrites_the_base_is_for_a_full_push(checkpoint: Path, engine: Any) -> None:
    """TRL pushes every weight before the first rollout, whatever the engine has now."""
    policy = tiny.policy(checkpoint, init_lora_weights="pissa")
    assert trlpatch.attach_engine(policy, engine).vllm_engine is engine


def test_unfinished_requests_are_not_finished_for_it(checkpoint: Path, engine: Any) -> None:
    inner = engine.llm_engine
    inner.add_request("own", {"prompt_token_ids": [5, 6, 7]}, vllm.SamplingParams(max_tokens=2))
    with pytest.raises(EngineBusy, match="unfinished requests"):
        trlpatch.attach_engine(loaded(checkpoint), engine)
    trlpatch.attach_engine(loaded(checkpoint), engine, check=False)
    answers = []
    while inner.has_unfinished_requests():
        answers += inner.step()
    assert answers[-1].request_id == "own"
