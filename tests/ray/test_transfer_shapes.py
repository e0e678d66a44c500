"""vLLM's weight transfer as it is installed: what the actor offers its client, and NCCL's calls without NCCL."""

from __future__ import annotations

from tests.cpu import tiny  # isort: skip  # noqa: F401  # sets vLLM's environment

import inspect
import queue
import sys
import threading
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
vllm = pytest.importorskip("vllm")

from tests.ray.local_calls import LocalCalls, LocalEngines  # noqa: E402
from trlpatch.errors import EngineLost  # noqa: E402
from trlpatch.ray.transfer import nccl, shapes  # noqa: E402
from trlpatch.ray.transfer.methods import WeightTransferMethods  # noqa: E402
from trlpatch.ray.transfer.sender import WeightSender  # noqa: E402

pytestmark = pytest.mark.cpu

OLD = str(vllm.__version__).startswith("0.23")


def test_the_shape_is_found() -> None:
    assert (shapes.worker_has_session(), shapes.session_is_the_engines(), shapes.nccl_side()) == (
        True,
        not OLD,
        "static" if OLD else "trainer",
    )
    assert shapes.route_for("cpu") == ("functions" if OLD else "tensors")
    assert shapes.route_for("cuda") == "nccl"
    assert shapes.route_for("cuda", "tensors") == shapes.route_for("cpu")
    with pytest.raises(ValueError, match="has no NCCL weight transfer"):
        shapes.route_for("cpu", "nccl")
    with pytest.raises(ValueError, match='expected "auto", "nccl" or "tensors"'):
        shapes.route_for("cuda", "ipc")


@pytest.mark.skipif(OLD, reason="vLLM 0.23 has no client")
def test_vllms_own_client_finds_its_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.weight_transfer.clients import RayVLLMWeightSyncClient

    class Weights:
        def __init__(self) -> None:
            self.calls: list[tuple[str, Any]] = []

        def __getattr__(self, name: str) -> Any:
            return lambda *args: self.calls.append((name, args))

    class Remote:
        """A Ray actor's handle."""

        def __init__(self, actor: Any) -> None:
            self._actor = actor

        def __getattr__(self, name: str) -> Any:
            return SimpleNamespace(remote=getattr(self._actor, name))

    actor = WeightTransferMethods()
    actor.weights = weights = Weights()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda references: references))
    client = RayVLLMWeightSyncClient([Remote(actor)])
    client.init_weight_transfer_engine({"master_port": 1})
    client.start_weight_update()
    client.update_weights({"names": ["a"]})
    named = "weight_version" in inspect.signature(client.finish_weight_update).parameters
    client.finish_weight_update(*["5"] if named else [])
    assert weights.calls == [
        ("connect", ({"master_port": 1},)),
        ("begin", ()),
        ("update", ({"names": ["a"]},)),
        ("finish", (None,)),
        *[("name", ("5",))] * named,
    ]


class Wire:
    """NCCL in memory: what rank 0 broadcasts is received by all others, once all have come."""

    def __init__(self) -> None:
        self.queues: defaultdict[int, queue.Queue[Any]] = defaultdict(queue.Queue)
        self.ranks: list[int] = []
        self._barriers: dict[int, threading.Barrier] = {}
        self._lock = threading.Lock()

    def create(self, host: str, port: int, rank: int, world_size: int, **_: Any) -> Any:
        with self._lock:
            self.ranks.append(rank)
            barrier = self._barriers.setdefault(port, threading.Barrier(world_size))
        barrier.wait(60)
        return rank, world_size

    def communicator(self, group: Any, device: Any) -> Any:
        rank, world_size = group

        def broadcast(tensor: Any, src: int, stream: Any = None) -> None:
            if rank == src:
                for other in range(1, world_size):
                    self.queues[other].put(tensor.clone())
            else:
                tensor.copy_(self.queues[rank].get(timeout=60))

        return SimpleNamespace(broadcast=broadcast, rank=rank, destroy=lambda: None)


class TorchWithoutCuda:
    """`torch` for modules that take a GPU for granted."""

    def __init__(self) -> None:
        stream = SimpleNamespace(synchronize=lambda: None)
        self.cuda = SimpleNamespace(
            Stream=lambda: stream,
            stream=lambda _: threading.Lock(),
            current_stream=lambda: stream,
            is_available=lambda: False,
        )
        self.accelerator = SimpleNamespace(current_device_index=lambda: 0, synchronize=lambda: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        return torch.empty(*args, **kwargs)


class Workers:
    """An engine of two workers, each with vLLM's own NCCL engine and a model that notes what it loads."""

    def __init__(self, index: int, broken: bool = False) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        self.loaded: list[dict[str, Any]] = [{}, {}]
        self.version = ""
        self.lost = ""
        self._broken = broken
        self._workers = []
        for rank, loaded in enumerate(self.loaded):
            parallel = SimpleNamespace(data_parallel_index=0, world_size=2, rank=rank)
            model = SimpleNamespace(load_weights=loaded.update)
            settings = SimpleNamespace(parallel_config=parallel, model_config=None)
            given = (parallel, model) if OLD else (settings, torch.device("cpu"), model)
            self._workers.append((NCCLWeightTransferEngine(SimpleNamespace(backend="nccl"), *given), model))

    def weight_route(self) -> str:
        return "nccl"

    def weight_refusal(self) -> None:
        return None

    def weight_ranks(self) -> int:
        return 2

    def start_weight_update(self) -> None:
        """Nothing is packed."""

    def init_weight_transfer_engine(self, request: Any) -> None:
        self._each(lambda engine, _: engine.init_transfer_engine(engine.parse_init_info(request["init_info"])))

    def update_weights(self, request: Any) -> None:
        if self._broken:
            raise RuntimeError("out of memory")

        def receive(engine: Any, model: Any) -> None:
            info = engine.parse_update_info(request["update_info"])
            engine.receive_weights(info, *[model.load_weights] * OLD)

        self._each(receive)

    def finish_weight_update(self, version: str) -> None:
        self.version = version

    def lose(self, reason: str) -> None:
        self.lost = reason

    def _each(self, function: Any) -> None:
        errors: list[Exception] = []

        def run(engine: Any, model: Any) -> None:
            try:
                function(engine, model)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=worker) for worker in self._workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    import vllm.distributed.device_communicators.pynccl as pynccl
    import vllm.distributed.utils as utils
    from vllm.distributed.weight_transfer import nccl_engine, packed_tensor

    made = Wire()
    monkeypatch.setattr(utils.StatelessProcessGroup, "create", staticmethod(made.create))
    monkeypatch.setattr(pynccl, "PyNcclCommunicator", made.communicator)
    modules = [nccl_engine, packed_tensor]
    if not OLD:
        from vllm.distributed.weight_transfer import nccl_common

        modules.append(nccl_common)
    for module in modules:
        monkeypatch.setattr(module, "torch", TorchWithoutCuda())
    monkeypatch.setattr(nccl, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(nccl, "_address", lambda: "nowhere")
    monkeypatch.setattr(nccl, "_free_port", lambda: 1)
    return made


def test_vllms_nccl_classes_carry_every_part_to_every_worker(wire: Wire) -> None:
    engines = LocalEngines([Workers(0), Workers(1)])
    sender = WeightSender(engines, calls=LocalCalls(), chunk_bytes=100)
    for round_ in range(2):
        weights = [(f"w{number}", torch.randn(3, 4) + round_) for number in range(7)]
        weights.append(("half", torch.ones(5, dtype=torch.bfloat16) * round_))
        sent = sender.send(weights, str(round_))
        assert sent.parts > 2
        for engine in engines.handles:
            assert engine.version == str(round_)
            for loaded in engine.loaded:
                assert list(loaded) == [name for name, _ in weights]
                assert all(torch.equal(loaded[name], tensor) for name, tensor in weights)
    assert sorted(wire.ranks) == [0, 1, 2, 3, 4]
    sender.close()


def test_an_engine_that_fails_in_a_broadcast_costs_all(wire: Wire) -> None:
    engines = LocalEngines([Workers(0), Workers(1, broken=True)])
    calls = LocalCalls()
    sender = WeightSender(engines, calls=calls, chunk_bytes=100)
    with pytest.raises(EngineLost, match=r"out of memory.*no engine is left"):
        sender.send([("w", torch.ones(3))], "1")
    calls.close()
    assert all(engine.lost and not engine.version for engine in engines.handles)
