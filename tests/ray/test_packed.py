"""An adapter on its way: one buffer, rounded once, and what an engine's adapter sync is given of it."""

from __future__ import annotations

import gc
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from trlpatch.engine.adapter_sync import registry  # noqa: E402
from trlpatch.errors import StaleAdapter  # noqa: E402
from trlpatch.policy.adapter import LoraWeights  # noqa: E402
from trlpatch.policy.adapter_tensors import adapter_tensors  # noqa: E402
from trlpatch.ray.adapter_source import lora_weights  # noqa: E402
from trlpatch.ray.adapter_sync import RayAdapterSync  # noqa: E402
from trlpatch.ray.packed import PackedAdapter, pack  # noqa: E402

pytestmark = pytest.mark.torch

PATHS = ("model.layers.0.q_proj", "model.layers.1.q_proj")


def weights(*, ranks: tuple[int, int] = (4, 4), seed: int = 0, dtype: Any = torch.float32) -> LoraWeights:
    torch.manual_seed(seed)
    a = [torch.randn(rank, 6).to(dtype) for rank in ranks]
    b = [torch.randn(5, rank).to(dtype) for rank in ranks]
    return LoraWeights(PATHS, a, b, [2.0, 0.5], [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_arrives_is_what_an_engine_would_have_rounded_to(dtype: Any) -> None:
    own = weights()
    packed: PackedAdapter = pickle.loads(pickle.dumps(pack(own, dtype)))
    assert packed.nbytes == sum(tensor.numel() for tensor in own.parameters) * dtype.itemsize
    arrived = lora_weights(packed)
    assert arrived.paths == PATHS
    assert (arrived.rank, arrived.targets, arrived.scalings) == (4, ("q_proj",), [1.0, 1.0])
    for a, there in zip(own.a, arrived.a, strict=True):
        assert torch.equal(a.to(dtype), there)
    for b, scaling, there in zip(own.b, own.scalings, arrived.b, strict=True):
        assert torch.equal((b.float() * scaling).to(dtype), there)


def test_ranks_are_padded_to_one() -> None:
    arrived = lora_weights(pack(weights(ranks=(4, 2)), torch.float32))
    assert [tuple(a.shape) for a in arrived.a] == [(4, 6), (4, 6)]
    assert not arrived.a[1][2:].any()


def test_packing_allocates_once_and_rounds_anew() -> None:
    own = weights(ranks=(4, 2))
    first = pack(own, torch.bfloat16)
    address, before = first.buffer.ctypes.data, first.buffer.copy()
    own.a[0].data.add_(1.0)
    own.b[1].data.mul_(3.0)
    own.scalings[1] = 1.0
    second = pack(own, torch.bfloat16)
    assert second.buffer.ctypes.data == address
    assert (second.buffer != before).any()
    arrived = lora_weights(second)
    assert torch.equal(arrived.a[0], own.a[0].bfloat16())
    assert torch.equal(arrived.b[1][:, :2], own.b[1].bfloat16())
    assert not arrived.b[1][:, 2:].any(), "the padding stays zero"
    assert pack(own, torch.float32).dtype == "float32"


def test_the_next_version_is_written_over_the_one_before_and_another_shape_is_not() -> None:
    before = lora_weights(pack(weights(), torch.float32))
    following = weights(seed=1)
    again = lora_weights(pack(following, torch.float32), before)
    assert again is before
    assert torch.equal(again.a[0], following.a[0])
    other = lora_weights(pack(weights(ranks=(2, 2)), torch.float32), before)
    assert other is not before
    assert lora_weights(adapter_tensors(following), before) is before, "tensors are taken as they are, too"


def test_what_an_engine_keeps_is_not_the_message() -> None:
    packed = pack(weights(), torch.float32)
    kept = lora_weights(packed)
    kept.a[0].zero_()
    assert packed.unpack().tensors[f"base_model.model.{PATHS[0]}.lora_A.weight"].any()


class Engines:
    """As much of RayEngines as an adapter is sent through."""

    adapter_version = adapter_bytes = 0
    sync_seconds = 0.0

    def __init__(self, lora_dtype: Any = torch.float32) -> None:
        config = SimpleNamespace(lora_config=SimpleNamespace(lora_dtype=lora_dtype))
        self.llm_engine = SimpleNamespace(vllm_config=config)
        self.sent: list[PackedAdapter] = []
        self.held: Any = None

    def publish_adapter(self, packed: PackedAdapter, request: Any) -> None:
        self.sent.append(packed)
        self.held = request

    def holds_live(self, request: Any) -> bool:
        return self.held is request


@pytest.fixture(autouse=True)
def requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without vLLM there is no LoRARequest."""
    count = iter(range(1, 100))

    def fresh(directory: Any, *, lora_id: int | None = None) -> Any:
        return SimpleNamespace(lora_name=f"trlpatch-v{next(count)}", lora_int_id=lora_id)

    monkeypatch.setattr(registry, "fresh_request", fresh)


def test_an_adapter_is_sent_when_its_contents_have_changed() -> None:
    engines: Any = Engines(torch.bfloat16)
    sync, own = RayAdapterSync(engines), weights()
    first = sync.publish(own)
    assert sync.publish(own) is first
    assert len(engines.sent) == 1
    assert engines.sent[0].dtype == "bfloat16"
    assert engines.sync_seconds > 0, "packing counts, too"
    own.b[0].data.add_(1.0)  # as fused AdamW does, without moving a version counter
    second = sync.publish(own)
    assert second is not first
    assert (sync.holds(first), sync.holds(second)) == (False, True)
    own.scalings[0] = 3.0
    assert sync.publish(own) is not second
    assert len(engines.sent) == 3


def test_an_adapter_is_sent_again_when_the_engines_do_not_hold_it_any_more() -> None:
    engines: Any = Engines()
    sync, own = RayAdapterSync(engines), weights()
    first = sync.publish(own)
    engines.held = None
    assert not sync.holds(first)
    second = sync.publish(own)
    sync.invalidate()
    assert not sync.holds(second)
    sync.publish(own)
    assert len(engines.sent) == 3


def test_engines_that_are_gone_are_not_sent_to() -> None:
    engines: Any = Engines()
    sync = RayAdapterSync(engines)
    del engines
    gc.collect()
    with pytest.raises(StaleAdapter):
        sync.publish(weights())
    assert sync.description == "sent to Ray actors"
