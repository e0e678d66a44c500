"""`RayRolloutWorker`: TRL's `RolloutWorkerProtocol` on Ray engines, with rollouts and rewards in threads."""

from __future__ import annotations

import contextlib
import queue
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from trlpatch.errors import RolloutWorkerFailed
from trlpatch.ray.async_grpo.buffer import RolloutBuffer
from trlpatch.ray.async_grpo.ledger import Ledger, Totals
from trlpatch.ray.async_grpo.loop import RolloutLoop, RolloutTools
from trlpatch.ray.async_grpo.prompts import Progress, Prompts, Trained
from trlpatch.ray.async_grpo.protocols import AsyncEngines
from trlpatch.ray.async_grpo.rendering import Renderer
from trlpatch.ray.async_grpo.reports import Reports
from trlpatch.ray.async_grpo.samples import AsyncRelease
from trlpatch.ray.async_grpo.scoring import RewardFunction
from trlpatch.ray.async_grpo.settings import RolloutSettings
from trlpatch.ray.async_grpo.versions import PolicyVersions
from trlpatch.ray.messages import RolloutRequest, RolloutResponse

_STOP = 30.0
"""Seconds for requests to be aborted and the thread to end."""


class RayRolloutWorker:
    """Asks the engines for completions while the trainer trains, scores them, and queues them for it.

    Given to `AsyncGRPOTrainer(rollout_worker=...)`; `trlpatch.ray.async_rollouts` makes one. It has no process of
    its own: reward functions may be lambdas, hold locks, files or models on any device.

    Attributes:
        rollout_buffer: the queue that the trainer takes `RolloutSample`s from.
        metrics_queue: dictionaries of metrics, which the trainer logs (from TRL 1.11 on).
        trained: which prompts were trained on.
    """

    def __init__(
        self,
        engines: AsyncEngines,
        dataset: Iterable[Mapping[str, Any]],
        reward_funcs: Sequence[RewardFunction],
        *,
        release: AsyncRelease,
        versions: PolicyVersions | None = None,
        ask: Callable[[RolloutRequest], RolloutResponse] | None = None,
        make_sampling_params: Callable[[Mapping[str, Any]], Any] | None = None,
    ) -> None:
        """Nothing is asked before `start`; `configure` comes before it.

        `ask` stands in for the calls of engines, `make_sampling_params` for `vllm.SamplingParams`.
        """
        self.rollout_buffer = RolloutBuffer(self._take)
        self.metrics_queue: queue.Queue[dict[str, Any]] = queue.Queue(maxsize=4096)
        self.trained = Trained()
        self._engines = engines
        self._prompts = Prompts(dataset)
        self._functions = list(reward_funcs)
        self._release = release
        self._versions = versions or PolicyVersions()
        self._ask = ask or engines.ask
        self._make_sampling_params = make_sampling_params or _sampling_params
        self._tools: RolloutTools | None = None
        self._loop: RolloutLoop | None = None
        self._failure: BaseException | None = None

    def configure(self, settings: RolloutSettings, processing_class: Any) -> None:
        """Say how rollouts are made, and with which tokenizer."""
        self._tools = RolloutTools(
            self._ask,
            Renderer(processing_class, settings.chat_template_kwargs),
            self._make_sampling_params(settings.sampling),
            self._functions,
            self._release,
            self._versions,
            Ledger(settings, self._prompts, self.trained, self._versions),
            Reports(self.metrics_queue, self._release.drains_metrics, settings),
            self.rollout_buffer,
            uuid.uuid4().hex,
        )

    def resume_from(self, done: Progress, model_version: int) -> None:
        """Go on where an earlier run was when it wrote a checkpoint; after `configure` and before `start`."""
        tools = self._configured()
        self._prompts.start(done)
        self.trained = Trained(done)
        ledger = Ledger(tools.ledger.settings, self._prompts, self.trained, self._versions)
        self._tools = replace(tools, ledger=ledger)
        self._versions.current = model_version

    # TRL's RolloutWorkerProtocol.

    def start(self) -> None:
        """Begin to ask. Called once the engines have the policy.

        Raises:
            RolloutWorkerFailed: the callback that `trlpatch.ray.async_rollouts` returns is not among the trainer's.
        """
        if self._loop is not None:
            return
        # An engine that was told to drop what has a key takes no more of it.
        self._tools = tools = replace(self._configured(), key=uuid.uuid4().hex)
        self._failure = None
        self.rollout_buffer.restart()
        self._loop = RolloutLoop(tools, self._has_failed)

    def stop(self) -> None:
        """End asking; requests under way are aborted."""
        loop, self._loop = self._loop, None
        if loop is None:
            return
        loop.ask_to_stop()
        with contextlib.suppress(Exception):  # what a lost engine had under way is lost
            self._engines.abort(self._configured().key)
        loop.join(_STOP)

    def update_model_version(self, model_version: int) -> None:
        """The engines have this version of the policy from now on."""
        self._versions.current = model_version

    def check_health(self, stale_after_s: float) -> None:
        """See that there will be samples; the trainer asks while it waits for one.

        Raises:
            RolloutWorkerFailed: the worker has ended, or has given no sign of life for `stale_after_s` seconds.
        """
        if self._failure is not None:
            raise self._as_failed()
        if self._loop is None:
            return
        silent = time.monotonic() - self._loop.beat
        if not self._loop.is_alive() or silent > stale_after_s:
            raise RolloutWorkerFailed(
                f"the rollout worker gave no sign of life for {silent:.0f} s (heartbeat_stale_after_s="
                f"{stale_after_s:g}); a reward function that is `async` must not block, and any must release the GIL"
            )

    # What a checkpoint wants to know.

    @property
    def totals(self) -> Totals:
        """What became of samples since the run began."""
        return self._configured().ledger.totals

    def step_ended(self) -> None:
        """The trainer has ended an optimizer step."""
        self.trained.step_ended(self._configured().ledger.settings.micro_batch)

    def _configured(self) -> RolloutTools:
        if self._tools is None:
            raise RolloutWorkerFailed(
                "the rollout worker has no settings; expected the callback that `trlpatch.ray.async_rollouts(...)` "
                "returns among the trainer's: `AsyncGRPOTrainer(model, **trlpatch.ray.async_rollouts(...))`"
            )
        return self._tools

    def _take(self, entry: Any) -> Any | None:
        return self._configured().ledger.take(entry)

    def _has_failed(self, error: BaseException) -> None:
        self._failure = error
        self.rollout_buffer.fail(self._as_failed)

    def _as_failed(self) -> RolloutWorkerFailed:
        error = self._failure
        failed = RolloutWorkerFailed(f"the rollout worker ended with {type(error).__name__}: {error}")
        failed.__cause__ = error
        return failed


def _sampling_params(arguments: Mapping[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(**arguments, output_kind=RequestOutputKind.FINAL_ONLY)
