"""Adapters on a real vLLM CPU engine: what the engine computes is what PEFT computes. Needs no TRL."""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # sets vLLM's environment

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
vllm = pytest.importorskip("vllm")

from peft import LoraConfig  # noqa: E402

import trlpatch  # noqa: E402
from trlpatch.engine import publisher  # noqa: E402
from trlpatch.engine.adapter_sync import registry  # noqa: E402
from trlpatch.engine.attach import detach_engine  # noqa: E402
from trlpatch.engine.backend import backend_of  # noqa: E402
from trlpatch.engine.probes import legal_rank, legal_ranks, max_lora_rank, sleep_enabled, worker_lora_manager  # noqa: E402
from trlpatch.engine.state import state_of  # noqa: E402
from trlpatch.errors import AdapterNotExpressible, EngineMismatch  # noqa: E402
from trlpatch.policy.adapter import lora_view  # noqa: E402

pytestmark = pytest.mark.cpu

TOLERANCE = 1e-4  # float32 on both sides; 3e-6 was measured
MOVED = 1e-2  # what a forgotten adapter changes at the least; 0.1 to 1.4 was measured

WAYS = {
    "in place": publisher.BufferCopy,
    "registered anew": publisher.Registration,
    "through files": publisher.AdapterFiles,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Any:
    return tiny.engine(model, max_cpu_loras=2)  # room for a version too many, if one were left behind


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, engine: Any) -> Iterator[Any]:
    """The engine, set to one way of handing adapters over."""
    state = state_of(engine)
    manager_of(engine).remove_all_adapters()
    state.adapter_sync, state.published = WAYS[request.param](engine), None
    yield engine
    assert state.adapter_sync.description.startswith(request.param), "it was this way that was tested"
    state.adapter_sync = state.published = None


def manager_of(engine: Any) -> Any:
    return worker_lora_manager(engine)._adapter_manager


def buffers(engine: Any) -> list[Any]:
    """Every LoRA buffer of the engine's linear layers."""
    return [
        buffer
        for module in manager_of(engine).modules.values()
        if isinstance(module.lora_a_stacked, tuple)
        for buffer in (*module.lora_a_stacked, *module.lora_b_stacked)
    ]


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
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["gate_proj", "o_proj"], "r": 16},
        {"r": 16, "use_rslora": True},
    ],
    ids=[
        "alpha 2r",
        "rslora",
        "alpha below r",
        "alpha is r",
        "patterns",
        "v only",
        "q and v, not k",
        "gate, not up",
        "full rank",
    ],
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
        assert worker_lora_manager(way).list_adapters() == {request.lora_int_id}, "the older version was dropped"
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
    manager_of(engine).remove_all_adapters()
    policy = tiny.policy(model)
    words = engine.get_tokenizer()
    long = [{"prompt_token_ids": (words("one two three four ")["input_ids"] * 30)[:150]}]
    params = vllm.SamplingParams(max_tokens=4, temperature=0.0, logprobs=0)
    handover, fixed = publisher.Registration(engine), registry.fresh_request(Path("/nonexistent/fixed"))
    gaps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "fresh_request", lambda _: fixed)
        for seed in (1, 2):
            tiny.move(policy, seed=seed, size=0.2)
            view = lora_view(policy)
            assert view is not None
            request = handover.publish(view.weights("default"))
            output = engine.generate(long, sampling_params=params, lora_request=request, use_tqdm=False)[0]
            theirs = tiny.trainer_logprobs(policy, output.prompt_token_ids, output.outputs[0].token_ids)
            gaps.append(float((tiny.engine_logprobs(output) - theirs).abs().max()))
    worker_lora_manager(engine).remove_adapter(fixed.lora_int_id)
    assert gaps[0] < TOLERANCE
    assert gaps[1] > MOVED


def test_files_are_private_and_only_the_newest_stays(engine: Any, model: Path) -> None:
    state = state_of(engine)
    state.adapter_sync, state.published = publisher.AdapterFiles(engine), None
    policy = trlpatch.attach_engine(tiny.policy(model), engine)
    first = Path(trlpatch.lora_request(policy).lora_path)
    tiny.move(policy, seed=1)
    second = Path(trlpatch.lora_request(policy).lora_path)
    assert not first.exists()
    assert sorted(path.name for path in second.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert second.parent.stat().st_mode & 0o777 == 0o700
    state.adapter_sync = state.published = None
    assert not second.parent.exists()


def test_an_evicted_adapter_is_handed_over_again(way: Any, model: Path, tmp_path: Path) -> None:
    """A user's own adapters take its place; the next rollout of the policy must neither fail nor use them."""
    other = tiny.policy(model)
    policy = trlpatch.attach_engine(tiny.policy(model), way)
    tiny.move(policy, seed=1)
    live = trlpatch.lora_request(policy)
    for seed in (8, 9):
        tiny.move(other, seed=seed)
        other.save_pretrained(tmp_path / str(seed))
        assert gap(way, other, policy.load_lora(str(tmp_path / str(seed)))) < TOLERANCE
    assert live.lora_int_id not in worker_lora_manager(way).list_adapters()
    again = trlpatch.lora_request(policy)
    if not isinstance(state_of(way).adapter_sync, publisher.AdapterFiles):  # its files are still there
        assert again.lora_name != live.lora_name
        # Asked of the worker itself: an error inside a step leaves vLLM with a request that never ends.
        worker_lora_manager(way).remove_adapter(live.lora_int_id)
        with pytest.raises(Exception, match=live.lora_name):
            worker_lora_manager(way).add_adapter(live)
        again = trlpatch.lora_request(policy)
    assert gap(way, policy, again) < TOLERANCE


@pytest.mark.parametrize("changed", [False, True])
def test_an_adapter_that_lost_its_slot_comes_back_as_it_is(
    way: Any, model: Path, tmp_path: Path, changed: bool
) -> None:
    """One user adapter takes the only slot, while the policy's stays registered: vLLM puts that back by itself."""
    policy = trlpatch.attach_engine(tiny.policy(model), way)
    trlpatch.lora_request(policy)
    tiny.move(policy, seed=1)
    trlpatch.lora_request(policy)
    other = tiny.policy(model)
    tiny.move(other, seed=8)
    other.save_pretrained(tmp_path)
    assert gap(way, other, policy.load_lora(str(tmp_path))) < TOLERANCE
    if changed:
        tiny.move(policy, seed=2)
    assert gap(way, policy, trlpatch.lora_request(policy)) < TOLERANCE
    assert gap(way, other, policy.load_lora(str(tmp_path))) < TOLERANCE
    assert gap(way, policy, trlpatch.lora_request(policy)) < TOLERANCE


def test_updates_are_written_into_the_buffers_that_the_engine_has(engine: Any, model: Path, tmp_path: Path) -> None:
    """Ten updates: one registration, the same memory, and bit for bit what a fresh load from disk puts there."""
    state = state_of(engine)
    state.adapter_sync = state.published = None
    manager = manager_of(engine)
    manager.remove_all_adapters()
    policy = trlpatch.attach_engine(tiny.policy(model, r=8, target_modules=["q_proj", "v_proj", "down_proj"]), engine)
    trlpatch.lora_request(policy)
    assert state.adapter_sync.description == "in place"
    addresses = [buffer.data_ptr() for buffer in buffers(engine)]
    registered = manager.get_adapter(registry.LIVE_ID)
    names = set()
    for seed in range(10):
        tiny.move(policy, seed=seed)
        before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
        request = trlpatch.lora_request(policy)
        names.add((request.lora_name, request.lora_path))
        assert request.lora_int_id == registry.LIVE_ID
        assert manager.get_adapter(registry.LIVE_ID) is registered
        assert all(torch.equal(before[name], parameter) for name, parameter in policy.named_parameters())
    assert len(names) == 10
    assert [buffer.data_ptr() for buffer in buffers(engine)] == addresses
    updated = [buffer.clone() for buffer in buffers(engine)]
    ours = logprobs(engine, request)
    policy.save_pretrained(tmp_path)
    loaded = policy.load_lora(str(tmp_path))
    theirs = logprobs(engine, loaded)
    assert manager.lora_index_to_id == [loaded.lora_int_id]
    assert all(map(torch.equal, buffers(engine), updated))
    assert torch.equal(ours, theirs)


def logprobs(engine: Any, request: Any) -> Any:
    """The engine's log-probabilities of its own greedy tokens."""
    params = vllm.SamplingParams(max_tokens=12, temperature=0.0, logprobs=0)
    outputs = engine.generate(prompts(engine), sampling_params=params, lora_request=request, use_tqdm=False)
    return torch.cat([tiny.engine_logprobs(output) for output in outputs])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_trained_in_half_precision(way: Any, model: Path, dtype: Any) -> None:
    """Scaled in float32, as the engine's dtype here can hold the result exactly."""
    policy = trlpatch.attach_engine(tiny.policy(model, alpha_pattern={"v_proj": 5}), way)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    trlpatch.lora_request(policy)
    tiny.move(policy, seed=3)
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    request = trlpatch.lora_request(policy)
    assert all(torch.equal(before[name], parameter) for name, parameter in policy.named_parameters())
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    assert gap(way, policy, request) < TOLERANCE


def test_another_adapter_leaves_nothing_of_the_one_before(way: Any, model: Path) -> None:
    """Fewer modules, another rank, another PEFT model on the same engine, and back."""
    policy = tiny.policy(model, r=16)
    policy.add_adapter("small", LoraConfig(r=2, lora_alpha=7, target_modules=["k_proj", "up_proj"]))
    trlpatch.attach_engine(policy, way)
    other = trlpatch.attach_engine(tiny.policy(model, target_modules=["v_proj", "gate_proj"]), way)
    same = trlpatch.attach_engine(tiny.policy(model, r=16), way)
    for number, one in enumerate((policy, other, same)):
        for adapter in one.peft_config:
            one.set_adapter(adapter)
            tiny.move(one, seed=number)
    for one, adapter in (
        (policy, "default"),
        (policy, "small"),
        (other, "default"),
        (policy, "default"),
        (same, "default"),
        (policy, "small"),
        (same, "default"),
    ):
        one.set_adapter(adapter)
        assert gap(way, one, trlpatch.lora_request(one)) < TOLERANCE
        tiny.move(one, seed=5)
        assert gap(way, one, trlpatch.lora_request(one)) < TOLERANCE


@pytest.mark.parametrize("change", ["scaling", "storage", "parameter"])
def test_what_the_plan_rests_on_may_change(way: Any, model: Path, change: str) -> None:
    policy = trlpatch.attach_engine(tiny.policy(model), way)
    tiny.move(policy, seed=1)
    trlpatch.lora_request(policy)
    view = lora_view(policy)
    assert view is not None
    layer = view.layers[3][1]
    if change == "scaling":
        layer.scaling["default"] *= 3
    elif change == "storage":
        layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data * 3
    else:
        layer.lora_B["default"].weight = torch.nn.Parameter(layer.lora_B["default"].weight.detach() * 3)
    assert gap(way, policy, trlpatch.lora_request(policy)) < TOLERANCE


def test_discarded_buffers_are_filled_again(engine: Any, model: Path) -> None:
    """As after a level-2 sleep: every LoRA buffer holds anything, and the registry still calls the adapter active."""
    state = state_of(engine)
    state.adapter_sync = state.published = None
    policy = trlpatch.attach_engine(tiny.policy(model, target_modules=["q_proj", "o_proj"]), engine)
    tiny.move(policy, seed=1)
    trlpatch.lora_request(policy)
    for buffer in buffers(engine):
        buffer.fill_(7.0)
    state.published = None
    state.adapter_sync.invalidate()
    assert gap(engine, policy, trlpatch.lora_request(policy)) < TOLERANCE


def test_an_update_that_breaks_off_is_never_rolled_out(engine: Any, model: Path) -> None:
    state = state_of(engine)
    state.adapter_sync = state.published = None
    policy = trlpatch.attach_engine(tiny.policy(model), engine)
    tiny.move(policy, seed=1)
    first = trlpatch.lora_request(policy)
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    tiny.move(policy, seed=2)

    gather = torch.cat

    def full(tensors: Any, *, out: Any = None) -> Any:
        if out is not None:  # the content check, in a buffer that is there
            return gather(tensors, out=out)
        raise torch.OutOfMemoryError("no memory")

    view = lora_view(policy)
    assert view is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", full)
        with pytest.raises(torch.OutOfMemoryError):
            state.adapter_sync.publish(view.weights("default"))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(before[name])
    again = trlpatch.lora_request(policy)
    assert again is not first, "the weights are those of the first request again, but the buffers are not"
    assert gap(engine, policy, again) < TOLERANCE


def test_modules_without_a_place_in_the_engine_are_refused(way: Any, model: Path) -> None:
    policy = trlpatch.attach_engine(tiny.policy(model), way)
    standing = trlpatch.lora_request(policy)
    view = lora_view(policy)
    assert view is not None
    weights = view.weights("default")
    strange = dataclasses.replace(weights, paths=tuple(path.replace("o_proj", "x_proj") for path in weights.paths))
    handover = state_of(way).adapter_sync
    assert handover is not None
    with pytest.raises(AdapterNotExpressible, match="x_proj"):
        handover.publish(strange)
    assert gap(way, policy, standing) < TOLERANCE
    assert gap(way, policy, trlpatch.lora_request(policy)) < TOLERANCE


def test_names_are_not_reused_after_detaching(engine: Any, model: Path) -> None:
    policy = trlpatch.attach_engine(tiny.policy(model), engine)
    first = trlpatch.lora_request(policy)
    detach_engine(policy)
    assert trlpatch.lora_request(trlpatch.attach_engine(policy, engine)).lora_name != first.lora_name


def test_what_the_engine_says_of_itself(engine: Any) -> None:
    assert max_lora_rank(engine) == 16
    assert not sleep_enabled(engine)
    assert isinstance(backend_of(engine).new_adapter_sync(), publisher.BufferCopy)
    assert registry.names_separate_prefixes()
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


def test_a_slot_of_several_and_rounding_once(tmp_path: Path) -> None:
    """bfloat16 and two slots: the adapter moves from slot to slot, and is B times its scaling, rounded once."""
    path = tiny.checkpoint(tmp_path / "model", seed=3)
    engine = tiny.engine(path, dtype="bfloat16", max_loras=2)
    state = state_of(engine)
    policy = trlpatch.attach_engine(tiny.policy(path, lora_alpha=11, target_modules=["v_proj"]), engine)
    manager = manager_of(engine)
    others = []
    for seed in (1, 2, 3):
        other = tiny.policy(path, target_modules=["o_proj", "k_proj", "v_proj"])
        tiny.move(other, seed=seed)
        other.save_pretrained(tmp_path / str(seed))
        others.append(policy.load_lora(str(tmp_path / str(seed))))
    slots = set()
    for step in range(8):
        tiny.move(policy, seed=step)
        logprobs(engine, others[step % 3])
        if step % 2:
            logprobs(engine, others[(step + 1) % 3])  # both slots are theirs
        logprobs(engine, trlpatch.lora_request(policy))
        slot = manager.lora_index_to_id.index(registry.LIVE_ID)
        slots.add(slot)
        attention = policy.get_base_model().model.layers[0].self_attn.v_proj
        expected = (attention.lora_B["default"].weight * (11 / 8)).to(torch.bfloat16)
        module = manager.modules["model.layers.0.self_attn.qkv_proj"]
        assert torch.equal(module.lora_b_stacked[2][slot, 0, :, :8], expected)
        assert torch.equal(module.lora_a_stacked[2][slot, 0, :8], attention.lora_A["default"].weight.bfloat16())
        assert not any(buffer[slot].any() for buffer in (*module.lora_a_stacked[:2], *module.lora_b_stacked[:2]))
        assert not manager.modules["model.layers.0.self_attn.o_proj"].lora_b_stacked[0][slot].any()
    assert slots == {0, 1}
    assert state.adapter_sync is not None
    assert state.adapter_sync.description == "in place"


@pytest.mark.parametrize(
    ("changes", "live"),
    [({"hidden_size": 128, "intermediate_size": 256}, "128 to 128 features"), ({"num_hidden_layers": 3}, "layers.2")],
    ids=["narrower", "deeper"],
)
def test_an_adapter_of_another_model_is_refused(
    engine: Any, model: Path, tmp_path: Path, changes: dict[str, int], live: str
) -> None:
    """vLLM copies what is too small into a corner of its buffers, and passes over layers that it has not."""
    own = trlpatch.attach_engine(tiny.policy(model), engine)
    other = trlpatch.attach_engine(tiny.policy(tiny.checkpoint(tmp_path / "other", **changes)), engine, check=False)
    with pytest.raises((EngineMismatch, AdapterNotExpressible), match=live):
        other.load_lora()
    other.save_lora(tmp_path / "adapter")
    with pytest.raises(EngineMismatch, match="vLLM would load what fits"):
        own.load_lora(str(tmp_path / "adapter"))
    tiny.move(own, seed=1)
    assert gap(engine, own, own.load_lora()) < TOLERANCE, "nothing of it is left in the engine"
