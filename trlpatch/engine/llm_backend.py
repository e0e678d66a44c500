"""The part of a rollout backend that is the same for every `vllm.LLM`, wherever its workers run."""

from __future__ import annotations

import weakref

from trlpatch.engine import probes
from trlpatch.engine.drain import unfinished
from trlpatch.engine.probes import KV_CACHE, SLEEP_TAGS
from trlpatch.engine.protocols import RolloutEngine, WeightTransfer
from trlpatch.errors import CannotShare, EngineBusy, StaleAdapter


def no_worker_model() -> CannotShare:
    """Make the error for an engine whose model cannot be looked into."""
    return CannotShare(
        "the engine's worker runs in another process; set VLLM_ENABLE_V1_MULTIPROCESSING=0 before vLLM is imported"
    )


class LLMBackend:
    """Keeps the books of what sleeps, for releases whose executor cannot be asked; see `RolloutBackend`."""

    location = ""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = weakref.ref(engine)
        self._asleep: set[str] = set()

    @property
    def engine(self) -> RolloutEngine:
        """The `vllm.LLM`.

        Raises:
            StaleAdapter: it is gone.
        """
        engine = self._engine()
        if engine is None:
            raise StaleAdapter("the rollout engine was deleted; build a new one and call trlpatch.attach_engine")
        return engine

    def unfinished(self) -> bool:
        """Tell whether requests have been added and not answered to their end."""
        return unfinished(self.engine)

    def weight_transfer(self) -> WeightTransfer | None:
        """None: they are written in place, where the worker is in this process."""
        return None

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False when blocks of the cache are in use."""
        return self.engine.reset_prefix_cache() is not False  # None: this release does not say

    def asleep(self) -> set[str]:
        """The pools that are unmapped now."""
        return set(self._asleep)

    def unmapped(self) -> set[str]:
        """As `asleep`."""
        return set(self._asleep)

    def mark_asleep(self) -> None:
        """Both pools were unmapped."""
        self._asleep = set(SLEEP_TAGS)

    def mark_awake(self, tag: str) -> None:
        """One pool was mapped."""
        self._asleep.discard(tag)

    def kv_sleep_unsupported_reason(self) -> str | None:
        """Why the KV cache cannot be unmapped alone; None when it can."""
        if not probes.sleep_enabled(self.engine):
            return "it was built without enable_sleep_mode=True"
        return self._kv_sleep_reason()

    def discard_kv_cache(self) -> int:
        """Unmap the KV cache of an engine that is awake and idle, its caches reset."""
        self.require_idle()
        self._reset_caches()
        freed = self._discard_kv_cache()
        self._asleep = {KV_CACHE}
        return freed

    def _kv_sleep_reason(self) -> str | None:
        raise NotImplementedError

    def _discard_kv_cache(self) -> int:
        raise NotImplementedError

    def require_idle(self) -> None:
        """Raise EngineBusy when requests are unfinished."""
        if self.unfinished():
            raise EngineBusy(
                "putting the engine to sleep: it has unfinished requests, whose KV cache would be unmapped under "
                "them; let generate() return, or abort them with llm.llm_engine.abort_request(...)"
            )

    def _reset_caches(self) -> None:
        if not self.reset_prefix_cache():
            raise EngineBusy(
                "putting the engine to sleep: vLLM could not reset its prefix cache, because blocks of it are in use; "
                "later rollouts would read memory whose contents are gone. Finish or abort the requests first"
            )
        for name in ("reset_mm_cache", "reset_encoder_cache"):
            reset = getattr(self.engine.llm_engine, name, None)
            if callable(reset):
                reset()
