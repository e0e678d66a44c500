"""The event loop that asks engines, calls reward functions and fills the trainer's queue, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trlpatch.log import logger
from trlpatch.ray.async_grpo.buffer import RolloutBuffer
from trlpatch.ray.async_grpo.ledger import Asked, Ledger
from trlpatch.ray.async_grpo.rendering import Renderer
from trlpatch.ray.async_grpo.reports import Reports
from trlpatch.ray.async_grpo.samples import AsyncRelease
from trlpatch.ray.async_grpo.scoring import Completion, Group, RewardFunction, Scores, score
from trlpatch.ray.async_grpo.threads import in_thread
from trlpatch.ray.async_grpo.versions import PolicyVersions
from trlpatch.ray.messages import RolloutRequest, RolloutResponse

_TICK = 0.5
"""Seconds between two signs of life of a loop that has nothing to do."""


@dataclass(frozen=True)
class RolloutTools:
    """What rollouts are made with."""

    ask: Callable[[RolloutRequest], RolloutResponse]
    renderer: Renderer
    sampling_params: Any
    functions: Sequence[RewardFunction]
    release: AsyncRelease
    versions: PolicyVersions
    ledger: Ledger
    reports: Reports
    buffer: RolloutBuffer
    key: str
    """For `abort`."""


class RolloutLoop:
    """One run of a worker, from its start to its end."""

    def __init__(self, tools: RolloutTools, failed: Callable[[BaseException], None]) -> None:
        """Start the thread; `failed(error)` is called in it when it ends by an error."""
        self.beat = time.monotonic()
        """When it gave a sign of life last."""
        self._tools = tools
        self._failed = failed
        self._stopping = threading.Event()
        self._room = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="trlpatch-rollouts", daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        """Does the thread run?"""
        return self._thread.is_alive()

    def ask_to_stop(self) -> None:
        """Ask nothing more, and wait for nothing."""
        self._stopping.set()
        self._wake()

    def join(self, timeout: float) -> None:
        """Wait for the thread."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.warning("the rollout worker did not end within %g s; its thread is left behind", timeout)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._ask_on())
        except BaseException as error:
            if not self._stopping.is_set():
                self._failed(error)

    async def _ask_on(self) -> None:
        ledger = self._tools.ledger
        ledger.room = self._wake
        under_way: set[asyncio.Task[None]] = set()
        try:
            while not self._stopping.is_set():
                self.beat = time.monotonic()
                self._room.clear()
                while (asked := ledger.next()) is not None:
                    task = asyncio.create_task(self._roll_out(asked))
                    task.add_done_callback(lambda _: self._room.set())
                    under_way.add(task)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._room.wait(), _TICK)
                for task in [task for task in under_way if task.done()]:
                    under_way.discard(task)
                    task.result()
        finally:
            ledger.room = lambda: None
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._room.set)

    async def _roll_out(self, asked: Asked) -> None:
        tools = self._tools
        prompt_ids = tools.renderer.prompt_ids(asked.prompt.row["prompt"])
        request = RolloutRequest(
            [{"prompt_token_ids": prompt_ids}], [tools.sampling_params], adapter=None, key=tools.key
        )
        response = await in_thread(tools.ask, request)
        group = self._group(asked, prompt_ids, response)
        tools.reports.answered(group, tools.ledger.under_way)
        if tools.ledger.is_stale(group.model_version):
            tools.ledger.outdated(asked)
            return
        started = time.monotonic()
        scores = await score(group, tools.functions)
        seconds = time.monotonic() - started
        tools.reports.scored(group, scores, seconds)
        for entry in tools.ledger.answered(asked, self._samples(group, scores, seconds)):
            tools.buffer.put_nowait(entry)

    def _group(self, asked: Asked, prompt_ids: Sequence[int], response: RolloutResponse) -> Group:
        tools = self._tools
        (output,) = response.outputs
        prompt = asked.prompt.row["prompt"]
        completions = [
            Completion(
                tools.renderer.content(prompt, completion.token_ids),
                list(completion.token_ids),
                [at[token].logprob for token, at in zip(completion.token_ids, completion.logprobs, strict=True)],
            )
            for completion in output.outputs
        ]
        version = tools.versions.of(response.first_version)
        return Group(asked.prompt, prompt_ids, completions, version, response.mixed, response.seconds)

    def _samples(self, group: Group, scores: Scores, seconds: float) -> list[Any]:
        tools = self._tools
        context = len(group.prompt_ids)
        extra = tools.reports.of_samples(tools.ledger.totals, seconds)
        return [
            tools.release.build(
                prompt=group.prompt.row["prompt"],
                completion=completion.content,
                input_ids=[*group.prompt_ids, *completion.token_ids],
                completion_mask=[0] * context + [1] * len(completion.token_ids),
                old_log_probs=[0.0] * context + list(completion.logprobs),
                advantage=float(scores.advantages[index]),
                model_version=group.model_version,
                group_id=group.prompt.position,
                metrics={**scores.metrics(index), **extra},
            )
            for index, completion in enumerate(group.completions)
            if completion.token_ids
        ]
