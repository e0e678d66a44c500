"""Adapter sync: the interface of every way of getting a LoRA adapter into an engine."""

from __future__ import annotations

from typing import Protocol

from trlpatch.engine.protocols import LoraRequest
from trlpatch.policy.adapter import CopyUnderway, LoraWeights


class AdapterSync(Protocol):
    """One way of getting an adapter into an engine."""

    @property
    def description(self) -> str:
        """Name the way, and why it is not a better one, in a few words."""

    @property
    def compares(self) -> bool:
        """Tell whether `publish` costs no more than a check, and returns the same request while nothing changed.

        Where it does not, every `publish` returns a new request, and whoever calls it has to know when to.
        """

    def publish(self, weights: LoraWeights) -> LoraRequest:
        """Make the adapter servable as it is now and return a request for it, of a name never used for another one.

        The version published before is gone then: a request for it may not be used any more. Weights are only read.

        Raises:
            AdapterNotExpressible: the engine has no place for one of the adapted modules; the version published before
                then still stands.
        """

    def start(self) -> CopyUnderway | None:
        """Begin to hand over again what was handed over last, as it is now; None where that cannot be done ahead.

        The device copies and compares while the host finds out whether it is still the adapter to hand over. To be
        finished in the same call: nothing may be trained in between. Left unfinished, it has ended the version
        published before.
        """

    def holds(self, request: LoraRequest) -> bool:
        """Tell whether the adapter of this request is still servable; vLLM may have evicted it for another one."""

    def invalidate(self) -> None:
        """Forget what was published: the engine has lost it, or the memory it was in, without telling its registry.

        The next `publish` writes everything anew, and `holds` is False until then.
        """
