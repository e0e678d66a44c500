"""What an engine is given before it serves: the adapter and the weights that the others hold."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from trlpatch.errors import WrongVersion
from trlpatch.ray.actor import CONTROL
from trlpatch.ray.calls import gather
from trlpatch.ray.messages import CHECKPOINT_WEIGHTS, Version

if TYPE_CHECKING:
    from trlpatch.ray.protocols import Engines


class Restore:
    """For `Fleet.restore`; does not keep the engines alive."""

    def __init__(self, engines: Engines) -> None:
        """Nothing is given yet."""
        self._engines = weakref.ref(engines)

    def __call__(self, handle: Any, index: int) -> bool:
        """Give an engine what the others hold, and see that it has it; False when nobody has it to give.

        Raises:
            WrongVersion: it holds something else all the same.
        """
        engines = self._engines()
        if engines is None:
            return False
        limit = engines.timeouts.sync
        if held(handle, limit) == engines.version:  # an update for all has reached it
            return True
        if engines.weights_version != CHECKPOINT_WEIGHTS:
            give = getattr(engines.weight_sender, "restore", None)
            if give is None or not give(handle, index, engines.weights_version):
                return False
        if engines.adapter_version:
            _answer(handle.publish_adapter.remote(engines.adapter_ref, engines.adapter_version), limit)
        version = held(handle, limit)
        if version != engines.version:
            raise WrongVersion(f"rollout engine {index} holds {version} where the others hold {engines.version}")
        return True


def held(handle: Any, limit: float) -> Version:
    """What an engine says that it holds."""
    version: Version = _answer(handle.health.options(concurrency_group=CONTROL).remote(), limit).version
    return version


def _answer(ref: Any, limit: float) -> Any:
    (answer,) = gather([ref], "giving an engine what the others hold", limit)
    if isinstance(answer, BaseException):
        raise answer
    return answer
