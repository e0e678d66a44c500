"""`WeightSender`: send all weights of a model to rollout engines, under a name that the caller gives.

In the order start, parts, finish, in all engines at once. What fails in one engine is that engine's: it is lost, the
others get the whole. What fails here, in the iterator for one, leaves them torn: they answer nothing until a whole set
was sent. With `start` and `finish` it happens in a thread, while the caller does something else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from trlpatch.engine.weights_in_place.merge import float32_products
from trlpatch.errors import EngineBusy
from trlpatch.log import logger
from trlpatch.ray.timeouts import Timeouts
from trlpatch.ray.transfer.calls import Calls, RayCalls
from trlpatch.ray.transfer.chunks import CHUNK_BYTES, chunks
from trlpatch.ray.transfer.fan_out import Update
from trlpatch.ray.transfer.nccl import NcclGroup

if TYPE_CHECKING:
    from torch import Tensor


class Engines(Protocol):
    """`RayEngines`, as far as weights are sent to it."""

    handles: list[Any]
    timeouts: Timeouts


@dataclass(frozen=True)
class Sent:
    """What was sent.

    Attributes:
        version: the name that the engines' responses carry.
        bytes: of one set of weights.
        parts: how many.
        seconds: from the first call to the last answer.
        engines: indices of those that have them.
    """

    version: str
    bytes: int
    parts: int
    seconds: float
    engines: tuple[int, ...]


class WeightSender:
    """Sends to all engines, or to some."""

    def __init__(self, engines: Engines, *, calls: Calls | None = None, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._engines = engines
        self._calls = calls or RayCalls()
        self._chunk_bytes = chunk_bytes
        self._group: NcclGroup | None = None
        self._underway: tuple[Any, str, Sequence[int] | None, Future[Sent | None]] | None = None

    def send(self, weights: Iterable[tuple[str, Tensor]], version: str, *, only: Sequence[int] | None = None) -> Sent:
        """Send, and wait until every engine samples with them. Requests in flight are kept, and go on with them.

        `weights` are (name, tensor) as checkpoints have them and TRL pushes them, whole, every parameter: what is not
        among them keeps its value. Tied ones may come once or under each name. `only`: indices of engines.

        Raises:
            WeightsRefused, EngineAsleep, EngineBusy: an engine cannot take weights now; none has changed.
            EngineLost: engines were lost by it; the others have the weights.
        """
        if self._underway is not None:
            raise EngineBusy("sending weights: others are being sent; call finish() first")
        return self._required(self._send(weights, version, only))

    def start(self, weights: Iterable[tuple[str, Tensor]], version: str, *, only: Sequence[int] | None = None) -> None:
        """Begin to send in a thread of its own. The tensors must stay as they are until `finish` returns."""
        if self._underway is not None:
            raise EngineBusy("sending weights: others are being sent; call finish() first")
        _wait_for_device()
        answer: Future[Sent | None] = Future()
        self._underway = weights, version, only, answer
        threading.Thread(target=self._fill, args=self._underway, name="send-weights", daemon=True).start()

    def finish(self) -> Sent:
        """Wait for what `start` began, and raise what `send` would have raised.

        Where the tensors can tell that they were written meanwhile (`moved()`), they are sent again.
        """
        if self._underway is None:
            raise EngineBusy("sending weights: nothing is being sent; call start() first")
        weights, version, only, answer = self._underway
        try:
            sent = answer.result()
            if sent is None:
                logger.warning("weights were written while they were sent as %s; they are sent again", version)
                sent = self._required(self._send(weights, version, only))
            return sent
        finally:
            self._underway = None

    def close(self) -> None:
        """Leave the transfer group of the workers, where there is one."""
        if self._group is not None:
            self._group.close()
            self._group = None

    @staticmethod
    def _required(sent: Sent | None) -> Sent:
        if sent is None:
            raise EngineBusy(
                "sending weights: they were written while they were sent; the engines answer nothing until a whole "
                "set was sent. Send them where nothing trains"
            )
        return sent

    def _fill(self, weights: Any, version: str, only: Sequence[int] | None, answer: Future[Sent | None]) -> None:
        try:
            answer.set_result(self._send(weights, version, only))
        except BaseException as error:
            answer.set_exception(error)

    def _send(self, weights: Any, version: str, only: Sequence[int] | None) -> Sent | None:
        """None when the tensors changed meanwhile."""
        import torch

        begun = time.monotonic()
        handles = self._engines.handles
        chosen = range(len(handles)) if only is None else only
        update = Update(self._calls, {index: handles[index] for index in chosen}, self._engines.timeouts.sync)
        routes = update.routes()
        group = self._joined(update, routes) if routes == {"nccl"} else None
        update.begin()
        size = parts = 0
        try:
            mark = _mark(weights)
            with torch.inference_mode(False), torch.no_grad(), float32_products():
                limit = self._chunk_bytes
                for part in chunks(weights, limit, "cpu" if group is None else group.device):
                    size, parts = size + sum(tensor.nbytes for _, tensor in part), parts + 1
                    if group is None:
                        update.load(part)
                    else:
                        group.send(part, update)
                    if not update.live:
                        break
            if mark != _mark(weights):
                update.abandon()
                return None
        except BaseException:
            update.abandon()
            raise
        update.finish(version)
        update.raise_lost(version)
        return Sent(version, size, parts, time.monotonic() - begun, tuple(update.live))

    def _joined(self, update: Update, routes: set[str]) -> NcclGroup:
        """The group of all these engines' workers, made anew when they are others."""
        if self._group is None or not self._group.of(update.live):
            self.close()
            self._group = NcclGroup(update)
        return self._group


def _mark(weights: Any) -> Any:
    """What is equal while tensors that can tell are not written."""
    mark = getattr(weights, "mark", None)
    return mark() if callable(mark) else None


def _wait_for_device() -> None:
    """Kernels of this thread's stream: another thread's may be another one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
