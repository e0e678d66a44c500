"""Metrics of the worker, in the places and under the names that this TRL release logs."""

from __future__ import annotations

import contextlib
import queue
import time
from typing import Any

from trlpatch.ray.async_grpo.ledger import Totals
from trlpatch.ray.async_grpo.scoring import Group, Scores
from trlpatch.ray.async_grpo.settings import RolloutSettings


class Reports:
    """From TRL 1.11 on the trainer reads a queue; before, it averages what stands in each sample."""

    def __init__(self, metrics: queue.Queue[dict[str, Any]], drained: bool, settings: RolloutSettings) -> None:
        """Nothing has been sampled."""
        self._metrics = metrics
        self._drained = drained
        self._settings = settings
        self._groups = 0
        self._tokens = 0
        self._began = self._pushed = time.monotonic()
        self._said = Totals()

    def answered(self, group: Group, under_way: int) -> None:
        """A prompt's completions are there."""
        lengths = [len(completion.token_ids) for completion in group.completions]
        self._tokens += sum(lengths)
        now = time.monotonic()
        # As TRL's: a pair is a rate, numerator over denominator, summed over what is logged together.
        self._push(
            {
                "rollout/generated_tok_s": (float(sum(lengths)), now - self._pushed),
                "rollout/duration_s": group.seconds,
                "rollout/inflight": float(under_way * self._settings.num_generations),
                "rollout/mixed_versions_frac": (float(group.mixed), 1.0),
                "completions/mean_length": (float(sum(lengths)), float(len(lengths))),
                "completions/max_length": float(max(lengths, default=0)),
                "completions/min_length": float(min(lengths, default=0)),
            }
        )
        self._pushed = now

    def scored(self, group: Group, scores: Scores, seconds: float) -> None:
        """Its rewards are there."""
        self._push({"rollout/score_s": seconds})
        if self._settings.log_completions:
            from trl.trainer.utils import print_prompt_completions_sample

            print_prompt_completions_sample(
                prompts=[group.prompt.row["prompt"]] * len(group.completions),
                completions=[completion.content for completion in group.completions],
                rewards={"reward": list(scores.rewards)},
                advantages=list(scores.advantages),
                step=self._groups,
                num_samples=self._settings.num_completions_to_print,
            )
        self._groups += 1

    def of_samples(self, totals: Totals, seconds: float) -> dict[str, float]:
        """What goes into the metrics of each sample: all there is to say before TRL 1.11."""
        if self._drained:
            said, self._said = self._said, Totals(totals.taken, totals.dropped, totals.asked_again, totals.given_up)
            changed = {
                "sample/dropped_stale_total": float(totals.dropped - said.dropped),
                "rollout/asked_again_total": float(totals.asked_again - said.asked_again),
                "rollout/given_up_total": float(totals.given_up - said.given_up),
            }
            self._push({name: value for name, value in changed.items() if value})
            return {}
        return {
            "generation_tok_per_s": self._tokens / max(time.monotonic() - self._began, 1e-9),
            "scoring_time_ms": seconds * 1000,
            "dropped_stale": float(totals.dropped),
            "asked_again": float(totals.asked_again),
        }

    def _push(self, values: dict[str, Any]) -> None:
        if self._drained and values:
            with contextlib.suppress(queue.Full):
                self._metrics.put_nowait(values)
