"""Stand-ins for what cannot run without a GPU. Their real counterparts are tests/cpu (adapters) and tests/gpu (sleep).

`RecordingEngineStub` keeps vLLM's rules about sleep: unmapped weights cannot be written, level 2 leaves undefined
weights behind, and nothing generates while a pool is unmapped.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

from trlpatch.engine.memory.cumem import discard_kv_cache
from trlpatch.policy.adapter import LoraWeights
from trlpatch.policy.adapter_tensors import AdapterTensors, adapter_tensors


class ExecutorStub:
    """An executor that says which pools sleep."""

    def __init__(self, engine: RecordingEngineStub) -> None:
        self._engine = weakref.proxy(engine)  # vLLM's executors know no LLM
        self.driver_worker = SimpleNamespace(model_runner=SimpleNamespace())
        self.is_sleeping = False

    @property
    def sleeping_tags(self) -> set[str]:
        return self._engine.unmapped

    @sleeping_tags.setter
    def sleeping_tags(self, tags: set[str]) -> None:
        self._engine.unmapped = tags


class RecordingEngineStub:
    """A `vllm.LLM` that computes nothing and writes down what is asked of it."""

    def __init__(
        self,
        *,
        sleep: bool = False,
        lora_rank: int | None = 16,
        tensor_parallel: int = 1,
        logprobs_mode: str = "processed_logprobs",
        max_model_len: int = 256,
        tells_tags: bool = True,
    ) -> None:
        self.calls: list[str] = []
        self.weights = "checkpoint"
        self.requests: list[Any] = []
        config = SimpleNamespace(
            model_config=SimpleNamespace(
                enable_sleep_mode=sleep, logprobs_mode=logprobs_mode, max_model_len=max_model_len
            ),
            lora_config=None if lora_rank is None else SimpleNamespace(max_lora_rank=lora_rank),
            parallel_config=SimpleNamespace(tensor_parallel_size=tensor_parallel),
        )
        self.unmapped: set[str] = set()
        executor = ExecutorStub(self) if tells_tags else None
        self.llm_engine = SimpleNamespace(vllm_config=config, model_executor=executor)

    def generate(self, prompts: Any = None, *, lora_request: Any = None, **_: Any) -> list[Any]:
        assert not self.unmapped, f"generate while {sorted(self.unmapped)} is unmapped"
        assert self.weights != "undefined", "generate from weights that a level-2 sleep discarded"
        self.calls.append(f"generate({'base' if lora_request is None else lora_request.lora_name}, {self.weights})")
        self.requests.append(lora_request)
        return []

    def sleep(self, level: int = 1) -> None:
        assert self.llm_engine.vllm_config.model_config.enable_sleep_mode, "this engine was built without sleep"
        assert not self.unmapped, "vLLM ignores the sleep of an engine that sleeps"
        self.calls.append(f"sleep({level})")
        self.unmapped.update({"weights", "kv_cache"})
        if level == 2:
            self.weights = "undefined"

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(f"wake({', '.join(tags or ['all'])})")
        self.unmapped -= set(tags or ["weights", "kv_cache"])

    def collective_rpc(self, method: Any) -> list[int]:
        assert method is discard_kv_cache, f"{method} sent to the workers"
        assert not self.unmapped, "unmapped a second time"
        self.calls.append("discard(kv_cache)")
        return [0]

    def load_weights(self) -> None:
        """TRL's own push, through the worker's model."""
        assert "weights" not in self.unmapped, "weights written into unmapped memory"
        self.calls.append("load_weights")
        self.weights = "policy"

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset_prefix_cache")


class RecordingAdapterSync:
    """An AdapterSync that keeps the tensors it was given."""

    compares = False

    def __init__(self) -> None:
        self.published: list[AdapterTensors] = []
        self.evicted = False
        self.invalidated = 0
        self.description = "recorded"

    def publish(self, weights: LoraWeights) -> Any:
        self.published.append(adapter_tensors(weights))
        self.evicted = False
        return SimpleNamespace(lora_name=f"v{len(self.published)}", lora_int_id=len(self.published))

    def holds(self, request: Any) -> bool:
        return not self.evicted and request.lora_int_id == len(self.published)

    def invalidate(self) -> None:
        self.invalidated += 1
        self.evicted = True
