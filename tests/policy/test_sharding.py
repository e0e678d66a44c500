"""Adapters whose parameters are sharded: on two ranks over gloo, and what one rank may do by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.fakes.engine import RecordingAdapterSync, RecordingEngineStub  # noqa: E402
from tests.fakes.models import lora_model, randomize  # noqa: E402
from tests.fakes.owners import Since110  # noqa: E402
from tests.policy.sharded_ranks import CASES, SECONDS  # noqa: E402
from trlpatch import hooks  # noqa: E402
from trlpatch.engine.attach import attach_engine, save_lora  # noqa: E402
from trlpatch.engine.base_weights import differs  # noqa: E402
from trlpatch.engine.state import state_of  # noqa: E402
from trlpatch.errors import AdapterNotExpressible, StaleAdapter  # noqa: E402
from trlpatch.hooks.lora_request import live_lora_request, one_ranks_request  # noqa: E402
from trlpatch.policy import lora_support  # noqa: E402
from trlpatch.policy.adapter import lora_view  # noqa: E402
from trlpatch.policy.sharding import filled_later, local_of, piece_of, shape_of, sharded_by  # noqa: E402

pytestmark = pytest.mark.torch
ROOT = Path(__file__).parents[2]


def on_two_ranks(case: str, directory: Path) -> None:
    """Run it, with nothing to be agreed on but a file; ranks end by themselves after SECONDS."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tests.policy.sharded_ranks", case, str(directory / "store"), str(directory)]
    logs = [(directory / f"log{rank}").open("w") for rank in range(2)]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(SECONDS + 30) for process in ranks]
    finally:
        for process, log in zip(ranks, logs, strict=True):
            process.kill()
            log.close()
    assert codes == [0, 0], "\n".join((directory / f"log{rank}").read_text()[-4000:] for rank in range(2))


def check(case: str, directory: Path, *, sharded: str | None, gathering: list[str] | None) -> None:
    found: list[dict[str, Any]] = [json.loads((directory / f"{case}{rank}.json").read_text()) for rank in range(2)]
    for rank in found:
        assert (rank["sharded"], rank["reason"]) == (sharded, None)
        assert rank["alone"] == [], "comparing is no collective: one rank may do it"
        if gathering is not None:
            assert len(rank["gathering"]) == len(gathering), "one collective for all parameters"
        named = ("unchanged", "before", "moved", "after", "after a forward pass", "shapes", "pieces", "addresses")
        assert [name for name in named if not rank[name]] == []
        assert rank["highest"] == (0 if sharded is None else 1), "both ranks know what one of them knows"


def test_the_adapter_alone_is_gathered_from_fsdp2(tmp_path: Path) -> None:
    on_two_ranks("all", tmp_path)
    for case in CASES:
        check(case, tmp_path, sharded="FSDP2", gathering=["all_gather"])


@pytest.mark.skipif("TRLPATCH_TEST_DEEPSPEED" not in os.environ, reason="on request: DeepSpeed is in no tier")
@pytest.mark.parametrize(("case", "sharded"), [("zero2", None), ("zero3", "DeepSpeed ZeRO-3")])
def test_the_adapter_alone_is_gathered_from_deepspeed(case: str, sharded: str | None, tmp_path: Path) -> None:
    on_two_ranks(case, tmp_path)
    check(case, tmp_path, sharded=sharded, gathering=None)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone, without a port."""
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def sharded_model() -> Any:
    from torch.distributed.fsdp import fully_shard

    model = lora_model()
    randomize(model)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def move(model: Any) -> None:
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).add_(1.0)


def engine_of_ours() -> RecordingEngineStub:
    engine = RecordingEngineStub()
    state_of(engine).adapter_sync = RecordingAdapterSync()
    return engine


def published(engine: Any) -> list[Any]:
    found: list[Any] = state_of(engine).adapter_sync.published  # type: ignore[union-attr]
    return found


def test_a_sharded_adapter_is_handed_over_whole_where_trl_calls(one_rank: None) -> None:
    engine, model = engine_of_ours(), sharded_model()
    owner = Since110(model, engine, sleep=False)
    assert hooks.hand_over(owner)
    first = hooks.lora_request(owner, engine)
    assert hooks.hand_over(owner)
    assert hooks.lora_request(owner, engine) is first, "no rank's part has moved"
    assert len(published(engine)) == 1
    move(model)
    assert hooks.lora_request(owner, engine) is not first
    whole = dict(zip(published(engine)[1].tensors, published(engine)[1].tensors.values(), strict=True))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            assert torch.equal(whole[name.replace(".default", "")], parameter.full_tensor())


def test_one_rank_alone_gets_the_current_request_or_an_error_but_no_collective(
    one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = engine_of_ours(), sharded_model()
    attach_engine(model, engine, check=False)
    owner = Since110(model, engine, sleep=False)

    def collective(*_: Any, **__: Any) -> Any:
        raise AssertionError("a collective")

    def alone(name: str) -> None:
        for one in ("all_reduce", "all_gather_into_tensor", "all_gather_single"):
            if hasattr(torch.distributed, one):
                monkeypatch.setattr(torch.distributed, one, collective)
        with pytest.raises(StaleAdapter, match=r"sharded over ranks \(FSDP2\).*gathering it takes every rank"):
            one_ranks_request(owner, engine)
        with pytest.raises(StaleAdapter, match="gathering it takes every rank"):
            live_lora_request(model)
        monkeypatch.undo()

    alone("before the first rollout")
    request = hooks.lora_request(owner, engine)
    assert one_ranks_request(owner, engine) is request
    assert live_lora_request(model) is request
    move(model)
    alone("after a step")
    assert hooks.lora_request(owner, engine) is not request


def test_a_push_is_not_begun_by_one_rank(one_rank: None) -> None:
    engine, model = RecordingEngineStub(lora_rank=2), sharded_model()
    owner = Since110(model, engine, sleep=False)
    with pytest.raises(StaleAdapter, match=r"its rank 4 is above.*a weight sync takes every rank"):
        one_ranks_request(owner, engine)
    assert owner.syncs == 0
    assert hooks.lora_request(owner, engine) is None
    assert (owner.syncs, engine.weights) == (1, "policy")


def test_a_part_of_an_adapter_is_not_saved(one_rank: None, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotExpressible, match=r"sharded over ranks \(FSDP2\).*trainer\.save_model"):
        save_lora(sharded_model(), tmp_path)


def test_the_engines_weights_are_compared_with_the_part_that_is_here(one_rank: None) -> None:
    model = sharded_model()
    layer = lora_view(model).layers[0][1].get_base_layer()  # type: ignore[union-attr]
    whole = layer.weight.full_tensor().detach().clone()
    other = layer.weight.detach().full_tensor().clone() + 1
    stacked = torch.cat([whole, whole + 1])
    assert not differs(whole, [layer.weight])
    assert differs(other, [layer.weight])
    assert differs(stacked, [layer.weight, layer.weight])


def zero3_double(whole: Any, *, rank: int, world: int = 2, status: str = "AVAILABLE") -> Any:
    """Not DeepSpeed's: an empty parameter with the attributes that it gives a released one."""
    size = -(-whole.numel() // world)
    flat = torch.cat([whole.reshape(-1), torch.zeros(size * world - whole.numel())])
    parameter = torch.nn.Parameter(torch.empty(0))
    part = flat[rank * size : (rank + 1) * size].clone()
    part.status = SimpleNamespace(name=status)  # type: ignore[attr-defined]
    attributes = {"ds_id": 1, "ds_shape": whole.shape, "ds_numel": whole.numel(), "ds_tensor": part}
    for name, value in attributes.items():
        setattr(parameter, name, value)
    return parameter


@pytest.mark.parametrize("rank", [0, 1])
def test_a_released_zero3_parameter_is_read_by_its_own_attributes(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: rank)
    whole = torch.arange(9.0).reshape(3, 3)
    parameter = zero3_double(whole, rank=rank)
    parameter.ds_process_group = None
    assert sharded_by(parameter) == "DeepSpeed ZeRO-3"
    assert shape_of(parameter) == (3, 3)
    assert local_of(parameter) is parameter.ds_tensor
    start, piece = piece_of(parameter)  # type: ignore[misc]
    assert torch.equal(whole.reshape(-1)[start:][: piece.numel()], piece)
    assert piece.numel() == (5, 4)[rank]
    assert not differs(whole, [parameter])
    assert differs(whole + 1, [parameter])


def test_what_zero3_keeps_on_nvme_is_left_to_trl() -> None:
    model = lora_model()
    layer = lora_view(model).layers[0][1]  # type: ignore[union-attr]
    own = layer.lora_A["default"]
    own.weight = zero3_double(own.weight.detach(), rank=0, status="NOT_AVAILABLE")
    assert "out of memory (NVMe)" in str(lora_support.unsupported_reason(lora_view(model)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("rank", "loading", "later"), [("0", "true", False), ("1", "true", True), ("1", "", False)])
def test_only_the_first_rank_of_a_host_has_weights_under_efficient_loading(
    rank: str, loading: str, later: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", loading)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert filled_later() is later
