"""Ranks of one engine, with a double of vLLM's group: its all_reduce is answered by another rank that does not run."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.engine import RecordingAdapterSync, RecordingEngineStub  # noqa: E402
from tests.fakes.models import lora_model, randomize  # noqa: E402
from tests.fakes.owners import Since110  # noqa: E402
from trlpatch import hooks  # noqa: E402
from trlpatch.engine.adapter_sync import registry  # noqa: E402
from trlpatch.engine.rank_agreement import seed_alike  # noqa: E402
from trlpatch.engine.state import state_of  # noqa: E402
from trlpatch.hooks.lora_request import one_ranks_request  # noqa: E402

pytestmark = pytest.mark.torch


class OtherRankDouble:
    """What the other rank comes with at each all_reduce(MAX): `says`, until it is changed."""

    def __init__(self) -> None:
        self.says = 0
        self.meetings = 0

    def all_reduce(self, value: Any, *, op: object, group: object) -> None:
        assert group == "cpu group"
        self.meetings += 1
        value.clamp_(min=self.says)


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> OtherRankDouble:
    rank = OtherRankDouble()
    state = SimpleNamespace(get_tp_group=lambda: SimpleNamespace(cpu_group="cpu group"))
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", state)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "vllm.distributed", SimpleNamespace(parallel_state=state))  # type: ignore[arg-type]
    monkeypatch.setattr(torch.distributed, "all_reduce", rank.all_reduce)
    monkeypatch.setattr(registry, "names_separate_prefixes", lambda: True)
    return rank


def owner_of(engine: RecordingEngineStub) -> Since110:
    state_of(engine).adapter_sync = RecordingAdapterSync()
    model = lora_model()
    randomize(model)
    return Since110(model, engine, sleep=False)


def test_a_rank_pushes_when_another_cannot_take_the_adapter(other: OtherRankDouble) -> None:
    engine = RecordingEngineStub(tensor_parallel=2)
    owner = owner_of(engine)
    sync: Any = state_of(engine).adapter_sync
    first = hooks.lora_request(owner, engine)
    assert hooks.lora_request(owner, engine) is first
    other.says = 1
    assert not hooks.hand_over(owner), "the other rank cannot take it: both push"
    assert len(sync.published) == 1
    assert owner.syncs == 0


def test_versions_are_numbered_alike(other: OtherRankDouble) -> None:
    engine = RecordingEngineStub(tensor_parallel=2)
    owner = owner_of(engine)
    start = registry.next_number()
    numbers: list[int] = []
    state_of(engine).adapter_sync.publish = lambda _: numbers.append(registry.next_number()) or SimpleNamespace()  # type: ignore[union-attr,method-assign,assignment,func-returns-value]
    original = other.all_reduce

    def ahead(value: Any, **given: Any) -> None:
        original(value, **given)
        if int(value) > start:
            value.fill_(start + 50)

    torch.distributed.all_reduce = ahead  # put back by the fixture
    hooks.hand_over(owner)
    assert numbers == [start + 50], "the other rank's count is further"


@pytest.mark.parametrize(("ranks", "alone"), [(1, False), (2, True)], ids=["an engine of one rank", "one rank alone"])
def test_nobody_is_waited_for(ranks: int, alone: bool, other: OtherRankDouble) -> None:
    engine = RecordingEngineStub(tensor_parallel=ranks)
    owner = owner_of(engine)
    assert (one_ranks_request(owner, engine) if alone else hooks.lora_request(owner, engine)) is not None
    assert other.meetings == 0


def test_workers_of_vllms_own_are_driven_by_one_process(other: OtherRankDouble) -> None:
    engine = RecordingEngineStub(tensor_parallel=2, tells_tags=False)
    assert hooks.lora_request(owner_of(engine), engine) is not None
    assert other.meetings == 0


def test_ranks_that_sample_for_themselves_are_seeded_alike(other: OtherRankDouble) -> None:
    engine = RecordingEngineStub(tensor_parallel=2)
    engine.llm_engine.vllm_config.model_config.seed = 3
    other.says = 5
    draws = []
    for before in (1, 2):
        torch.manual_seed(before)  # as TRL does, with another number on each rank
        seed_alike(engine)
        draws.append(torch.rand(4))
    assert torch.equal(*draws)
    assert torch.initial_seed() == 5, "of the rank with the highest, where a user gave each another"
    torch.manual_seed(1)
    seed_alike(RecordingEngineStub())
    assert torch.initial_seed() == 1
