"""`WeightSender`: send all weights of a model to rollout engines, under a name that the caller gives.

In the order start, parts, finish, in all engines at once. What fails in one engine is that engine's: it is lost, the
others get the whole. What fails here, in the iterator for one, leaves them torn: they answer nothing until a whole set
was sent. With `start` and `finish` it happens in a thread, while the caller does something else.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from trlpatch.engine.weights_in_place.merge import float32_products
from trlpatch.errors import EngineBusy, EngineLost
from trlpatch.log import logger
from trlpatch.policy.bit_sums import bit_sums
from trlpatch.ray.timeouts import Timeouts
from trlpatch.ray.transfer.calls import Calls, RayCalls
from trlpatch.ray.transfer.chunks import CHUNK_BYTES, chunks
from trlpatch.ray.transfer.fan_out import Update
from trlpatch.ray.transfer.nccl import NcclGroup

if TYPE_CHECKING:
    from torch import Tensor


class Engines(Protocol):
    """`RayEngines`, as far as weights are sent to it."""

    timeouts: Timeouts
    weights_version: str

    @property
    def handles(self) -> list[Any]:
        """The actors, by index."""

    def took_weights(self, version: str) -> None:
        """Note that the engines have them."""

    def replaced(self, error: EngineLost, index: int) -> None:
        """Have a lost engine replaced; the one in its place gets its weights from `WeightSender.restore`.

        Raises:
            EngineLost: it cannot be.
        """


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
        self._of = weakref.ref(engines)  # which have this
        self._calls = calls or RayCalls()
        self._chunk_bytes = chunk_bytes
        self._group: NcclGroup | None = None
        self._underway: tuple[Any, str, Future[Sent | None]] | None = None
        self._last: tuple[Any, str, Any] | None = None
        """What was sent last, its name and its mark, where it can be sent again; kept until others are."""

    @property
    def _engines(self) -> Engines:
        engines = self._of()
        if engines is None:
            raise EngineLost("sending weights: the rollout engines were deleted; create new ones and attach them")
        return engines

    def send(self, weights: Iterable[tuple[str, Tensor]], version: str) -> Sent:
        """Send, and wait until every engine samples with them. Requests in flight are kept, and go on with them.

        `weights` are (name, tensor) as checkpoints have them and TRL pushes them, whole, every parameter: what is not
        among them keeps its value. Tied ones may come once or under each name.

        Raises:
            WeightsRefused, EngineAsleep, EngineBusy: an engine cannot take weights now; none has changed.
            EngineLost: engines were lost by it, and could not be replaced; the others have the weights.
        """
        self._require_free()
        return self._required(self._send(weights, version))

    def start(self, weights: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Begin to send in a thread of its own. The tensors must stay as they are until `finish` returns."""
        self._require_free()
        _wait_for_device()
        answer: Future[Sent | None] = Future()
        self._underway = weights, version, answer
        threading.Thread(target=self._fill, args=self._underway, name="send-weights", daemon=True).start()

    def finish(self) -> Sent:
        """Wait for what `start` began, and raise what `send` would have raised.

        Where the weights can tell that they were written meanwhile (by `mark()`), they are sent again.
        """
        if self._underway is None:
            raise EngineBusy("sending weights: nothing is being sent; call start() first")
        weights, version, answer = self._underway
        try:
            sent = answer.result()
            if sent is None:
                logger.warning("weights were written while they were sent as %s; they are sent again", version)
                sent = self._required(self._send(weights, version))
            return sent
        finally:
            self._underway = None

    def restore(self, handle: Any, index: int, version: str) -> bool:
        """Send an engine that took a lost one's place what the others have; False when that is not there any more.

        Raises:
            EngineLost: it could not take them.
        """
        if self._last is None or self._last[1] != version or self._last[2] != _mark(self._last[0]):
            return False
        update = Update(self._calls, {index: handle}, self._engines.timeouts.sync)
        if self._filled(update, self._last[0]) is None:
            return False
        update.finish(version)
        error = update.error(version)
        if error is not None:
            raise error
        return True

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

    def _require_free(self) -> None:
        if self._underway is not None:
            raise EngineBusy("sending weights: others are being sent; call finish() first")

    def _fill(self, weights: Any, version: str, answer: Future[Sent | None]) -> None:
        try:
            answer.set_result(self._send(weights, version))
        except BaseException as error:
            answer.set_exception(error)

    def _send(self, weights: Any, version: str) -> Sent | None:
        """None when the tensors changed meanwhile: the engines are torn then."""
        begun = time.monotonic()
        self._last = None
        update = Update(self._calls, dict(enumerate(self._engines.handles)), self._engines.timeouts.sync)
        filled = self._filled(update, weights)
        if filled is None:
            return None
        update.finish(version)
        if update.live:
            self._engines.took_weights(version)
            mark = _mark(weights)
            self._last = None if mark is None else (weights, version, mark)
        error = update.error(version)
        if error is not None:
            if not update.live:
                raise error
            for index in update.lost:
                self._engines.replaced(error, index)
        return Sent(version, *filled, time.monotonic() - begun, tuple(update.live))

    def _filled(self, update: Update, weights: Any) -> tuple[int, int] | None:
        """Begin an update and send its parts: (bytes, parts); None when the tensors changed meanwhile."""
        import torch

        routes = update.routes()
        group = self._joined(update) if routes == {"nccl"} else None
        update.begin()
        size = parts = 0
        try:
            mark = _mark(weights)
            with torch.inference_mode(False), torch.no_grad(), float32_products():
                for part in chunks(weights, self._chunk_bytes, "cpu" if group is None else group.device):
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
        return size, parts

    def _joined(self, update: Update) -> NcclGroup:
        """The group of all these engines' workers, made anew when they are others."""
        if self._group is None or not self._group.of(update.live):
            self.close()
            self._group = NcclGroup(update)
        return self._group


def _mark(weights: Any) -> Any:
    """What is equal as long as the tensors' contents are; None for what can be iterated over only once."""
    if isinstance(weights, (list, tuple)):
        return [name for name, _ in weights], bit_sums([tensor for _, tensor in weights])
    mark = getattr(weights, "mark", None)
    return mark() if callable(mark) else None


def _wait_for_device() -> None:
    """Kernels of this thread's stream: another thread's may be another one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
