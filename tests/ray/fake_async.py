"""Doubles of Ray engines in this process, for the worker and the transfer of AsyncGRPOTrainer. No Ray, no vLLM."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from trlpatch.ray.messages import EngineHealth, RolloutRequest, RolloutResponse, Version, following
from trlpatch.ray.timeouts import Timeouts

LOGPROB = -0.5


class FakeAsyncEngines:
    """One engine that answers at once with made-up tokens; `gate` holds answers back, `held` is its version."""

    def __init__(self, *, max_model_len: int = 64, lora: Any = None, logprobs_mode: str = "processed_logprobs"):
        model = SimpleNamespace(max_model_len=max_model_len, logprobs_mode=logprobs_mode)
        self.handles = [object()]
        self.infos: list[Any] = [
            SimpleNamespace(index=0, vllm_config=SimpleNamespace(model_config=model, lora_config=lora))
        ]
        self.timeouts = Timeouts(sync=5.0)
        self.weights_version = "0"
        self.held = Version()
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Semaphore(0)
        """Released by every request."""
        self.calls: list[str] = []
        self.asked: list[RolloutRequest] = []
        self.published: list[Any] = []
        self.sent: list[dict[str, Any]] = []
        self.failure: BaseException | None = None
        self.tokens: Callable[[RolloutRequest, int], list[int]] = lambda request, index: [3 + index, 2]

    @property
    def version(self) -> Version:
        return dataclasses.replace(self.held, weights=self.weights_version)

    def ask(self, request: RolloutRequest) -> RolloutResponse:
        self.asked.append(request)
        first = self.version
        self.arrived.release()
        self.gate.wait()
        if self.failure is not None:
            raise self.failure
        (params,) = request.sampling_params or ()
        outputs = [self._completion(self.tokens(request, index)) for index in range(params["n"])]
        tokens = sum(len(one.token_ids) for one in outputs)
        return RolloutResponse([SimpleNamespace(outputs=outputs)], first, self.version, 0, 0.01, tokens)

    def on_each(self, method: str, *args: Any, timeout: float | None = None, **kwargs: Any) -> list[Any]:
        self.calls.append(method)
        return [None]

    def health(self, timeout: float | None = None) -> list[Any]:
        self.calls.append("health")
        return [EngineHealth(0, "running", 0, 0, self.version, 0, 0.0, 0)]

    def abort(self, key: str | None = None) -> None:
        self.calls.append("abort")
        self.gate.set()

    def rollout_backend(self) -> Any:
        return SimpleNamespace(new_adapter_sync=lambda: self)

    # As an AdapterSync too.

    def publish(self, weights: Any) -> None:
        self.calls.append("publish")
        self.published.append([tensor.detach().clone() for tensor in weights.parameters])
        self.held = Version(self.held.adapter + 1)

    def send_weights(self, named: Any) -> None:
        self.weights_version = following(self.weights_version)
        self.calls.append(f"send {self.weights_version}")
        self.sent.append({name: tensor.detach().clone() for name, tensor in named})

    @staticmethod
    def _completion(token_ids: list[int]) -> Any:
        logprobs = [{token: SimpleNamespace(logprob=LOGPROB)} for token in token_ids]
        return SimpleNamespace(token_ids=token_ids, logprobs=logprobs)
