"""Single-adapter LoRA layers in a real engine: the adapter, the base model and other adapters, alone and mixed."""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
vllm = pytest.importorskip("vllm")

import trlpatch  # noqa: E402
from trlpatch.engine.attach import attach_engine, detach_engine  # noqa: E402
from trlpatch.engine.single_adapter.install import marked, single_adapter_layers  # noqa: E402
from trlpatch.engine.state import state_of  # noqa: E402

pytestmark = pytest.mark.cpu

PROMPTS = [[(i * 37 + j * 11 + 5) % 250 for j in range(40)] for i in range(4)]
FLOAT32 = 1e-5
_ids = itertools.count(1)
"""vLLM knows adapters by their ids, for the life of the engine."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases of q, k and v are zero in a fresh model: give them values."""
    from safetensors.torch import load_file, save_file

    directory = tiny.checkpoint(tmp_path_factory.mktemp("model"))
    file = directory / "model.safetensors"
    tensors, generator = load_file(file), torch.Generator().manual_seed(7)
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            tensors[name] = torch.randn(tensor.shape, generator=generator) * 0.3
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Any:
    with single_adapter_layers(16):
        return tiny.engine(checkpoint, skip_tokenizer_init=True, additional_config=marked({}))


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> Any:
    model = tiny.policy(checkpoint).eval()
    tiny.move(model, seed=1)
    return model


@pytest.fixture
def adapters(policy: Any, tmp_path: Path) -> list[Any]:
    """Two saved adapters, as requests; the policy is left with the second."""
    from vllm.lora.request import LoRARequest

    made = []
    for number in (1, 2):
        policy.save_pretrained(tmp_path / f"a{number}")
        made.append(LoRARequest(f"a{number}", next(_ids), str(tmp_path / f"a{number}")))
        if number == 1:
            made.append(_of_trainer(policy))
            tiny.move(policy, seed=2)
    made.append(_of_trainer(policy))
    return made


def _of_trainer(model: Any) -> list[Any]:
    return [tiny.trainer_logprobs(model, ids[:1], ids[1:]) for ids in PROMPTS]


def _of_engine(llm: Any, requests: Sequence[Any]) -> list[Any]:
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in PROMPTS], sampling, lora_request=list(requests), use_tqdm=False
    )
    return [
        torch.tensor([step[token].logprob for token, step in zip(ids[1:], output.prompt_logprobs[1:], strict=True)])
        for ids, output in zip(PROMPTS, outputs, strict=True)
    ]


def _gap(these: Sequence[Any], those: Sequence[Any]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(these, those, strict=True))


def test_every_adapted_layer_is_served(engine: Any) -> None:
    model = engine.llm_engine.model_executor.driver_worker.model_runner.get_model()
    kinds = {type(module).__name__ for module in model.modules() if "LoRA" in type(module).__name__}
    assert {kind for kind in kinds if "Linear" in kind} == {
        "SingleAdapterMergedQKVParallelLinearWithLoRA",
        "SingleAdapterMergedColumnParallelLinearWithLoRA",
        "SingleAdapterRowParallelLinearWithLoRA",
    }


def test_the_adapter_the_base_model_and_another_adapter_are_each_computed(
    engine: Any, policy: Any, adapters: list[Any]
) -> None:
    first, of_first, second, of_second = adapters
    with policy.disable_adapter():
        of_base = _of_trainer(policy)
    assert _gap(of_first, of_base) > 0.1
    assert _gap(of_first, of_second) > 0.1
    for request, right in ((first, of_first), (None, of_base), (second, of_second), (first, of_first)):
        assert _gap(_of_engine(engine, [request] * 4), right) < FLOAT32


def test_a_batch_of_requests_with_and_without_the_adapter(engine: Any, policy: Any, adapters: list[Any]) -> None:
    """vLLM's own layers on a CPU give the adapter to all of them."""
    first, of_first, second, of_second = adapters
    with policy.disable_adapter():
        of_base = _of_trainer(policy)
    found = _of_engine(engine, [first, None, first, None])
    assert _gap(found, [of_first[0], of_base[1], of_first[2], of_base[3]]) < FLOAT32
    found = _of_engine(engine, [first, second, None, first])
    assert _gap(found, [of_first[0], of_second[1], of_base[2], of_first[3]]) < FLOAT32


def test_the_live_adapter_is_handed_over_in_place(engine: Any, policy: Any) -> None:
    attach_engine(policy, engine)
    try:
        for seed in range(3, 6):
            tiny.move(policy, seed=seed, size=0.01)
            request = trlpatch.lora_request(policy)
            assert _gap(_of_engine(engine, [request] * 4), _of_trainer(policy)) < FLOAT32
        assert state_of(engine).adapter_sync.description == "in place"
    finally:
        detach_engine(policy)
