"""The trainer's side of vLLM's NCCL weight transfer, in the forms of 0.23 to 0.27 and of 0.28 and newer.

Written against vLLM's sources and run with its own classes on a CPU, with a communicator that copies in memory. It has
not run on GPUs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any

from trlpatch.errors import EngineLost, RolloutTimeout
from trlpatch.ray.transfer import shapes
from trlpatch.ray.transfer.fan_out import Update

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_PORTS = 3
"""How often another port is tried: one that is free when it is picked may be taken when it is bound."""


class NcclGroup:
    """The trainer as rank 0 and each engine's workers behind one another; all of them, or none, have what is sent."""

    def __init__(self, update: Update) -> None:
        self._members = dict(update.live)
        self._update = update
        self._timeout = update.timeout
        self.device = _device()
        self._side: Any = _Trainer(self) if shapes.nccl_side() == "trainer" else _Static(self)
        self._within(self._connect, "joining the transfer group")

    def of(self, handles: dict[int, Any]) -> bool:
        """Is it of these engines?"""
        return self._members == handles

    def send(self, part: list[tuple[str, Tensor]], update: Update) -> None:
        """Broadcast one part while the engines receive it; every engine is lost when that fails."""
        self._update = update
        _wait()
        try:
            self._within(lambda: self._side.send(part), "a broadcast")
        except Exception as error:
            update.drop(dict.fromkeys(update.live, error))

    def close(self) -> None:
        """Leave it."""
        self._side.close()

    # What vLLM's trainer engine calls, and what static functions are called with.

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Send each engine its own first rank.

        vLLM's client sends one for all, which is right for the replicas of one engine: they add their data-parallel
        rank to it. Engines of their own would all be rank 1, and wait for ever.
        """
        sizes, offset, infos = self._sizes(), 1, {}
        for index in self._members:
            infos[index] = {"init_info": {**init_info, "rank_offset": offset}}
            offset += sizes[index]
        self._require(self._update.ask_each("init_weight_transfer_engine", infos))

    def start_weight_update(self) -> None:
        """One update has several parts: it was started before the first."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Have the engines receive; they block until the broadcast."""
        self._require(self._update.ask("update_weights", {"update_info": update_info}))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """It is finished after the last part."""

    def _connect(self) -> None:
        world_size = 1 + sum(self._sizes().values())
        for attempt in range(_PORTS):
            try:
                self._side.connect(_address(), _free_port(), world_size)
                return
            except OSError:
                if attempt + 1 == _PORTS:
                    raise

    def _sizes(self) -> dict[int, int]:
        sizes = self._update.ask("weight_ranks")
        self._require(sizes)
        return sizes

    @staticmethod
    def _require(answers: dict[int, Any]) -> None:
        for index, answer in answers.items():
            if isinstance(answer, BaseException):
                raise EngineLost(f"rollout engine {index}: {answer}") from answer

    def _within(self, function: Callable[[], None], what: str) -> None:
        """Run it in a thread: NCCL waits for ever for a rank that has failed, and cannot be interrupted."""
        done: Future[None] = Future()

        def run() -> None:
            import torch

            try:
                if torch.cuda.is_available():
                    torch.cuda.set_device(self.device)
                function()
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=run, name="nccl-weights", daemon=True).start()
        try:
            done.result(self._timeout)
        except FutureTimeout:
            if done.done():
                raise
            raise RolloutTimeout(f"{what} of weights over NCCL did not end in {self._timeout:g} s") from None


class _Trainer:
    """vLLM 0.28 and newer: `NCCLTrainerWeightTransferEngine`, with one part at a time as its source."""

    def __init__(self, group: NcclGroup) -> None:
        self._group = group
        self._engine: Any = None

    def connect(self, address: str, port: int, world_size: int) -> None:
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        info = NCCLTrainerInitInfo(address, port, world_size, rank=0)
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=self._group, source=_Part([]))

    def send(self, part: list[tuple[str, Tensor]]) -> None:
        self._engine.source = _Part(part)
        try:
            self._engine.send_weights()
        finally:
            self._engine.source = _Part([])

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()


class _Static:
    """vLLM 0.23 to 0.27: static functions, and the calls around them are the trainer's."""

    def __init__(self, group: NcclGroup) -> None:
        self._group = group
        self._communicator: Any = None

    def connect(self, address: str, port: int, world_size: int) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        info = {"master_address": address, "master_port": port, "world_size": world_size}
        waiting = _in_thread(lambda: self._group.init_weight_transfer_engine({**info, "rank_offset": 1}))
        self._communicator = NCCLWeightTransferEngine.trainer_init(info)
        waiting.result()

    def send(self, part: list[tuple[str, Tensor]]) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerSendWeightsArgs, NCCLWeightTransferEngine

        info = {
            "names": [name for name, _ in part],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in part],
            "shapes": [list(tensor.shape) for _, tensor in part],
            "packed": True,
        }
        receiving = _in_thread(lambda: self._group.update_weights(info))
        arguments = NCCLTrainerSendWeightsArgs(group=self._communicator, packed=True)
        NCCLWeightTransferEngine.trainer_send_weights(iter(part), arguments)
        receiving.result()

    def close(self) -> None:
        self._communicator = None


class _Part:
    """vLLM's WeightSource of one part."""

    def __init__(self, part: list[tuple[str, Tensor]]) -> None:
        self._part = part

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._part]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._part)


def _in_thread(function: Callable[[], None]) -> Future[None]:
    done: Future[None] = Future()

    def run() -> None:
        try:
            function()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="weight-calls", daemon=True).start()
    return done


def _device() -> torch.device:
    import torch

    return torch.device("cuda", torch.cuda.current_device())


def _wait() -> None:
    """For what has made the tensors: vLLM packs them on streams of its own, which do not."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


def _address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def _free_port() -> int:
    from vllm.utils.network_utils import get_open_port

    return int(get_open_port())
