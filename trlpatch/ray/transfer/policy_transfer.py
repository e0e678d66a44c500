"""Send a model's policy, whole, to engines on Ray actors: what no adapter request can carry, and full fine-tuning.

What the weights are is `policy_weights`' answer, from the trained tensors; nothing is merged into the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trlpatch.engine.weights_in_place.plan import NotInPlace, refuse_adapted_twins
from trlpatch.engine.weights_in_place.reload import checkpoint_tensors
from trlpatch.errors import EngineLost, WeightsRefused
from trlpatch.policy.content_mark import ContentMark
from trlpatch.policy.policy_weights import PolicyWeight
from trlpatch.ray.messages import following
from trlpatch.ray.transfer.sender import Engines, Sent, WeightSender

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class PolicySource:
    """(name, tensor) of a policy, anew each time it is iterated over; tied parameters once."""

    def __init__(self, weights: list[PolicyWeight], dtype: torch.dtype | None = None) -> None:
        """`dtype`: of the engine; merged parameters are rounded to it once, all others go as they are."""
        self._weights = weights
        self._dtype = dtype

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        merged = {one.path for one in self._weights if not one.plain}
        for name, tensor in checkpoint_tensors(self._weights):
            yield name, tensor.to(self._dtype) if self._dtype is not None and name in merged else tensor

    def mark(self) -> ContentMark:
        """By content: the step of a fused optimizer moves no version counter."""
        return ContentMark(self._weights)


class PolicyTransfer:
    """Sends policies; versions of the weights are counted, "1", "2", ..."""

    def __init__(self, engines: Engines, sender: WeightSender) -> None:
        self._engines = weakref.ref(engines)
        self._sender = weakref.ref(sender)  # which knows the engines, whose backend has this
        self.sent: Sent | None = None
        """What was sent last; None before."""
        self._underway: ContentMark | None = None
        """Of what `start` began to send."""

    @property
    def description(self) -> str:
        """For `trlpatch.status()`."""
        if self.sent is None:
            return "none sent yet"
        sent = self.sent
        size = f"{sent.bytes / 2**20:.0f} MiB in {sent.seconds:.2f} s"
        return f"sent to {len(sent.engines)} engines (version {sent.version}, {size})"

    def send(self, weights: list[PolicyWeight]) -> str | None:
        """See WeightTransfer; also raises what WeightSender.send raises.

        Joins what `start` began, and sends again where that was another policy.
        """
        try:
            source = self._source(weights)
            if self._joined(source):
                return None
            self.sent = self.sender.send(source, self._next())
        except (NotInPlace, WeightsRefused) as refusal:
            return str(refusal)
        return None

    def start(self, weights: list[PolicyWeight]) -> str | None:
        """See WeightTransfer."""
        try:
            source = self._source(weights)
        except NotInPlace as refusal:
            return str(refusal)
        self._joined(source)
        mark = source.mark()
        self.sender.start(source, self._next())
        self._underway = mark
        return None

    def finish(self) -> Sent | None:
        """Wait for what `start` began; what was sent last."""
        if self._underway is not None:
            self._underway = None
            self.sent = self.sender.finish()
        return self.sent

    def _joined(self, source: PolicySource) -> bool:
        """Wait for what is under way, and tell whether it is this one, unchanged."""
        mark = self._underway
        if mark is None:
            return False
        self.finish()
        return mark == source.mark()

    def _source(self, weights: list[PolicyWeight]) -> PolicySource:
        refuse_adapted_twins(weights)
        return PolicySource(weights, self._dtype())

    @property
    def sender(self) -> WeightSender:
        """Of these engines.

        Raises:
            EngineLost: they are gone.
        """
        sender = self._sender()
        if sender is None:
            raise EngineLost("sending weights: the rollout engines were deleted; create new ones and attach them")
        return sender

    def _next(self) -> str:
        engines = self._engines()
        return "" if engines is None else following(engines.weights_version)

    def _dtype(self) -> Any:
        infos = getattr(self._engines(), "infos", None)
        config = infos[0].vllm_config if infos else None
        return getattr(getattr(config, "model_config", None), "dtype", None)
