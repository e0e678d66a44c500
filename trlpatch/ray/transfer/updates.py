"""Updates of all weights of one engine, in its actor: begun, filled in parts, finished with a name.

From the first to the last call no step runs; requests in flight are kept, and go on with the new weights and with
keys and values computed anew. The weights are those of a policy before `begin` and after `finish` only.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trlpatch.engine.drain import drain
from trlpatch.errors import EngineAsleep, EngineBusy, StaleAdapter, WeightsRefused
from trlpatch.ray.messages import BASE_ADAPTER, Version
from trlpatch.ray.transfer import loading, shapes

if TYPE_CHECKING:
    from trlpatch.ray.stepping import Stepper
    from trlpatch.ray.transfer.shapes import Route


class WeightUpdates:
    """What may be done to the weights of one engine, in which order. Its methods may be called from any thread."""

    def __init__(self, stepper: Stepper, replaced: Callable[[], None]) -> None:
        """`replaced()` runs in the stepping thread when other weights are in the engine, and no adapter any more."""
        self._stepper = stepper
        self._replaced = replaced
        self._open = False
        self._torn = False

    def route(self) -> Route:
        """How this engine gets weights, as it was built."""
        return self._stepper.between_steps(route_of)

    def ranks(self) -> int:
        """How many workers the engine has."""
        return self._stepper.between_steps(lambda llm: len(_workers(llm, loading.refusal_in_worker)))

    def refusal(self) -> Exception | None:
        """What `begin` would raise now with nothing changed."""
        return self._stepper.between_steps(self._refusal)

    def connect(self, init_info: dict[str, Any]) -> None:
        """What vLLM calls `init_weight_transfer_engine`: the workers join the trainer's group, where there is one."""
        self._stepper.between_steps(lambda llm: self._connect(llm, init_info))

    def disconnect(self) -> None:
        """Leave that group, between two updates."""
        self._stepper.between_steps(self._disconnect)

    def begin(self) -> None:
        """Step no further, and make ready for new weights.

        Raises:
            WeightsRefused: this engine can take none, with the reason; it has those that it had.
            EngineAsleep: its weights are unmapped.
            EngineBusy: an update is open, or requests are in flight that this vLLM cannot compute anew.
            EngineLost: something else failed, and the engine with it.
        """
        self._stepper.between_steps(self._begin)

    def update(self, update_info: dict[str, Any]) -> None:
        """Take some of the weights: `{"weights": [(name, tensor), ...]}`, or what vLLM's NCCL backend is told.

        Raises:
            EngineBusy: no update is open.
            EngineLost: it failed; the weights are half-written, and the engine is lost.
        """
        self._stepper.between_steps(lambda llm: self._update(llm, update_info))

    def finish(self, version: str | None = None) -> None:
        """Put the new weights to work under the name `version`, forget cached prefixes, and step on.

        Without a name it is one that nobody has asked for, until `name` is called.

        Raises:
            EngineBusy, EngineLost: as `update`.
        """
        self._stepper.between_steps(lambda llm: self._finish(llm, version))

    def abandon(self) -> None:
        """End an update that the trainer cannot send to its end: no request is answered until a whole one was sent.

        Requests in flight are dropped.
        """
        self._stepper.between_steps(self._abandon)

    def name(self, version: str) -> None:
        """Name the weights that the engine has."""
        self._stepper.between_steps(lambda llm: self._name(llm, version))

    def version(self) -> str:
        """The name of the weights that the engine has."""
        return self._stepper.version.weights

    def refuse_torn(self) -> None:
        """Refuse a request to weights that are of no policy. In the stepping thread.

        Raises:
            StaleAdapter: they are not.
        """
        if self._torn:
            raise StaleAdapter(
                f"rollout engine {self._stepper.index}: a request, while its weights are half-written: sending them "
                "was interrupted in the trainer's process; send all of them anew"
            )

    # In the stepping thread.

    def _connect(self, llm: Any, init_info: dict[str, Any]) -> None:
        if route_of(llm) != "functions":
            _workers(llm, "init_weight_transfer_engine", init_info=init_info)

    def _disconnect(self, llm: Any) -> None:
        if self._open:
            raise EngineBusy(f"rollout engine {self._stepper.index}: an update of its weights is open")
        if route_of(llm) != "functions":
            _workers(llm, loading.disconnect_worker)

    def _refusal(self, llm: Any) -> Exception | None:
        engine = f"rollout engine {self._stepper.index}"
        if self._open:
            return EngineBusy(f"{engine}: an update of its weights is open; finish it first")
        if self._stepper.asleep:
            return EngineAsleep(f"{engine} sleeps: its weights cannot be written; wake_up() first")
        reason = next(filter(None, _workers(llm, loading.refusal_in_worker)), None)
        if reason is not None:
            return WeightsRefused(f"{engine} can take no weights: {reason}; nothing was changed")
        if not llm.llm_engine.has_unfinished_requests():
            return None
        if not _recomputes(llm):
            why = "this vLLM cannot forget their keys and values"
        elif self._stepper.version.adapter != BASE_ADAPTER:
            why = "they may be an adapter's, which would be gone"
        else:
            return None
        return EngineBusy(
            f"{engine}: requests are in flight, and {why}; nothing was changed: let them finish, or abort() them"
        )

    def _begin(self, llm: Any) -> None:
        refusal = self._refusal(llm)
        if refusal is not None:
            raise refusal
        with self._or_lost():
            drain(llm)
            if route_of(llm) == "functions":
                _workers(llm, loading.begin_in_worker)
            else:
                _workers(llm, "start_weight_update")
        self._open = True
        self._stepper.begin_update()

    def _update(self, llm: Any, update_info: dict[str, Any]) -> None:
        self._require_open()
        with self._or_lost():
            if route_of(llm) == "functions":
                _workers(llm, loading.load_in_worker, **update_info)
            else:
                _workers(llm, "update_weights", update_info=update_info)

    def _finish(self, llm: Any, version: str | None) -> None:
        self._require_open()
        with self._or_lost():
            self._end(llm)
            _forget_caches(llm)
            self._replaced()
        self._torn = False
        named = version or f"{self._stepper.version.weights}+unnamed"
        self._tell(llm, named)
        self._stepper.end_update(Version(BASE_ADAPTER, named))

    def _abandon(self, llm: Any) -> None:
        if not self._open:
            return
        with self._or_lost():
            self._end(llm)
            _forget_caches(llm)
            self._replaced()
        self._torn = True
        self._stepper.abort()
        self._stepper.end_update(Version(BASE_ADAPTER, "half-written"))

    def _end(self, llm: Any) -> None:
        self._open = False
        if route_of(llm) == "functions":
            _workers(llm, loading.finish_in_worker)
        else:
            _workers(llm, "finish_weight_update")

    def _name(self, llm: Any, version: str) -> None:
        if self._torn or self._open:
            raise EngineBusy(f"rollout engine {self._stepper.index}: weights that are not whole cannot be named")
        self._tell(llm, version)
        self._stepper.version = Version(self._stepper.version.adapter, version)

    @staticmethod
    def _tell(llm: Any, version: str) -> None:
        """vLLM 0.28 and newer keep a name of their own, which 0.32 puts on every output."""
        told = getattr(llm.llm_engine, "set_weight_version", None)
        if callable(told):
            told(version)

    def _require_open(self) -> None:
        if not self._open:
            raise EngineBusy(
                f"rollout engine {self._stepper.index}: no update of its weights is open; begin one first"
            )

    @contextlib.contextmanager
    def _or_lost(self) -> Any:
        """Mark the engine lost by whatever fails inside: nobody knows what its weights are then."""
        try:
            yield
        except BaseException as error:
            self._stepper.lose(error)
            raise


def route_of(llm: Any) -> Route:
    """How an engine gets weights, by the settings that it was built with."""
    backend = getattr(getattr(llm.llm_engine.vllm_config, "weight_transfer_config", None), "backend", None)
    if backend is None:
        return "functions"
    return "tensors" if backend == shapes.BACKEND else "nccl"


def _workers(llm: Any, method: Any, **kwargs: Any) -> list[Any]:
    """`collective_rpc` of the engine, which `LLM` has lost methods for and every release has."""
    answers: list[Any] = llm.llm_engine.collective_rpc(method, kwargs=kwargs)
    return answers


def _recomputes(llm: Any) -> bool:
    """Can vLLM take a request's keys and values away and go on with it?"""
    return "reset_running_requests" in inspect.signature(llm.llm_engine.reset_prefix_cache).parameters


def _forget_caches(llm: Any) -> None:
    """Prefixes, images and encoders' outputs that were computed with the weights before."""
    inner = llm.llm_engine
    if inner.has_unfinished_requests():
        forgotten = inner.reset_prefix_cache(reset_running_requests=True)
    else:
        forgotten = inner.reset_prefix_cache()
    if forgotten is False:
        raise EngineBusy("vLLM could not reset its prefix cache; rollouts would continue prefixes of other weights")
    for name in ("reset_mm_cache", "reset_encoder_cache"):
        reset = getattr(inner, name, None)
        if callable(reset):
            reset()
