"""Weights sent to several engines, some of which fail; the engines are objects of this process."""

from __future__ import annotations

import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.ray.local_calls import LocalCalls, LocalEngines  # noqa: E402
from trlpatch.errors import EngineAsleep, EngineBusy, EngineLost, WeightsRefused  # noqa: E402
from trlpatch.ray.transfer.chunks import chunks  # noqa: E402
from trlpatch.ray.transfer.sender import WeightSender  # noqa: E402

pytestmark = pytest.mark.torch

WEIGHTS = [(f"layers.{number}", torch.full((4,), float(number))) for number in range(8)]
PART = 40
"""Bytes: two of the weights."""


class Engine:
    """What an actor does of an update, in order; `failing` raises in the named method."""

    def __init__(self, **failing: Exception) -> None:
        self.did: list[str] = []
        self.weights: dict[str, Any] = {}
        self.version = "0"
        self.lost = ""
        self._new: dict[str, Any] = {}
        self._failing = failing
        self.route = "tensors"

    def _do(self, name: str) -> None:
        self.did.append(name)
        if name in self._failing:
            raise self._failing[name]

    def weight_route(self) -> str:
        return self.route

    def weight_refusal(self) -> Exception | None:
        return self._failing.get("weight_refusal")

    def start_weight_update(self) -> None:
        self._do("start")

    def update_weights(self, request: Any) -> None:
        self._do("update")
        if "late" in self._failing and len(self.did) > 2:
            raise self._failing["late"]
        self._new |= dict(request["update_info"]["weights"])

    def finish_weight_update(self, version: str) -> None:
        self._do("finish")
        self.weights, self.version = self._new, version

    def abandon_weight_update(self) -> None:
        self._do("abandon")

    def lose(self, reason: str) -> None:
        self.lost = reason


class Rig:
    def __init__(self, *engines: Engine, **calls: Any) -> None:
        self.calls = LocalCalls(**calls)
        self.engines = LocalEngines(list(engines))
        self.sender = WeightSender(self.engines, calls=self.calls, chunk_bytes=PART)


def test_every_engine_has_every_weight_under_the_name() -> None:
    rig = Rig(Engine(), Engine())
    sent = rig.sender.send(iter(WEIGHTS), "7")
    for engine in rig.engines.handles:
        assert engine.did == ["start", *["update"] * 4, "finish"]
        assert {name: one.tolist() for name, one in engine.weights.items()} == {
            name: one.tolist() for name, one in WEIGHTS
        }
        assert engine.version == "7"
    assert (sent.version, sent.bytes, sent.parts, sent.engines) == ("7", 128, 4, (0, 1))
    assert rig.engines.weights_version == "7"


def test_an_engine_that_fails_in_the_middle_is_lost_and_the_other_gets_the_whole() -> None:
    rig = Rig(Engine(late=RuntimeError("no such weight")), Engine())
    with pytest.raises(EngineLost, match=r"weights 1: lost rollout engines 0 \(no such weight\); engines 1 have them"):
        rig.sender.send(WEIGHTS, "1")
    failed, whole = rig.engines.handles
    assert "finish" not in failed.did
    assert len(whole.weights) == 8
    assert rig.engines.lost == [0]
    assert rig.engines.weights_version == "1"
    rig.calls.close()
    assert "no such weight" in failed.lost


def test_an_engine_that_does_not_answer_is_lost() -> None:
    stuck = Engine()
    rig = Rig(stuck, Engine(), silent=[(stuck, "finish_weight_update")])
    with pytest.raises(EngineLost, match=r"lost rollout engines 0 \(no answer in 120 s\); engines 1 have them"):
        rig.sender.send(WEIGHTS, "1")
    rig.calls.close()
    assert "no answer" in stuck.lost


def test_all_lost_is_said() -> None:
    rig = Rig(Engine(update=RuntimeError("one")), Engine(start=RuntimeError("two")))
    with pytest.raises(EngineLost, match="no engine is left"):
        rig.sender.send(WEIGHTS, "1")
    assert rig.engines.weights_version == "0"


@pytest.mark.parametrize("error", [WeightsRefused("quantized"), EngineAsleep("asleep"), EngineBusy("busy")])
def test_what_one_engine_refuses_is_begun_in_none(error: Exception) -> None:
    rig = Rig(Engine(), Engine(weight_refusal=error))
    with pytest.raises(type(error), match=str(error)):
        rig.sender.send(WEIGHTS, "1")
    assert [engine.did for engine in rig.engines.handles] == [[], []]


def test_what_one_engine_refuses_too_late_leaves_the_others_torn() -> None:
    rig = Rig(Engine(), Engine(start=EngineBusy("a request came")))
    with pytest.raises(EngineBusy, match="a request came"):
        rig.sender.send(WEIGHTS, "1")
    assert [engine.did for engine in rig.engines.handles] == [["start", "abandon"], ["start"]]


def test_an_error_of_the_iterator_abandons_the_update() -> None:
    def failing() -> Any:
        yield from WEIGHTS[:5]
        raise KeyboardInterrupt

    rig = Rig(Engine())
    with pytest.raises(KeyboardInterrupt):
        rig.sender.send(failing(), "1")
    assert rig.engines.handles[0].did == ["start", "update", "update", "abandon"]


def test_engines_of_different_ways_are_refused() -> None:
    rig = Rig(Engine(), Engine())
    rig.engines.handles[1].route = "nccl"
    with pytest.raises(WeightsRefused, match="different ways"):
        rig.sender.send(WEIGHTS, "1")


def test_sending_goes_on_beside_the_caller() -> None:
    going_on = threading.Event()

    def wait(_: Any, method: str, __: Any) -> None:
        if method == "update_weights":
            going_on.wait(60)

    rig = Rig(Engine(), hook=wait)
    rig.sender.start(WEIGHTS, "1")
    with pytest.raises(EngineBusy, match="others are being sent"):
        rig.sender.send(WEIGHTS, "2")
    assert rig.engines.handles[0].version == "0"
    going_on.set()
    assert rig.sender.finish().version == "1"
    with pytest.raises(EngineBusy, match="nothing is being sent"):
        rig.sender.finish()


def test_errors_of_the_thread_are_raised_by_finish() -> None:
    rig = Rig(Engine(start=RuntimeError("broken")))
    rig.sender.start(WEIGHTS, "1")
    with pytest.raises(EngineLost, match="broken"):
        rig.sender.finish()
    rig.engines.handles = [Engine()]
    assert rig.sender.send(WEIGHTS, "2").engines == (0,)


def test_an_engine_in_a_lost_ones_place_gets_what_the_others_have() -> None:
    weights = [(name, tensor.clone()) for name, tensor in WEIGHTS]
    rig = Rig(Engine())
    fresh = Engine()
    assert not rig.sender.restore(fresh, 0, "1")
    rig.sender.send(weights, "1")
    assert rig.sender.restore(fresh, 0, "1")
    assert len(fresh.weights) == 8
    assert fresh.version == "1"
    assert not rig.sender.restore(Engine(), 0, "0")
    weights[0][1].add_(1)  # trained: these are not what the others have
    assert not rig.sender.restore(Engine(), 0, "1")


def test_what_can_be_iterated_over_only_once_cannot_be_restored() -> None:
    rig = Rig(Engine())
    rig.sender.send(iter(WEIGHTS), "1")
    assert not rig.sender.restore(Engine(), 0, "1")


def test_parts_are_copies_of_a_limited_size() -> None:
    storage = torch.arange(1000.0)
    parts = list(chunks([("row", storage[10:14]), ("large", torch.ones(30)), ("t", torch.ones(2, 3).T)], limit=64))
    assert [[name for name, _ in part] for part in parts] == [["row"], ["large"], ["t"]]
    (_, row), *_ = parts[0]
    storage.zero_()
    assert row.tolist() == [10.0, 11.0, 12.0, 13.0]
    assert row.untyped_storage().nbytes() == 16
    assert parts[2][0][1].is_contiguous()


@pytest.mark.parametrize("kind", ["meta", "DTensor", "ZeRO-3"])
def test_sharded_weights_are_refused(kind: str) -> None:
    tensor = torch.empty(2, device="meta" if kind == "meta" else "cpu")
    if kind != "meta":
        setattr(tensor, "full_tensor" if kind == "DTensor" else "ds_id", lambda: None)
    with pytest.raises(ValueError, match=r"'a\.weight' is sharded"):
        list(chunks([("a.weight", tensor)]))
