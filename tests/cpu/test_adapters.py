"""Adapters on a real vLLM CPU engine: what the engine computes is what PEFT computes. Needs no TRL."""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
vllm = pytest.importorskip("vllm")

import trlpatch  # noqa: E402
from trlpatch.engine import adapters  # noqa: E402
from trlpatch.engine.attach import detach_engine  # noqa: E402
from trlpatch.engine.lora_view import lora_view  # noqa: E402
from trlpatch.engine.probes import legal_rank, legal_ranks, max_lora_rank, sleep_enabled, worker_lora_manager  # noqa: E402
from trlpatch.engine.state import state_of  # noqa: E402
from trlpatch.errors import AdapterNotExpressible  # noqa: E402

pytestmark = pytest.mark.cpu

TOLERANCE = 1e-4  # float32 on both sides; 3e-6 was measured
MOVED = 1e-2  # what a forgotten adapter changes at the least; 0.1 to 1.4 was measured

WAYS = {"in memory": adapters.InMemory, "on disk": adapters.OnDisk}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Any:
    return tiny.engine(model)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, engine: Any) -> Iterator[Any]:
    """The engine, set to one way of handing adapters over."""
    state = state_of(engine)
    state.handover, state.published = WAYS[request.param](engine), None
    yield engine
    state.handover = state.published = None


def prompts(engine: Any) -> list[dict[str, Any]]:
    words = engine.get_tokenizer()
    return [{"prompt_token_ids": words(text)["input_ids"]} for text in tiny.prompts(6)]


def gap(engine: Any, policy: Any, request: Any) -> float:
    """Largest difference between the engine's and PEFT's log-probability of a sampled token."""
    params = vllm.SamplingParams(max_tokens=12, temperature=1.0, logprobs=0, seed=1)
    outputs = engine.generate(prompts(engine), sampling_params=params, lora_request=request, use_tqdm=False)
    return max(
        float((tiny.engine_logprobs(output) - theirs).abs().max())
        for output in outputs
        for theirs in [tiny.trainer_logprobs(policy, output.prompt_token_ids, output.outputs[0].token_ids)]
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"lora_alpha": 3},
        {"r": 4, "lora_alpha": 4},
        {"rank_pattern": {"q_proj": 3, "down_proj": 16}, "alpha_pattern": {"v_proj": 40}},
        {"target_modules": ["v_proj"]},
        {"target_modules": ["gate_proj", "o_proj"], "r": 16},
    ],
    ids=["alpha 2r", "rslora", "alpha below r", "alpha is r", "patterns", "v only", "full rank"],
)
def test_the_engine_computes_what_peft_computes(way: Any, model: Path, changes: dict[str, Any]) -> None:
    policy = trlpatch.attach_engine(tiny.policy(model, **changes), way)
    assert gap(way, policy, trlpatch.lora_request(policy)) < TOLERANCE
    names = set()
    for seed in (1, 2):
        tiny.move(policy, seed=seed)
        before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
        request = trlpatch.lora_request(policy)
        names.add(request.lora_name)
        assert gap(way, policy, request) < TOLERANCE
        assert gap(way, policy, None) > MOVED
        assert all(torch.equal(before[name], parameter) for name, parameter in policy.named_parameters())
    assert len(names) == 2


def test_the_prefix_cache_never_serves_an_older_adapter(way: Any, model: Path) -> None:
    """The same long prompt before and after an update: its cached keys and values belong to the older adapter."""
    assert way.llm_engine.vllm_config.cache_config.enable_prefix_caching
    policy = trlpatch.attach_engine(tiny.policy(model), way)
    words = way.get_tokenizer()
    long = [{"prompt_token_ids": (words("the cat sat on the mat ")["input_ids"] * 20)[:150]}]
    params = vllm.SamplingParams(max_tokens=4, temperature=0.0, logprobs=0)
    for seed in range(4):
        tiny.move(policy, seed=seed)
        request = trlpatch.lora_request(policy)
        for _ in range(2):
            output = way.generate(long, sampling_params=params, lora_request=request, use_tqdm=False)[0]
            theirs = tiny.trainer_logprobs(policy, output.prompt_token_ids, output.outputs[0].token_ids)
            assert float((tiny.engine_logprobs(output) - theirs).abs().max()) < TOLERANCE
        assert output.num_cached_tokens > 0, "the second rollout did use the cache"


def test_a_fixed_name_would_serve_the_older_adapter(engine: Any, model: Path) -> None:
    """Why names are never reused: the control of the test above."""
    policy = tiny.policy(model)
    words = engine.get_tokenizer()
    long = [{"prompt_token_ids": (words("one two three four ")["input_ids"] * 30)[:150]}]
    params = vllm.SamplingParams(max_tokens=4, temperature=0.0, logprobs=0)
    handover, fixed = adapters.InMemory(engine), adapters._fresh_request(Path("/nonexistent/fixed"))
    gaps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters, "_fresh_request", lambda _: fixed)
        for seed in (1, 2):
            tiny.move(policy, seed=seed, size=0.2)
            view = lora_view(policy)
            assert view is not None
            request = handover.publish(adapters.adapter_tensors(view, "default"))
            output = engine.generate(long, sampling_params=params, lora_request=request, use_tqdm=False)[0]
            theirs = tiny.trainer_logprobs(policy, output.prompt_token_ids, output.outputs[0].token_ids)
            gaps.append(float((tiny.engine_logprobs(output) - theirs).abs().max()))
    worker_lora_manager(engine).remove_adapter(fixed.lora_int_id)
    assert gaps[0] < TOLERANCE
    assert gaps[1] > MOVED


def test_files_are_private_and_only_the_newest_stays(engine: Any, model: Path) -> None:
    state = state_of(engine)
    state.handover, state.published = adapters.OnDisk(engine), None
    policy = trlpatch.attach_engine(tiny.policy(model), engine)
    first = Path(trlpatch.lora_request(policy).lora_path)
    tiny.move(policy, seed=1)
    second = Path(trlpatch.lora_request(policy).lora_path)
    assert not first.exists()
    assert sorted(path.name for path in second.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert second.parent.stat().st_mode & 0o777 == 0o700
    state.handover._directory.cleanup()  # type: ignore[union-attr]
    assert not second.parent.exists()
    state.handover = state.published = None


def test_an_evicted_adapter_is_handed_over_again(engine: Any, model: Path, tmp_path: Path) -> None:
    """A user's own adapter takes the only slot; the next rollout of the policy must not fail or use it."""
    other = tiny.policy(model)
    tiny.move(other, seed=9)
    other.save_pretrained(tmp_path)
    policy = trlpatch.attach_engine(tiny.policy(model), engine)
    tiny.move(policy, seed=1)
    live = trlpatch.lora_request(policy)
    assert gap(engine, other, policy.load_lora(str(tmp_path))) < TOLERANCE
    again = trlpatch.lora_request(policy)
    assert again.lora_int_id != live.lora_int_id
    assert gap(engine, policy, again) < TOLERANCE
    # Asked of the worker itself: an error inside a step leaves vLLM with a request that never ends.
    with pytest.raises(Exception, match=live.lora_name):
        worker_lora_manager(engine).add_adapter(live)


def test_modules_without_a_place_in_the_engine_are_refused(engine: Any, model: Path) -> None:
    policy = trlpatch.attach_engine(tiny.policy(model), engine)
    standing = trlpatch.lora_request(policy)
    view = lora_view(policy)
    assert view is not None
    found = adapters.adapter_tensors(view, "default")
    strange = {name.replace("o_proj", "x_proj"): tensor for name, tensor in found.tensors.items()}
    handover = state_of(engine).handover
    assert handover is not None
    with pytest.raises(AdapterNotExpressible, match=r"no LoRA layer for model\.layers\.0\.self_attn\.x_proj"):
        handover.publish(adapters.AdapterTensors(strange, found.rank, found.targets))
    assert gap(engine, policy, standing) < TOLERANCE


def test_names_are_not_reused_after_detaching(engine: Any, model: Path) -> None:
    policy = trlpatch.attach_engine(tiny.policy(model), engine)
    first = trlpatch.lora_request(policy)
    detach_engine(policy)
    assert trlpatch.lora_request(trlpatch.attach_engine(policy, engine)).lora_name != first.lora_name


def test_what_the_engine_says_of_itself(engine: Any) -> None:
    assert max_lora_rank(engine) == 16
    assert not sleep_enabled(engine)
    assert isinstance(adapters.choose_handover(engine), adapters.InMemory)
    assert {8, 16, 32, 64} <= set(legal_ranks())
    assert (legal_rank(9), legal_rank(513)) == (16, None)


def test_fast_generate_rolls_out_with_the_live_adapter(engine: Any, model: Path) -> None:
    policy = trlpatch.attach_engine(tiny.policy(model), engine)
    tiny.move(policy, seed=5)
    params = vllm.SamplingParams(max_tokens=4, temperature=0.0, logprobs=0)
    (output,) = policy.fast_generate(prompts(engine)[:1], sampling_params=params, use_tqdm=False)
    theirs = tiny.trainer_logprobs(policy, output.prompt_token_ids, output.outputs[0].token_ids)
    assert float((tiny.engine_logprobs(output) - theirs).abs().max()) < TOLERANCE
    assert output.lora_request.lora_name.startswith("trlpatch-v")
